"""Teachers made of pipelines, compared with what the pipelines compute themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import CalledNet
from distmatch.diffusion.conditioning import Conditioning
from distmatch.interop.conversion import Conversion
from distmatch.interop.pipelines.arguments import flattened, unexplained
from distmatch.interop.pipelines.containers import stacked
from distmatch.interop.pipelines.contract import Contract
from distmatch.interop.pipelines.levels import clean_samples, measured_sigmas
from distmatch.interop.pipelines.pipeline import Pipeline
from distmatch.interop.pipelines.trace import Call, Trace

# A teacher that differs by more than rounding was not understood. In bfloat16 a number is known to 1/256, and
# the same pass of one sample and of a batch differs by some of these.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
STEPS = 4
_SAME = 1e-3  # relative, of what a network receives


def denoiser_around(found: Pipeline, network: nn.Module, **null: Any) -> PredictionDenoiser:
    """The denoiser that calls a network as a pipeline does, with ``null_class`` or ``null``."""
    contract, path = found.contract, found.schedule.path
    return PredictionDenoiser(
        CalledNet(network, contract),
        "vp" if path is None else path,
        found.schedule.prediction,
        shape=contract.shape,
        sigma_data=1.0,
        # The start of the pipeline's sampler, however near to pure noise.
        sigma_max=None if path is None else path.rho_max,
        shift=found.shift or 1.0,
        time=found.times,
        conditioning=contract.fields,
        **null,
    )


class _Recorded(nn.Module):
    """In the place of a network: returns what that returned in a call where it receives the same."""

    def __init__(self, call: Call, contract: Contract) -> None:
        super().__init__()
        self.call, self.names = call, (contract.sample, contract.time)

    def forward(self, **arguments: Any) -> Any:
        """The recorded output.

        Raises:
            UserError: The sample or its time are others than in the call.
        """
        for name in self.names:
            ours, theirs = (flattened(given)[name] for given in (arguments, self.call.arguments))
            ours, theirs = (torch.as_tensor(v if stacked(v) is None else stacked(v)) for v in (ours, theirs))
            rounding = max(torch.finfo(v.dtype).eps for v in (ours, theirs) if v.is_floating_point())
            gap = (ours.float() - theirs.float()).abs().max()
            if not gap <= max(_SAME, rounding) * max(1.0, theirs.abs().max().item()):
                raise unexplained(f"its network would receive another '{name}'", f"{ours} for {theirs}")
        return self.call.output


@torch.no_grad()
def compare(
    teacher: PredictionDenoiser,
    traces: Sequence[Trace],
    tolerance: float | None = TOLERANCES[torch.float32],
    *,
    recorded: bool = False,
) -> Conversion:
    """How far a teacher's x0 is from the pipeline's own, in all steps of traces, as a batch and one by one.

    Args:
        teacher: A teacher of :func:`load_pipeline`.
        traces: What the pipeline computed.
        tolerance: Largest acceptable difference, relative to the largest value; None: any.
        recorded: Whether the outputs of the network are those of the traces, so that all but the network is
            compared.

    Raises:
        UserError: It is larger, or no step of the pipeline shows its x0.
    """
    found: Any = teacher.pipeline
    pairs = []
    for trace in traces:
        if found.schedule.family == "flow" and trace.calls[0].x0 is None and len(trace.calls) < STEPS:
            continue  # a run that was left early does not show its levels
        for i, y, rho, conditioning in _calls(trace, levels_of(trace, found), found):
            x0, by = clean_samples(found.schedule, trace)[i], teacher
            if recorded:
                by = denoiser_around(found, _Recorded(trace.calls[i], found.contract))
            if x0 is not None:
                pairs += [(ours, x0) for ours in _predictions(by, y, rho, conditioning, single=not recorded)]
    if not pairs:
        raise UserError(
            "this pipeline does not show its clean samples, so that a teacher made of it cannot be checked",
            got=f"a {type(found.tracer.pipeline.scheduler).__name__}, prediction {found.schedule.prediction}",
            expected="a scheduler that states them, such as DDIM, DDPM, Euler and DPM-Solver, or a flow",
            fix="save the pipeline with DDIMScheduler.from_config(pipe.scheduler.config); a network that was "
            "distilled to few steps (LCM, TCD) predicts no clean samples and is no teacher",
        )
    return _conversion(pairs, tolerance)


@torch.no_grad()
def compare_networks(
    teacher: PredictionDenoiser, traces: Sequence[tuple[Trace, Sequence[float]]], tolerance: float
) -> Conversion:
    """How far a teacher's x0 is from x0 by the outputs that its network had in the pipeline.

    Args:
        teacher: A teacher whose schedule and output relation were compared already.
        traces: What the pipeline computed, and the times of its path in the steps.
        tolerance: As for :func:`compare`.

    Raises:
        UserError: It is larger.
    """
    found: Any = teacher.pipeline
    pairs = []
    for trace, times in traces:
        for i, y, rho, conditioning in _calls(trace, times, found):
            x0 = denoiser_around(found, _Recorded(trace.calls[i], found.contract))(y, rho, conditioning)
            # Some pipelines round the time to bfloat16, in steps of 4 above 512. It was compared above.
            received = flattened(trace.calls[i].arguments)[found.contract.time]
            time = torch.as_tensor(received).float().flatten()[0]
            at = copy.copy(teacher)
            at.time = lambda t, time=time: time.expand(len(t))
            pairs += [(ours, x0) for ours in _predictions(at, y, rho, conditioning)]
    return _conversion(pairs, tolerance)


def _calls(
    trace: Trace, times: Sequence[float], found: Pipeline
) -> Iterator[tuple[int, Tensor, Tensor, Conditioning]]:
    """The steps of a trace that lie on our path: sample, level and conditioning as the teacher takes them."""
    for i, (call, time) in enumerate(zip(trace.calls, times, strict=True)):
        placed = _placed(call, time, found)
        if placed is not None:
            yield i, *placed, found.fitted(found.contract.conditioning(call.arguments))


def _predictions(
    teacher: PredictionDenoiser, y: Tensor, rho: Tensor, conditioning: Conditioning, single: bool = True
) -> list[Tensor]:
    """x0 of a batch, and of its samples one by one."""
    batch: list[Tensor] = [teacher(y, rho, conditioning)]
    rows = [slice(i, i + 1) for i in range(len(y))] if single else []
    return (
        [*batch, torch.cat([teacher(y[i], rho[i], conditioning.index(i)) for i in rows])] if rows else batch
    )


def _conversion(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float | None) -> Conversion:
    """The step that differs most in relation to its own values: x0 is large where there is much noise."""
    points = sum(len(theirs) for _, theirs in pairs)
    steps = [
        Conversion((ours - theirs).abs().max().item(), theirs.abs().max().item(), points)
        for ours, theirs in pairs
    ]
    found = max(steps, key=lambda step: math.inf if math.isnan(step.relative) else step.relative)
    if tolerance is not None and not found.relative <= tolerance:
        raise UserError(
            "the teacher does not predict what the pipeline computes",
            got=str(found),
            expected=f"a relative difference below {tolerance:g}",
            fix="please report this pipeline; check=False loads it all the same",
        )
    return found


def levels_of(trace: Trace, found: Pipeline) -> list[float]:
    """The times of our path in the steps of a trace; those of a flow are measured."""
    return measured_sigmas(trace) if found.schedule.family == "flow" else [c.timestep for c in trace.calls]


def _placed(call: Call, time: float, found: Pipeline) -> tuple[Tensor, Tensor] | None:
    """What the network received as a sample of ours, and its level; None beyond the ends of the path."""
    path, value = found.schedule.path, stacked(flattened(call.arguments)[found.contract.sample])
    if path is None or value is None or not path.t_min <= time <= path.t_max:
        return None
    value = value.reshape(call.sample.shape).float()
    return value / path.alpha(time).to(value.dtype), path.rho(time).expand(len(value))
