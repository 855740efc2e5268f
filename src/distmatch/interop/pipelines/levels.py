"""The noise levels of a traced pipeline: what its scheduler says, and what its steps show."""

from __future__ import annotations

import enum
import inspect
import math
import typing
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.paths import condot
from distmatch.interop.diffusers_schedule import FLOW, SCHEDULERS, Schedule, discrete_schedule, read_schedule
from distmatch.interop.optional import import_diffusers
from distmatch.interop.pipelines.contract import TimeMap
from distmatch.interop.pipelines.trace import Call, Trace

# How near to pure noise a flow is followed. Its own schedulers begin at t = 1, which is this in float32;
# others begin at 1 - 1e-6, and round the time that belongs to it down.
_END, _OTHER_END = 1e-8, 1e-6
_FLOW, _RATES = "flow matching", "noise rates of DDPM"  # the two kinds of schedulers
_EXACT = 1e-4  # relative, of a step that is fitted


def schedule_of(pipeline: Any) -> Schedule:
    """What the scheduler of a pipeline says about its network; the check tells whether it is true.

    Raises:
        UserError: A scheduler that is not understood, or one of another kind than the pipeline's class takes.
    """
    scheduler, kinds = pipeline.scheduler, _kinds_taken(type(pipeline))
    found = _said_by(scheduler)
    seen = _FLOW if found.family == "flow" else _RATES
    if kinds and seen not in kinds:
        flows = "FlowMatchEulerDiscreteScheduler, or use_flow_sigmas with prediction_type flow_prediction"
        raise UserError(
            f"the scheduler in this folder is not one for the network of a {type(pipeline).__name__}",
            got=f"{type(scheduler).__name__}, which is for {seen} and predicts {found.prediction}",
            expected=f"{_FLOW}: {flows}" if _FLOW in kinds else f"{_RATES}: for example DDIMScheduler",
            fix="copy scheduler/ again from where the weights were published",
        )
    return found


def _said_by(scheduler: Any) -> Schedule:
    config, name = scheduler.config, type(scheduler).__name__
    if name in FLOW or _is_flow(name, config):
        if config.get("invert_sigmas"):
            raise UserError("schedulers with invert_sigmas are not read", fix="use dm.as_denoiser")
        steps = float(config.num_train_timesteps)
        end = _END if name in FLOW else _OTHER_END
        return Schedule("flow", condot(t_min=1 / steps, t_max=1 - end), "flow")
    known = name in SCHEDULERS or getattr(scheduler, "alphas_cumprod", None) is None
    found = read_schedule(scheduler) if known else discrete_schedule(scheduler, config)
    if found.path is None:
        raise UserError(
            "pipelines with networks of EDM's kind are not read by tracing",
            got=name,
            fix="load the network with load_diffusers, or wrap it with dm.as_denoiser",
        )
    return found


def _is_flow(name: str, config: Any) -> bool:
    """Whether a scheduler of several kinds is one of flow matching."""
    levels, kind = bool(config.get("use_flow_sigmas")), config.get("prediction_type")
    if levels != (kind == "flow_prediction"):
        raise UserError(
            f"the options of this {name} contradict each other",
            got=f"use_flow_sigmas {levels} with prediction_type {kind}",
            expected="use_flow_sigmas with prediction_type flow_prediction, or neither",
            fix="check scheduler_config.json against that of the published weights",
        )
    return levels


def _kinds_taken(pipeline: type) -> set[str]:
    """The kinds of schedulers that the constructor of a pipeline names; none where it names another thing."""
    parameter = inspect.signature(pipeline).parameters.get("scheduler")
    named = () if parameter is None else typing.get_args(parameter.annotation) or (parameter.annotation,)
    kinds: set[str] = set()
    for kind in named:
        # KarrasDiffusionSchedulers lists classes by name.
        names = list(kind.__members__) if isinstance(kind, enum.EnumMeta) else [getattr(kind, "__name__", "")]
        for name in names:
            found = getattr(import_diffusers(), name, None)
            if found is None or found is import_diffusers().SchedulerMixin:
                return set()
            kinds |= {_FLOW} if name in FLOW else {_RATES}
            kinds |= {_FLOW} if "use_flow_sigmas" in inspect.signature(found).parameters else set()
    return kinds


