"""Teachers made of pipelines of diffusers by tracing, compared with what the pipelines compute themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import CalledNet
from distmatch.diffusion.conditioning import LABEL, Conditioning, cat
from distmatch.interop.conversion import Conversion
from distmatch.interop.diffusers_schedule import Schedule
from distmatch.interop.optional import import_diffusers
from distmatch.interop.pipelines.arguments import flattened
from distmatch.interop.pipelines.contract import Contract, TimeMap, fit_contract
from distmatch.interop.pipelines.levels import clean_samples, measured_sigmas, schedule_of, shift_of, time_map
from distmatch.interop.pipelines.loading import load_parts
from distmatch.interop.pipelines.trace import Call, Prompts, Trace, Tracer, replaced, stacked

_TOLERANCE = 1e-3  # a teacher that differs by more than rounding in float32 was not understood
_TEXTS = (
    ["a red cat", "the dog sleeps in a house"],
    ["a small green tree in the red house", "a river", "the large blue dog runs under a tree"],
)
_STEPS = 4
_MOST = 64  # prompts that are encoded at a time


class Pipeline:
    """A traced pipeline: it encodes prompts, decodes samples and knows the steps that it would take.

    Copies of a denoiser share it; it is no part of their parameters.

    Attributes:
        contract: How it calls its network.
        schedule: Path and prediction.
        times: The network's time as a function of the path's.
        shift: The shift of its noise levels at this resolution; None without one.
        null: The prompt that stands for "no condition".
        shape: Shape of one decoded sample: (channels, height, width), or (channels, frames, height, width).
    """

    def __init__(self, tracer: Tracer, traces: Sequence[Trace], null: str | int | None) -> None:
        self.tracer = tracer
        scheduler = tracer.pipeline.scheduler
        self.schedule: Schedule = schedule_of(scheduler)
        classes = class_count(tracer)
        self.contract: Contract = fit_contract(traces, classes)
        self.times: TimeMap = time_map(
            self.contract.scale, self.contract.offset, self.schedule, scheduler, traces[0]
        )
        self.shift = shift_of(scheduler, traces[0]) if self.schedule.family == "flow" else None
        self.null = null
        self._output = (traces[0].calls[0].output, len(traces[0].prompts))
        self.shape = tuple(self.decode(torch.zeros(1, *self.contract.shape)).shape[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """Itself: nothing in it ever changes."""
        return self

    def encode(self, prompts: Prompts) -> Conditioning:
        """Prompts (or class labels) as what the network receives for them, one row each.

        The pipeline's own encoding runs, up to the first call of its network.

        Args:
            prompts: Texts, or class labels for a pipeline of classes.

        Raises:
            UserError: No prompts, or prompts that are encoded to different lengths when there are many.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise UserError("prompts are given as a list of one or more", got=repr(prompts)[:80])
        parts = [
            self.contract.conditioning(self.tracer.arguments(prompts[i : i + _MOST]))
            for i in range(0, len(prompts), _MOST)
        ]
        return cat(_of_equal_lengths(parts, self.contract.lists))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Samples of the denoiser (B, *contract.shape) as images or video, (B, *shape) in about [-1, 1].

        The end of the pipeline runs on them; its network and scheduler do not. There are no gradients.
        """
        network, scheduler = self.tracer.network, self.tracer.pipeline.scheduler
        device = next(network.parameters()).device
        x0 = z.to(device, next(network.parameters()).dtype)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _zeros(*self._output, len(x0))

        def step(*args: Any, **kwargs: Any) -> Any:
            return import_diffusers().schedulers.scheduling_utils.SchedulerOutput(prev_sample=x0)

        asked: list[Any] = [0 if self.tracer.asks == "class_labels" else ""] * len(x0)
        with replaced(network, {"forward": forward}), replaced(scheduler, {"step": step}):
            found = self.tracer.call(asked, num_inference_steps=2, output_type="pt")
        x: Tensor = found[0]
        if x.ndim == 5:
            x = x.transpose(1, 2)  # frames come before channels
        return (2 * x.float() - 1).to(z.device)

    def grid(self, steps: int) -> Tensor:
        """The decreasing noise levels of the pipeline's own sampler, (steps + 1,), the last of them 0.

        Args:
            steps: Its ``num_inference_steps``.
        """
        prompts = [0] if self.tracer.asks == "class_labels" else [""]
        self.tracer.arguments(prompts, steps)
        scheduler, path = self.tracer.pipeline.scheduler, self.schedule.path
        if path is None:
            raise UserError("this pipeline has no noise path")
        if self.schedule.family == "flow":
            t = scheduler.sigmas[: len(scheduler.timesteps)].double().cpu()
        else:
            t = scheduler.timesteps.double().cpu()
        rho = path.rho(t.clamp(path.t_min, path.t_max))
        return torch.cat([rho, torch.zeros(1, dtype=torch.float64)])

    def describe(self) -> dict[str, str]:
        """The contract, for people."""
        contract, path = self.contract, self.schedule.path
        fields = {
            name: f"({', '.join('any' if n < 0 else str(n) for n in spec.shape)}) "
            f"{str(spec.dtype).removeprefix('torch.')}"
            for name, spec in contract.fields.items()
        }
        rounded = ", rounded down to integers first" if self.times.whole else ""
        rounded += f", without the shift {self.times.shift:.4g}" if self.times.shift != 1 else ""
        return {
            "pipeline": type(self.tracer.pipeline).__name__,
            "network": f"{type(self.tracer.network).__name__} ({self.tracer.network_name})",
            "sample": f"{contract.shape} as {contract.sample}{' (a list)' if contract.listed else ''}",
            "time": f"{contract.time} = {contract.scale:g} x scheduler time + {contract.offset:g}{rounded}",
            "output": contract.output,
            "conditioning": "; ".join(f"{name} {said}" for name, said in fields.items()) or "none",
            "prediction": self.schedule.prediction,
            "path": "none" if path is None else path.name,
            "shift": "none" if self.shift is None else f"{self.shift:.4g}",
            "null": "none" if self.null is None else f"the prompt {self.null!r}",
            "decoded": f"{self.shape}",
        }


class PipelineDecoder:
    """The decoder of a teacher made of a pipeline; see :class:`distmatch.interop.Decoder`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.shape = pipeline, pipeline.shape

    def decode(self, z: Tensor) -> Tensor:
        """Samples of the denoiser as images or video, without gradients."""
        return self.pipeline.decode(z)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Not possible: a pipeline contains the way from latents to images alone.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "images cannot be encoded by a teacher that was made of a pipeline, whose end decodes only",
            got=f"images {tuple(x.shape[1:])}",
            fix="give latents of the teacher's own shape as data, or use a method that needs no data",
        )

    def __eq__(self, other: object) -> bool:
        """Whether it is the decoder of the same pipeline."""
        return isinstance(other, PipelineDecoder) and self.pipeline is other.pipeline

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineDecoder:
        """Itself: nothing in it ever changes."""
        return self


