"""The steps of a student: from one noise level to the next, and which noise levels they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.utils._mode_utils import no_dispatch

from distmatch.base.errors import UserError
from distmatch.diffusion.noise import Karras

Sampler = Literal["stochastic", "ddim", "posterior", "gamma"]
"""How a student of several steps gets to its next noise level: ``stochastic`` adds fresh noise to the clean
estimate (multistep sampling of consistency models), ``ddim`` adds the noise that it predicts, ``posterior``
draws from q(x_s | x_t, x0), ``gamma`` is the gamma-sampling of CTM, which takes a network of two levels."""


def sampler_weights(sampler: Sampler, now: float, after: float, gamma: float = 0.0) -> tuple[float, float]:
    """The weights (kept, fresh) of a step ``x0 + kept (x - x0) + fresh eps`` from level ``now`` to ``after``.

    Each leaves noise of level ``after`` on ``x0`` where ``x - x0`` is noise of level ``now``.
    ``posterior`` is q(x_s | x_t, x0) of the diffusion itself, as in multi-step moment matching (Salimans et
    al. 2024, arXiv 2406.04103). ``gamma`` is the gamma-sampling of CTM (Kim et al. 2024, arXiv 2310.02279):
    to the level sqrt(1 - gamma^2) s, for which the network gives x0, and fresh noise up to s. With gamma = 0
    it follows the path, with gamma = 1 it is ``stochastic``.
    """
    if sampler == "stochastic":
        return 0.0, after
    ratio = after / now
    if sampler == "gamma":
        return (1 - gamma**2) ** 0.5 * ratio, gamma * after
    if sampler == "ddim":
        return ratio, 0.0
    return ratio**2, after * (1 - ratio**2) ** 0.5


def student_sigmas(num_steps: int, sigma: float, sigma_data: float) -> tuple[float, ...]:
    """Noise levels that a student of ``num_steps`` steps is evaluated at, from ``sigma`` down.

    They are equally spaced in the Karras parameter above EDM's smallest level, 0.002 for data of standard
    deviation 1/2, like the time steps 999, 749, 499, 249 of DMD2.

    Args:
        num_steps: Network calls.
        sigma: The first level.
        sigma_data: Standard deviation of the data.
    """
    if num_steps == 1:
        return (sigma,)
    share = torch.arange(num_steps - 1, 0, -1, dtype=torch.float64) / num_steps
    return (sigma, *Karras(0.004 * sigma_data, sigma).quantile(share).tolist())


def sigmas_at(teacher: Any, times: Sequence[float]) -> tuple[float, ...]:
    """The noise levels at times of a teacher's path, up to its largest; without a path times are levels.

    Args:
        teacher: The teacher.
        times: Decreasing times, larger with more noise.

    Raises:
        UserError: They do not decrease, or lie outside of the path.
    """
    path = getattr(teacher, "path", None)
    low, high = (teacher.sigma_min, teacher.sigma_max) if path is None else (path.t_min, path.t_max)
    end = 1.0 if path is not None and high <= 1 else high  # pure noise, which its path may only come near to
    falling = all(map(math.isfinite, times)) and all(a > b for a, b in pairwise(times))
    if not (falling and low < times[-1] and times[0] <= end):
        raise UserError(
            "--student-times are decreasing times on the noise path of the teacher",
            got=" ".join(f"{time:g}" for time in times),
            expected=f"each below the one before, from {end:g} down, all above {low:g}"
            + ("; this teacher has no path, and they are its noise levels" if path is None else ""),
            fix="--num-steps N takes those of the teacher's own sampler",
        )
    with no_dispatch():  # numbers, even where tensors are fake
        t = torch.as_tensor(list(times), dtype=torch.float64)
        levels = t if path is None else path.rho(t.clamp(max=high))
        found: tuple[float, ...] = tuple(levels.clamp(max=teacher.sigma_max).tolist())
    return found
