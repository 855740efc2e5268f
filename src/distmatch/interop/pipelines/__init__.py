"""Pipelines of diffusers as teachers: what a pipeline does with its network is traced, not programmed."""

import os
from typing import Any

from distmatch.interop.diffusers_teacher import load_diffusers
from distmatch.interop.pipelines.loading import needs_tracing
from distmatch.interop.pipelines.teacher import load_pipeline

__all__ = ["load_folder", "load_pipeline", "needs_tracing"]


def load_folder(folder: str | os.PathLike[str], **options: Any) -> Any:
    """A teacher from any folder of diffusers.

    Args:
        folder: A pipeline, or a network beside its scheduler.
        options: Those of :func:`load_pipeline` for a pipeline that is conditioned on text, otherwise those of
            :func:`distmatch.interop.load_diffusers`.

    Raises:
        UserError: It cannot be used.
    """
    return load_pipeline(folder, **options) if needs_tracing(folder) else load_diffusers(folder, **options)
