"""Weak-to-strong reflection (W2SD): denoise with a strong model, go back with a weak one, then step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from distmatch.base.checks import check_batch, check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, conditioning_for, for_model
from distmatch.diffusion.denoiser import Denoiser, levels_like
from distmatch.diffusion.guidance.linear import check_pair
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import NoisePath
from distmatch.diffusion.solvers.grids import checked_levels
from distmatch.diffusion.solvers.run import Solver
from distmatch.diffusion.solvers.solve import Solution, solve
from distmatch.diffusion.wrapper import CallCounter, at_step

Predict = Callable[[Tensor, float], Tensor]
"""(y, sigma) to D."""


def reflect(
    strong: Predict,
    weak: Predict,
    y: Tensor,
    now: float,
    after: float,
    *,
    sigma_data: float,
    weak_level: float | None = None,
) -> Tensor:
    """The state at level ``now`` after a step down with the strong and a step up with the weak model.

    Both are DDIM (Euler) steps, so the result is ``y + (now - after) (eps_weak - eps_strong)``, to first
    order ``y + now (now - after) (score_strong - score_weak)``.

    The weak model sees a state of level ``after`` and is called at ``weak_level``. The authors do so with
    latents of unit variance on a variance-preserving path, where a state of any level has the same size. In
    this frame the state is scaled to that of ``weak_level``, by
    ``sqrt((weak_level^2 + sigma_data^2) / (after^2 + sigma_data^2))``: without it a model at a higher level
    than its input takes nearly all of the input for noise.

    Args:
        strong: The strong model.
        weak: The weak model.
        y: State (B, *shape).
        now: Its level.
        after: Level to go to and come back from.
        sigma_data: Standard deviation of the data (1 for the authors' latents).
        weak_level: The level at which the weak model is called; ``now`` where it is None, as the authors have
            it. ``after`` is the true level of what it sees.
    """
    level = now if weak_level is None else weak_level
    ahead = y + (after - now) / now * (y - strong(y, now))
    seen = ahead * (math.hypot(level, sigma_data) / math.hypot(after, sigma_data))
    return ahead + (now - after) / level * (seen - weak(seen, level))


@torch.no_grad()
def solve_reflected(
    strong: Denoiser,
    weak: Denoiser,
    y: Tensor,
    grid: Tensor | Sequence[float],
    solver: str | Solver = "ddim",
    *,
    conditioning: ConditioningLike = None,
    noise: SampleNoise | None = None,
    path: NoisePath | str | None = None,
    trajectory: bool = False,
    weak_at: Literal["start", "end"] = "start",
) -> Solution:
    """A solve in which each step but the last starts from the reflected state (Bai et al. 2025, W2SD).

    On a fine grid it is autoguidance of scale 2, the extrapolation ``2 D_strong - D_weak``, at three calls
    per step for two. Guided denoisers of two scales are a pair too.

    Args:
        strong: The strong model, which makes the steps.
        weak: The weak one, of the same samples.
        y: State at level ``grid[0]``, (B, *shape).
        grid: Strictly decreasing levels; the last may be 0.
        solver: Solver of the steps. Its memory, if it has one, is of reflected states.
        conditioning: Labels (B,), -1 for none; the weak model receives them too if it has classes.
        noise: The noise of stochastic solvers.
        path: As for :func:`~distmatch.diffusion.solvers.solve`.
        trajectory: Keep the states, each but the first and the last as it was reflected.
        weak_at: At which level of a step the weak model is called: the one that the step starts from, as in
            the authors' code, with the state scaled to it (:func:`reflect`), or the one it ends at, which is
            that of the state.

    Returns:
        The end and its cost; calls of both models count.

    Raises:
        UserError: Models that do not fit together, an increasing grid, or what a solve refuses.
    """
    check_pair(strong, weak)
    check_name("noise level for the weak model", weak_at, ("start", "end"))
    levels = checked_levels(grid, stochastic=False)
    if levels[0] < levels[-1]:
        raise UserError("a reflection goes from noise to samples", got="an increasing grid", fix="reverse it")
    check_batch("the samples at the start of a solve", y, strong.shape)
    conditioning = conditioning_for(strong, conditioning, len(y))
    counted = [CallCounter(strong), CallCounter(weak)]
    conditionings = [conditioning, for_model(weak, conditioning)]

    def reflected(k: int, state: Tensor) -> Tensor:
        now, after = levels[k], levels[k + 1]
        models = [_predictor(m, c, y.dtype, now, after) for m, c in zip(counted, conditionings, strict=True)]
        level = now if weak_at == "start" else after
        return reflect(models[0], models[1], state, now, after, weak_level=level, sigma_data=weak.sigma_data)

    last = len(levels) - 2

    def on_step(k: int, state: Tensor) -> Tensor | None:
        return reflected(k + 1, state) if k + 1 < last else None

    work = torch.float32 if y.device.type == "mps" else torch.float64
    start = reflected(0, y.to(work)).to(y.dtype) if last > 0 else y
    done = solve(
        counted[0], start, levels, solver,
        conditioning=conditioning, noise=noise, path=path, trajectory=trajectory, on_step=on_step,
    )  # fmt: skip
    states = done.trajectory
    if states is not None:
        states = torch.cat([y[None], states[1:]])
    return Solution(done.y, sum(counter.calls for counter in counted), states)


def _predictor(
    model: Denoiser, conditioning: ConditioningLike, dtype: torch.dtype, now: float, after: float
) -> Predict:
    """The model in one step, called with a level for the whole batch, in the dtype of the state."""
    chosen = at_step(model, now, after)

    def predict(y: Tensor, level: float) -> Tensor:
        return chosen(y.to(dtype), levels_like(y, level, dtype), conditioning).to(y.dtype)

    return predict
