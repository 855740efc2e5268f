"""The steps of a student: from one noise level to the next, and which noise levels they are."""

from __future__ import annotations

from typing import Literal

import torch

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