def load_pipeline(
    folder: str | os.PathLike[str], *, null: str | int | None = "", check: bool = True, **options: Any
) -> PredictionDenoiser:
    """A teacher from a pipeline of diffusers, whatever its model: how it calls its network is traced.

    Nothing is downloaded, only safetensors are read, and no code of the folder is run.

    Args:
        folder: The folder that ``save_pretrained`` of the pipeline wrote.
        null: The prompt that stands for "no condition", such as the empty one or a negative prompt; for a
            pipeline of classes the class that does, by default the one behind the last. None: there is none.
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
    found = Pipeline(tracer, traces, null if not labelled else None)
    teacher = _denoiser(found, classes, null)
    if check:
        first = [tracer.run(asked[0], steps, calls=1) for steps in (2, 3, 6)]
        teacher.conversion = compare(teacher, [*traces, *first])  # type: ignore[assignment]
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
        time=found.times,
        conditioning=contract.fields,
        null_class=(null if isinstance(null, int) else classes) if labelled else None,
        null=found.encode([null]) if texts and not labelled and isinstance(null, str) else None,
    )
    teacher.pipeline = found  # type: ignore[assignment]
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
    contract = found.contract
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
            told = contract.conditioning(call.arguments)
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


def class_count(tracer: Tracer) -> int:
    """Classes of a pipeline that takes labels; 0 for one that takes prompts."""
    if tracer.asks != "class_labels":
        return 0
    config: Any = tracer.network.config
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)


def _of_equal_lengths(parts: list[Conditioning], lists: Sequence[str]) -> list[Conditioning]:
    """Parts whose lists are padded to one length."""
    if len(parts) == 1:
        return parts
    longest = {name: max(part[name].shape[1] for part in parts) for name in lists}
    made = []
    for part in parts:
        fields = dict(part)
        for name, length in longest.items():
            fields[name] = torch.nn.functional.pad(part[name], (0, 0, 0, length - part[name].shape[1]))
        made.append(Conditioning(fields))
    shapes = [{name: tuple(value.shape[1:]) for name, value in part.items()} for part in made]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            "this pipeline encodes prompts to the length of the longest, which differs between them",
            got=f"{shapes[0]} and {next(s for s in shapes if s != shapes[0])}",
            fix=f"encode {_MOST} prompts at a time, and train on conditionings of one length",
        )
    return made


def _zeros(output: Any, rows: int, n: int) -> Any:
    """Zeros like what a network returned for ``rows`` samples, for ``n`` of them."""
    if isinstance(output, Tensor):
        return output.new_zeros(n, *output.shape[1:])
    if isinstance(output, dict):
        return SimpleNamespace(**{name: _zeros(value, rows, n) for name, value in output.items()})
    if isinstance(output, list) and len(output) == rows:
        return [torch.zeros_like(output[0]) for _ in range(n)]
    return tuple(_zeros(value, rows, n) for value in output) if isinstance(output, tuple) else output
