"""Teachers made of pipelines of diffusers by tracing, compared with what the pipelines compute themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import CalledNet
from distmatch.diffusion.conditioning import LABEL
from distmatch.interop.conversion import Conversion
from distmatch.interop.pipelines.arguments import flattened
from distmatch.interop.pipelines.levels import clean_samples, measured_sigmas
from distmatch.interop.pipelines.loading import load_parts
from distmatch.interop.pipelines.pipeline import Pipeline, PipelineDecoder, class_count
from distmatch.interop.pipelines.trace import Call, Trace, Tracer, stacked

_TOLERANCE = 1e-3  # a teacher that differs by more than rounding in float32 was not understood
_TEXTS = (
    ["a red cat", "the dog sleeps in a house"],
    ["a small green tree in the red house", "a river", "the large blue dog runs under a tree"],
)
_STEPS = 4


def load_pipeline(
    folder: str | os.PathLike[str],
    *,
    null: str | int | None = "",
    tokens: int | None = None,
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
    pipeline, network = load_parts(Path(folder))
    tracer = Tracer(pipeline, network, options)
    classes = class_count(tracer)
    asked: Sequence[Any] = ([0, 1], [classes - 1, 0, 1]) if tracer.asks == "class_labels" else _TEXTS
    traces = [tracer.run(prompts, _STEPS) for prompts in asked]
    labelled = tracer.asks == "class_labels"
    found = Pipeline(tracer, traces, null if not labelled else None, tokens)
    found.folder = Path(folder).absolute()
    teacher = _denoiser(found, classes, null)
    if check:
        first = [tracer.run(asked[0], steps, calls=1) for steps in (2, 3, 6)]
        teacher.conversion = compare(teacher, [*traces, *first])  # type: ignore[assignment]
    plain = {"null": null, "tokens": tokens, "check": check, **options}
    if all(value is None or isinstance(value, (str, int, float, bool)) for value in plain.values()):
        # Students keep where it was, where all that it was loaded with can be kept.
        teacher.loaded_from = (os.path.abspath(folder), plain)  # type: ignore[assignment]
    return teacher


def _denoiser(found: Pipeline, classes: int, null: str | int | None) -> PredictionDenoiser:
    contract, path = found.contract, found.schedule.path
    labelled, texts = LABEL in contract.fields, isinstance(null, str) and bool(contract.fields)
    teacher = PredictionDenoiser(
        CalledNet(found.tracer.network, contract),
        "vp" if path is None else path,
        found.schedule.prediction,
        shape=contract.shape,
        sigma_data=1.0,
        # The start of the pipeline's sampler, however near to pure noise.
        sigma_max=None if path is None else path.rho_max,
        shift=found.shift or 1.0,
        time=found.times,
        conditioning=contract.fields,
        null_class=(null if isinstance(null, int) else classes) if labelled else None,
        null=found.encode([null]) if texts and not labelled and isinstance(null, str) else None,
    )
    teacher.pipeline = found  # type: ignore[assignment]
    if not labelled and contract.fields:
        teacher.prompt_encoder = found  # type: ignore[assignment]
    teacher.decoder = PipelineDecoder(found)  # type: ignore[assignment]
    return teacher.eval()


@torch.no_grad()
def compare(
    teacher: PredictionDenoiser, traces: Sequence[Trace], tolerance: float | None = _TOLERANCE
) -> Conversion:
    """How far a teacher's x0 is from the pipeline's own, in all steps of traces, as a batch and one by one.

    Args:
        teacher: A teacher of :func:`load_pipeline`.
        traces: What the pipeline computed.
        tolerance: Largest acceptable difference, relative to the largest value; None: any.

    Raises:
        UserError: It is larger, or no step of the pipeline shows its x0.
    """
    found: Any = teacher.pipeline
    gap, size, points = 0.0, 0.0, 0
    for trace in traces:
        if found.schedule.family == "flow" and trace.calls[0].x0 is None and len(trace.calls) < _STEPS:
            continue  # a run that was left early does not show its levels
        steps = zip(trace.calls, _levels(trace, found), clean_samples(found.schedule, trace), strict=True)
        for call, time, x0 in steps:
            placed = _placed(call, time, found)
            if x0 is None or placed is None:
                continue
            y, rho = placed
            told = found.fitted(found.contract.conditioning(call.arguments))
            each = [teacher(y[i : i + 1], rho[i : i + 1], told.index(slice(i, i + 1))) for i in range(len(y))]
            for ours in (teacher(y, rho, told), torch.cat(each)):
                gap = max(gap, (ours - x0).abs().max().item())
            size, points = max(size, x0.abs().max().item()), points + len(y)
    if not points:
        raise UserError(
            "this pipeline does not show its clean samples, so that a teacher made of it cannot be checked",
            got=f"a {type(found.tracer.pipeline.scheduler).__name__}, prediction {found.schedule.prediction}",
            expected="a scheduler that states them (DDIM, DDPM, Euler, DPM-Solver++), or a flow",
            fix="save the pipeline with DDIMScheduler.from_config(pipe.scheduler.config)",
        )
    result = Conversion(gap, size, points)
    if tolerance is not None and not result.relative <= tolerance:
        raise UserError(
            "the teacher does not predict what the pipeline computes",
            got=str(result),
            expected=f"a relative difference below {tolerance:g}",
            fix="please report this pipeline; check=False loads it all the same",
        )
    return result


def _levels(trace: Trace, found: Pipeline) -> list[float]:
    """The times of our path in the steps of a trace; those of a flow are measured."""
    return measured_sigmas(trace) if found.schedule.family == "flow" else [c.timestep for c in trace.calls]


def _placed(call: Call, time: float, found: Pipeline) -> tuple[Tensor, Tensor] | None:
    """What the network received as a sample of ours, and its level; None beyond the ends of the path."""
    path, value = found.schedule.path, stacked(flattened(call.arguments)[found.contract.sample])
    if path is None or value is None or not path.t_min <= time <= path.t_max:
        return None
    value = value.reshape(call.sample.shape)
    return value / path.alpha(time).to(value.dtype), path.rho(time).expand(len(value))
