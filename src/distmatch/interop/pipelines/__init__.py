"""Pipelines of diffusers as teachers: what a pipeline does with its network is traced, not programmed."""

import inspect
import os
from typing import Any

from distmatch.base.errors import UserError
from distmatch.interop.diffusers_teacher import load_diffusers, teacher_from
from distmatch.interop.pipelines.export import export_lora, export_pipeline
from distmatch.interop.pipelines.loading import needs_tracing
from distmatch.interop.pipelines.teacher import load_pipeline

__all__ = ["export_lora", "export_pipeline", "load_folder", "load_pipeline", "needs_tracing"]


def load_folder(folder: str | os.PathLike[str], **options: Any) -> Any:
    """A teacher from any folder of diffusers.

    Args:
        folder: A pipeline, or a network beside its scheduler.
        options: Those of :func:`load_pipeline` for a pipeline that is conditioned on text, otherwise those of
            :func:`distmatch.interop.load_diffusers`.

    Raises:
        UserError: It cannot be used.
    """
    if needs_tracing(folder):
        return load_pipeline(folder, **options)
    known = [
        name
        for function in (load_diffusers, teacher_from)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    if unknown := [name for name in options if name not in known]:
        raise UserError(
            "these options are for pipelines that are conditioned on text",
            got=f"{', '.join(unknown)} for {folder}",
            expected=f"at most {', '.join(dict.fromkeys(known))}",
            fix="omit them",
        )
    return load_diffusers(folder, **options)
