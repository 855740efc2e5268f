"""The scheduler with which a plain call of a pipeline gives a student's samples, found by calling it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError, cause
from distmatch.base.seeds import initial_noise
from distmatch.diffusion.conditioning import Conditioning
from distmatch.interop.pipelines.contract import Contract
from distmatch.interop.pipelines.schedulers import candidates
from distmatch.interop.pipelines.steps import times_of
from distmatch.interop.pipelines.trace import Tracer

TOLERANCE = 1e-4
STOCHASTIC_TOLERANCE = 1e-2
"""With fresh noise in each step: a scheduler may pass a network of whole times the time before rounding."""
_MOST_SCALED = 0.01  # a pipeline whose first noise differs by more is another sampler
_TEXTS = ["a red cat", "the dog sleeps in a house"]
_SEED = 0


@dataclass(frozen=True)
class Match:
    """A scheduler and what was seen.

    Attributes:
        scheduler: The scheduler.
        difference: The largest difference from the student's samples, from the same noise.
        start: Standard deviation of the noise that the student starts from, where the pipeline's is 1.
        call: Further arguments of the pipeline's call: its times, where it has none of its own that fit.
    """

    scheduler: Any
    difference: float
    start: float
    call: dict[str, Any] = field(default_factory=dict)


def whole_student(student: Any) -> Any:
    """A student with a full network in float32 on the CPU; itself where it is one."""
    whole = student.merged()
    if all(p.device.type == "cpu" and p.dtype == torch.float32 for p in whole.parameters()):
        return whole
    return copy.deepcopy(whole).cpu().float()


@torch.no_grad()
def matching_scheduler(student: Any, written: Any, network: str) -> Match:
    """The scheduler with which a pipeline takes the steps of a student.

    Args:
        student: The student, of :func:`whole_student`.
        written: A pipeline of diffusers with its network, on the CPU.
        network: The name of the network in it.

    Raises:
        UserError: None does; with what was seen.
    """
    found = student.denoiser.pipeline
    path, n = student.denoiser.path, len(student.sigmas)
    tracer = Tracer(written, network, found.tracer.options)
    tracer.guidance = found.tracer.guidance
    asked: Any = [0, 1] if tracer.asks == "class_labels" else _TEXTS
    arguments = tracer.arguments(asked, 4)
    conditioning = found.fitted(found.contract.conditioning(arguments))
    noise = [initial_noise(2, student.shape, _SEED, "export")]
    fresh = torch.Generator().manual_seed(_SEED)
    noise += [torch.randn(noise[0].shape, generator=fresh) for _ in range(n - 1)]
    ours = _samples(student, found.contract.in_dtypes_of(arguments), noise, conditioning)
    times = [times_of(path, sigma) for sigma in student.sigmas]
    own, family, prediction = written.scheduler, found.schedule.family, found.schedule.prediction
    stochastic = n > 1 and student.sampler != "ddim"
    seen, near, more = [], [], _given_times(student, written)
    for scheduler, start in candidates(own, family, prediction, times, stochastic):
        name = type(scheduler).__name__
        if abs(start - 1) > _MOST_SCALED:
            seen.append(f"{name} starts from noise of another size: {1 / start:.3g} times")
            continue
        written.scheduler = scheduler
        try:
            theirs = _called(tracer, asked, n, noise[0] * start, more)
        except UserError as error:
            seen.append(f"{name}: {cause(error)}")
            continue
        gap = (theirs - ours).abs().max().item() / max(1.0, ours.abs().max().item())
        if gap <= TOLERANCE:
            return Match(scheduler, gap, start, more)
        near.append(Match(scheduler, gap, start, more))
        seen.append(f"{name} differs by {gap:.1e}")
    nearest = min(near, key=lambda match: match.difference, default=None)
    if stochastic and nearest is not None and nearest.difference <= STOCHASTIC_TOLERANCE:
        return nearest
    raise UserError(
        "no scheduler of diffusers takes the steps of this student",
        got=f"{n} steps at times {', '.join(f'{t:.6g}' for t in times)} ({student.sampler}); "
        + "; ".join(dict.fromkeys(seen)),
        expected=f"a plain call with the student's samples, to {TOLERANCE:g} of their largest value",
        fix="distil with the steps of the pipeline, from its largest noise level down; this student can be "
        "sampled with distmatch, or exported with --to onnx",
    )


def _samples(student: Any, contract: Contract, noise: list[Tensor], conditioning: Conditioning) -> Tensor:
    """A student's samples with its network called in float32: one loaded in bfloat16 may round the time."""
    net = student.denoiser.net
    before, net.call = net.call, contract
    try:
        samples: Tensor = student(noise, conditioning)
    finally:
        net.call = before
    return samples


def _given_times(student: Any, written: Any) -> dict[str, Any]:
    """The times of a student as an argument of the call, for pipelines that divide [1, 0.001] (CogView4).

    They receive whole times before their shift; their own for two steps are 1000 and 1.
    """
    time = student.denoiser.pipeline.times
    takes = "timesteps" in inspect.signature(type(written).__call__).parameters
    if len(student.sigmas) == 1 or time.shift == 1 or not takes:
        return {}
    t = torch.tensor([times_of(student.denoiser.path, sigma) for sigma in student.sigmas])
    return {"timesteps": (replace(time, scale=1.0, offset=0.0)(t)).round().long().tolist()}


def _called(tracer: Tracer, asked: Any, n: int, latents: Tensor, more: dict[str, Any]) -> Tensor:
    """The samples of a plain call in the space of the scheduler; its fresh noise is that of a known seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # some pipelines pass the generator to their scheduler, others do not
        result = tracer.call(
            asked, num_inference_steps=n, output_type="latent", latents=latents.clone(), **more
        )
    samples: Tensor = result[0]
    if samples.shape != latents.shape:
        raise UserError(
            "the pipeline returns latents of another form",
            got=f"{tuple(samples.shape)}",
            expected=f"{tuple(latents.shape)}",
        )
    return samples.float()
