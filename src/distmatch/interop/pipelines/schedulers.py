"""Schedulers of diffusers whose plain steps are those of a student."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distmatch.interop.optional import import_diffusers

_ABOVE = 1e-9
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")


def candidates(
    own: Any, family: str, prediction: str, times: Sequence[float], stochastic: bool
) -> Iterator[tuple[Any, float]]:
    """Schedulers that may take a student's steps, the likeliest first; which one does is seen by running it.

    Args:
        own: The scheduler of the teacher's pipeline.
        family: ``"flow"`` or ``"discrete"``, as in :class:`Schedule`.
        prediction: What the network predicts.
        times: The student's steps on the path of the teacher, decreasing.
        stochastic: Whether steps add fresh noise, or the predicted one.

    Yields:
        A scheduler, and the standard deviation of the noise that the student starts from in units of the
        noise that a pipeline with this scheduler starts from.
    """
    if family == "flow":
        for scheduler in _flows(own, list(times), stochastic):
            yield scheduler, 1.0
        return
    yield from _discrete(own, prediction, list(times), stochastic)


def _flows(own: Any, times: list[float], stochastic: bool) -> Iterator[Any]:
    """Euler's steps of a flow, with the pipeline's own levels or with fitted ones."""
    diffusers = import_diffusers()
    euler, count = diffusers.FlowMatchEulerDiscreteScheduler, int(own.config.num_train_timesteps)
    n = len(times)
    if isinstance(own, euler):  # one level cannot be stretched
        for terminal in dict.fromkeys((own.config.shift_terminal, None) if n > 1 else (None,)):
            yield euler.from_config(own.config, shift_terminal=terminal, stochastic_sampling=stochastic)
    # Pipelines divide [1, 1/n], schedulers what is above their smallest level; both shift and stretch that.
    for gap in (lambda s: 1 / n, lambda s: (1 - s / (count + s - 1)) / max(n - 1, 1)):
        shift = fitted_shift(times, gap)
        if shift is not None:
            yield euler(
                num_train_timesteps=count,
                shift=shift,
                shift_terminal=times[-1] if n > 1 else None,
                stochastic_sampling=stochastic,
            )
    # Euler's steps at times that are rounded down, where 900 must not become 899.
    times = [times[0], *(t + _ABOVE for t in times[1:])]
    shift = fitted_shift(times, lambda s: (1 - 1 / count) / n)
    if shift is not None and not stochastic:
        yield diffusers.UniPCMultistepScheduler(
            num_train_timesteps=count,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            shift_terminal=times[-1] if n > 1 else None,
            solver_order=1,
            disable_corrector=list(range(n)),
        )


def fitted_shift(times: Sequence[float], gap: Any) -> float | None:
    """The shift s with which a scheduler's levels become ``times``, from 1 down; None where there is none.

    A scheduler shifts w_i = 1 - i d to s w / (1 + (s - 1) w), and stretches the result such that its last
    level is a given one, 1 - t_i = c i d / (s - (s - 1) i d). So i / (1 - t_i) = a - b i with a = s / (c d)
    and b = (s - 1) / c, and s = a d / (a d - b).

    Args:
        times: The levels.
        gap: d as a function of s.
    """
    n, shift = len(times), 1.0
    if n < 3:
        return shift  # any shift: the last level is what it is stretched to
    first, last = 1 / (1 - times[1]), (n - 1) / (1 - times[-1])
    b = (first - last) / (n - 2)
    a = first + b
    for _ in range(50):  # d depends on s by less than 1/1000
        d = gap(shift)
        if not a * d > b:
            return None
        shift = a * d / (a * d - b)
        if not (math.isfinite(shift) and shift > 0):
            return None
    return shift


def _discrete(own: Any, prediction: str, times: list[float], stochastic: bool) -> Iterator[tuple[Any, float]]:
    """Steps at whole training times, from the one behind which the training grid is cut off."""
    diffusers = import_diffusers()
    count = round(times[0]) + 1
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    rates = own.alphas_cumprod[:count].double()
    config = {name: own.config[name] for name in _BETAS if name in own.config} | {"prediction_type": kind}
    if not _same_rates(config, rates):
        before = torch.cat([torch.ones(1, dtype=torch.float64), rates[:-1]])
        config |= {"num_train_timesteps": count, "trained_betas": (1 - rates / before).tolist()}
    start = math.sqrt(1 - float(rates[-1]))
    if stochastic:
        for steps in (count, len(times)):
            yield diffusers.LCMScheduler(**config, original_inference_steps=steps), start
        return
    yield diffusers.EulerDiscreteScheduler(**config, timestep_spacing="trailing"), 1.0
    yield diffusers.DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False), start


def _same_rates(config: dict[str, Any], rates: torch.Tensor) -> bool:
    """Whether a scheduler of this config has these noise rates."""
    if config["num_train_timesteps"] != len(rates):
        return False
    found = import_diffusers().DDIMScheduler(**config).alphas_cumprod.double()
    return bool(torch.allclose(found, rates, rtol=1e-6, atol=0))
