"""Teachers made of pipelines of diffusers by tracing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.progress import tell
from distmatch.base.ranks import joined
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.conditioning import LABEL
from distmatch.interop.pipelines.comparison import (
    STEPS,
    TOLERANCES,
    compare,
    compare_networks,
    denoiser_around,
    levels_of,
)
from distmatch.interop.pipelines.decoder import PipelineDecoder
from distmatch.interop.pipelines.levels import schedule_of
from distmatch.interop.pipelines.loading import load_parts
from distmatch.interop.pipelines.pipeline import Pipeline, class_count
from distmatch.interop.pipelines.skeleton import plain_network
from distmatch.interop.pipelines.trace import Trace, Tracer

_TEXTS = (
    ["a red cat", "the dog sleeps in a house"],
    ["a small green tree in the red house", "a river", "the large blue dog runs under a tree"],
)


def load_pipeline(
    folder: str | os.PathLike[str],
    *,
    null: str | int | None = "",
    tokens: int | None = None,
    dtype: str = "float32",
    check: bool = True,
    **options: Any,
) -> PredictionDenoiser:
    """A teacher from a pipeline of diffusers, whatever its model: how it calls its network is traced.

    Nothing is downloaded, only safetensors are read, and no code of the folder is run.

    Args:
        folder: The folder that ``save_pretrained`` of the pipeline wrote.
        null: The prompt that stands for "no condition", such as the empty one or a negative prompt; for a
            pipeline of classes the class that does, by default the one behind the last. None: there is none.
        tokens: A fixed number of tokens for pipelines that encode prompts to the length of the longest, with
            a mask or as a list. Guidance and concatenation need equal lengths.
        dtype: "float32" or "bfloat16", in which the weights of the network are read; prompts are encoded and
            samples decoded in float32 in any case. In bfloat16 rounding would hide how the network is called:
            that is read from the pipeline without its weights, in float32, and compared there to 1e-3; with
            the weights x0 is compared to 3e-2.
        check: Whether predictions are compared with what the pipeline itself computes; ``teacher.conversion``
            is the result.
        options: Options of the pipeline's call that belong to the model: ``height``, ``width``,
            ``num_frames``, ``max_sequence_length``, an embedded ``guidance_scale``.

    Returns:
        The denoiser. ``teacher.pipeline`` is the :class:`Pipeline`, with ``encode`` and ``decode``.

    Raises:
        UserError: A folder that is not loaded, a pipeline that cannot be read by tracing it, or one whose own
            clean samples are others than those of the teacher.
    """
    kind = _dtype_of(dtype)
    if joined().main:
        tell(f"{folder}: loading the pipeline and tracing how it calls its network")
    # JSON has lists alone, and the fingerprint tells a list from a tuple.
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    plain = kind == torch.float32
    seen, traces = _seen(folder, torch.float32 if plain else None, options)
    tracer = seen if plain else Tracer(*load_parts(Path(folder), kind), options)
    tracer.guide_as(seen)
    received, runs = None, []
    if not plain:  # first the whole pipeline in this dtype, and then its network alone
        received = tracer.arguments(_asked(tracer)[0])
        runs = [tracer.run(trace.prompts, STEPS) for trace in traces] if check else []
        tracer.read_others_in(Path(folder), torch.float32)
    found, teacher = _teacher(tracer, traces, null, tokens, received)
    found.folder = Path(folder).absolute()
    if check:
        first = [seen.run(_asked(tracer)[0], steps, calls=1) for steps in (2, 3, 6)]
        conversion = compare(teacher, [*traces, *first], recorded=not plain)
        if not plain:
            real = [(run, levels_of(trace, found)) for run, trace in zip(runs, traces, strict=True)]
            conversion = compare_networks(teacher, real, TOLERANCES[kind])
        teacher.conversion = conversion  # type: ignore[assignment]
    kept = {"null": null, "tokens": tokens, "dtype": dtype, "check": check, **options}
    if all(map(_storable, kept.values())):
        # Students keep where it was, where all that it was loaded with can be kept.
        teacher.loaded_from = (os.path.abspath(folder), kept)  # type: ignore[assignment]
    return teacher


def _storable(value: Any) -> bool:
    """Whether JSON has the value, or a list in place of its tuple."""
    if isinstance(value, (list, tuple)):
        return all(map(_storable, value))
    return value is None or isinstance(value, (str, int, float, bool))


def without_weights(
    folder: str | os.PathLike[str],
    *,
    null: str | int | None = "",
    tokens: int | None = None,
    dtype: str = "float32",
    **options: Any,
) -> PredictionDenoiser:
    """A teacher of :func:`load_pipeline` whose network is on the meta device: for shapes and sizes.

    Args:
        folder: The folder.
        null: As there.
        tokens: As there.
        dtype: Of the network.
        options: As there.

    Raises:
        UserError: As there, or the network needs numbers to know its shapes.
    """
    tracer, traces = _traced(folder, None, options)
    _, teacher = _teacher(tracer, traces, null, tokens, network=plain_network(tracer.network))
    for parameter in teacher.parameters():  # buffers keep their dtype, as in load_pipeline
        parameter.data = parameter.data.to(_dtype_of(dtype))
    return teacher


def _traced(
    folder: str | os.PathLike[str], dtype: torch.dtype | None, options: Mapping[str, Any]
) -> tuple[Tracer, list[Trace]]:
    """Runs of two and of three samples; without weights if ``dtype`` is None."""
    tracer = Tracer(*load_parts(Path(folder), dtype), options)
    schedule_of(tracer.pipeline)  # of the right kind, before it runs for nothing
    return tracer, [tracer.run(prompts, STEPS) for prompts in _asked(tracer)]


def _seen(
    folder: str | os.PathLike[str], dtype: torch.dtype | None, options: Mapping[str, Any]
) -> tuple[Tracer, list[Trace]]:
    """As :func:`_traced`, with the weights of networks that need numbers to know their shapes (Lumina2)."""
    try:
        return _traced(folder, dtype, options)
    except UserError:
        if dtype is not None:
            raise
        return _traced(folder, torch.float32, options)


def _dtype_of(name: str) -> torch.dtype:
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
    if found is None:
        raise unknown_name("dtype of a pipeline", name, ("float32", "bfloat16"))
    return found


def _asked(tracer: Tracer) -> Sequence[Any]:
    """What two runs are asked for, of two and of three samples."""
    last = class_count(tracer) - 1
    return ([0, 1], [last, 0, 1]) if tracer.asks == "class_labels" else _TEXTS


def _teacher(
    tracer: Tracer,
    traces: Sequence[Trace],
    null: str | int | None,
    tokens: int | None,
    received: Mapping[str, Any] | None = None,
    network: nn.Module | None = None,
) -> tuple[Pipeline, PredictionDenoiser]:
    found = Pipeline(tracer, traces, None if tracer.asks == "class_labels" else null, tokens, received)
    contract, labelled = found.contract, LABEL in found.contract.fields
    texts = isinstance(null, str) and bool(contract.fields) and not labelled
    classes = class_count(tracer)
    teacher = denoiser_around(
        found,
        tracer.network if network is None else network,
        null_class=(null if isinstance(null, int) else classes) if labelled else None,
        null=found.encode([null]) if texts and isinstance(null, str) else None,
    )
    teacher.pipeline = found  # type: ignore[assignment]
    if not labelled and contract.fields:
        teacher.prompt_encoder = found  # type: ignore[assignment]
    teacher.decoder = PipelineDecoder(found)  # type: ignore[assignment]
    return found, teacher.eval()
