"""Log-density along a trajectory, from the scores a sampler computes anyway.

On the reverse clock the level falls from sigma to sigma', and a move dy may have any drift and noise of
variance ``noise_ratio h``, h = sigma^2 - sigma'^2. The Fokker-Planck equation and Ito's rule give

    d log q(y) = s . dy - h/2 |s|^2 - h/2 (1 - noise_ratio) div s

(Skreta et al. 2025, "The superposition of diffusion models using the Ito density estimator", for ratio 1).
The reverse SDE (ratio 1) thus needs no divergence and no further network call. The sum is exact as the steps
shrink: its error falls as the root of the step with noise, as the step without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand, require_diffused, require_score
from distmatch.diffusion.geometry.jacobian import denoise_with_trace, trace_probes
from distmatch.diffusion.priors import Prior, gaussian_prior

Level = float | Tensor


def ito_increment(
    score: Tensor,
    y_before: Tensor,
    y_after: Tensor,
    sigma_before: Level,
    sigma_after: Level,
    *,
    divergence: Tensor | None = None,
    noise_ratio: float = 1.0,
) -> Tensor:
    """The change of log q along one move of the sampler.

    Args:
        score: Score of q at ``y_before`` and ``sigma_before``, (B, *shape); with M models (M, B, *shape).
        y_before: Where the move starts, (B, *shape).
        y_after: Where it ends, the noise of the move included.
        sigma_before: Level at the start, a number or (B,).
        sigma_after: Level at the end, below it.
        divergence: div of the score, (B,) or (M, B); needed and used when ``noise_ratio`` is not 1.
        noise_ratio: Variance of the noise in the move over ``sigma_before^2 - sigma_after^2``: 1 for the
            reverse SDE whatever its drift, 0 for a deterministic sampler.

    Returns:
        Nats, float64, (B,) or (M, B).

    Raises:
        UserError: A divergence is needed and missing.
    """
    if noise_ratio != 1 and divergence is None:
        raise UserError(
            "this update needs the divergence of the score",
            got=f"noise_ratio={noise_ratio} without divergence",
            fix="pass divergence, or use a sampler with the full noise of the reverse SDE",
        )
    slope, move = score.double(), y_after.double() - y_before.double()
    dims = tuple(range(slope.ndim - move.ndim + 1, slope.ndim))
    h = (sigma_before - sigma_after) * (sigma_before + sigma_after)
    change = (slope * move).sum(dims) - 0.5 * h * slope.square().sum(dims)
    if divergence is None or noise_ratio == 1:
        return change
    return change - 0.5 * h * (1 - noise_ratio) * divergence.double()


def trajectory_log_density(
    denoiser: Denoiser,
    states: Sequence[Tensor] | Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    conditioning: ConditioningLike = None,
    noise_ratio: float = 1.0,
    prior: Prior | None = None,
    trace: str = "exact",
    seed: int = 0,
    chunk: int = 16,
) -> Tensor:
    """Log q of ``denoiser`` at every state of a trajectory, whoever made the trajectory.

    Args:
        denoiser: The model that defines the density.
        states: Positions (B, *shape) at each level, for example the ``trajectory`` of a
            :class:`~distmatch.diffusion.solvers.solve.Solution`.
        sigmas: The levels, positive and strictly decreasing. The last step of a sampler, to 0, has no place
            here: it is no move of the flow, and the data may have no density.
        conditioning: Labels (B,), -1 for none.
        noise_ratio: See :func:`ito_increment`; the same for all moves.
        prior: Log-density at the first level; by default N(0, sigma^2 + sigma_data^2).
        trace: How to take the divergence where ``noise_ratio`` is not 1: ``"exact"`` or ``"rademacher:m"``.
        seed: Seed of the probes.
        chunk: VJPs at a time.

    Returns:
        Nats, (steps + 1, B) float64.

    Raises:
        UserError: Levels do not decrease or are not as many as states, or the model has no score.
    """
    levels = [float(v) for v in sigmas]
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) != len(states) or len(levels) < 2 or not falling or not levels[-1] > 0:
        raise UserError(
            "a trajectory needs one state for each of two or more positive, decreasing levels",
            got=f"{len(states)} states and levels from {levels[:3]} to {levels[-3:]}",
            fix="remove the last state if its noise level is 0",
        )
    require_score(denoiser, "a density along a trajectory")
    require_diffused(denoiser, "a density along a trajectory")
    first = states[0]
    density = prior or gaussian_prior(levels[0] ** 2 + denoiser.sigma_data**2)
    log_q = density(first.double(), conditioning)
    probes = trace_probes(trace, first, seed=seed)
    values = [log_q]
    for i, (now, after) in enumerate(pairwise(levels)):
        y = states[i]
        level = torch.full((len(y),), now, dtype=y.dtype, device=y.device)
        divergence = None
        if noise_ratio == 1:
            with torch.no_grad():
                denoised = denoiser(y, level, conditioning)
        else:
            denoised, traces = denoise_with_trace(
                denoiser, y, level, conditioning, probes=probes, chunk=chunk
            )
            divergence = (traces.double().mean(1) - math.prod(y.shape[1:])) / now**2
        score = (denoised.double() - y.double()) / expand(level, y).double() ** 2
        log_q = log_q + ito_increment(
            score, y, states[i + 1], now, after, divergence=divergence, noise_ratio=noise_ratio
        )
        values.append(log_q)
    return torch.stack(values)