def shift_of(scheduler: Any, trace: Trace) -> float | None:
    """The shift s of a flow's noise levels, t' = s t / (1 + (s - 1) t); None for a scheduler without."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        linear = config.get("time_shift_type") == "linear"
        return trace.mu if trace.mu is None or linear else math.exp(trace.mu)
    return config.get("flow_shift", config.get("shift"))


def measured_sigmas(trace: Trace) -> list[float]:
    """The noise levels sigma = t of a flow's run from its steps alone, whatever its scheduler says.

    Where the scheduler states x0, x0 = x - sigma v. Otherwise its steps are x' - x = (sigma' - sigma) v, and
    the last of them leads to 0.

    Raises:
        UserError: The steps are not of that form.
    """
    if all(call.x0 is not None for call in trace.calls):
        return [
            _factor(call.sample - call.x0, call.model_output) for call in trace.calls if call.x0 is not None
        ]
    moves = [_factor(call.sample - call.previous, call.model_output) for call in trace.calls]
    return [math.fsum(moves[i:]) for i in range(len(moves))]


def _factor(left: Tensor, right: Tensor) -> float:
    """The number c with left = c right."""
    a, b = left.double().flatten(), right.double().flatten()
    c = float(a @ b / (b @ b).clamp_min(1e-30))
    gap = float((a - c * b).norm() / a.norm().clamp_min(1e-30))
    if not gap <= _EXACT:
        raise UserError(
            "the steps of this pipeline's scheduler are not those of a straight flow",
            got=f"a step that is not proportional to the velocity (relative distance {gap:.1e})",
            expected="a scheduler whose steps are Euler's, or one that states clean samples",
            fix="save the pipeline with FlowMatchEulerDiscreteScheduler, without stochastic sampling",
        )
    return c


def time_map(scale: float, offset: float, schedule: Schedule, scheduler: Any, trace: Trace) -> TimeMap:
    """The network's time as a function of the time of our path.

    Raises:
        UserError: The scheduler's times are not those of its noise levels.
    """
    if schedule.family != "flow":
        return TimeMap(scale, offset)
    factor = float(scheduler.config.num_train_timesteps)
    taus, sigmas = [call.timestep for call in trace.calls], measured_sigmas(trace)
    gaps = [factor * sigma - tau for sigma, tau in zip(sigmas, taus, strict=True)]
    slack = 1e-4 * factor
    if max(map(abs, gaps)) <= slack:
        return TimeMap(scale, offset, factor)
    if all(-slack <= gap < 1 + slack for gap in gaps) and all(tau == round(tau) for tau in taus):
        return TimeMap(scale, offset, factor, whole=True)
    # t = s u / (1 + (s - 1) u), where u = tau / factor: s is the same in all steps but a first one at t = 1.
    pairs = [(sigma, tau / factor) for sigma, tau in zip(sigmas, taus, strict=True) if 0 < tau < factor]
    shifts = [t * (1 - u) / (u * (1 - t)) for t, u in pairs if t < 1 - slack / factor]
    if shifts and max(shifts) - min(shifts) <= 1e-3 * abs(shifts[0]) and shifts[0] > 0:
        return TimeMap(scale, offset, factor, shift=sum(shifts) / len(shifts))
    raise UserError(
        "the times of this pipeline's scheduler are not those of its noise levels",
        got=f"times {taus} at levels {[round(sigma, 5) for sigma in sigmas]}",
        expected=f"{factor:g} times the level, or that rounded down",
        fix="wrap the network yourself: dm.as_denoiser(net, 'condot', 'flow', time=..., ...)",
    )


def clean_samples(schedule: Schedule, trace: Trace) -> list[Tensor | None]:
    """x0 in each step as the pipeline itself has it, (B, *shape) each; None where it does not show.

    It is what the scheduler states; for a flow x - sigma v with the measured levels; and for a first step
    x' = a x + b eps of a variance-preserving sampler that states nothing, (x - s eps) / sqrt(1 - s^2) with
    the s that follows from a and b.
    """
    if schedule.family == "flow":
        sigmas = measured_sigmas(trace)
        return [
            call.x0 if call.x0 is not None else call.sample - sigma * call.model_output
            for call, sigma in zip(trace.calls, sigmas, strict=True)
        ]
    return [
        call.x0 if call.x0 is not None else _from_first_step(call, schedule) if i == 0 else None
        for i, call in enumerate(trace.calls)
    ]


def _from_first_step(call: Call, schedule: Schedule) -> Tensor | None:
    """x0 from a step of DDIM that is all that is known: alpha' and sigma' belong to one level as well."""
    if schedule.prediction != "eps":
        return None
    x, eps, moved = (v.double().flatten() for v in (call.sample, call.model_output, call.previous))
    a, b = torch.linalg.lstsq(torch.stack([x, eps], 1), moved[:, None]).solution.flatten().tolist()
    if float((a * x + b * eps - moved).norm() / moved.norm()) > _EXACT or a * b == 0:
        return None
    s = (1 - a * a - b * b) / (2 * a * b)
    if not 0 < s < 1:
        return None
    return (call.sample - s * call.model_output) / math.sqrt(1 - s * s)
