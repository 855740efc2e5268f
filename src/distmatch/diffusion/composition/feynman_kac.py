"""Annealed, multiplied, guided and rewarded models, sampled as they are and not as their scores suggest.

The target at level sigma is p = prod_i q_i^beta_i exp(b r), with q_i the noised densities of the models. The
SDE that follows its score does not have p as its marginals, and plain guidance is an example. Weights make up
for it (Skreta et al. 2025, "Feynman-Kac correctors in diffusion"). In this frame, for a step from s to s'
with h = s^2 - s'^2, S = sum_i beta_i s_i and G = b grad r,

    dy      = h ((1 + zeta^2) / 2 S + zeta^2 / 2 G) + zeta sqrt(h) z
    d log w = h / 2 (|S|^2 - sum_i beta_i |s_i|^2 + S . G) + (b' - b) r

for any noise scale zeta >= 0. It follows from d log q_i = -h / 2 (div s_i + |s_i|^2): the drift is what makes
all divergences cancel. zeta = 1 is the paper's target score, and zeta = beta^(-1/2) for one annealed model
its tempered noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.checks import check_number, check_one_each
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.diffusion.composition.models import Models
from distmatch.diffusion.composition.resampling import (
    effective_sample_size,
    log_mean_exp,
    systematic_indices,
)
from distmatch.diffusion.composition.targets import Target, annealed_prior, reward_and_slope, strengths
from distmatch.diffusion.noise_streams import SampleNoise


@dataclass(frozen=True)
class Particles:
    """Weighted samples of a target.

    Attributes:
        y: States at the last level, (B, *shape), in the dtype of the start.
        log_w: Their log weights since the last resampling, (P, B / P) float64 for P populations.
        log_normalizer: Estimate of log (Z_end / Z_start), Z the integral of the target without its
            normalizer, (P,) nats.
        ess: Effective sample size after each step, as a share of the population, before resampling,
            (steps, P).
        ancestors: Number within its population of the start that each particle comes from, (P, B / P).
        calls: Network calls for each sample, of all models together.
    """

    y: Tensor
    log_w: Tensor
    log_normalizer: Tensor
    ess: Tensor
    ancestors: Tensor
    calls: int

    @property
    def weights(self) -> Tensor:
        """Normalized weights, (B,), summing to 1 in each population."""
        return self.log_w.softmax(-1).flatten()

    def resampled(self, seed: int = 0) -> Tensor:
        """Equally weighted samples (B, *shape): the particles, resampled once more."""
        populations, k = self.log_w.shape
        u = torch.rand(populations, generator=generator(seed, "last resampling"), dtype=torch.float64)
        return self.y[_slots(systematic_indices(self.log_w, u.to(self.log_w.device)), k)]


@torch.no_grad()
def feynman_kac(
    target: Target,
    grid: Tensor | Sequence[float],
    noise: SampleNoise,
    *,
    start: Tensor | None = None,
    log_w: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    noise_scale: float = 1.0,
    resample_below: float = 0.5,
    populations: int = 1,
    clamp: float | None = None,
) -> Particles:
    """Samples a target by weighted particles.

    The noise belongs to the slot that a particle is in, so copies part at the next step.

    Args:
        target: What to sample.
        grid: Decreasing levels, the last above 0.
        noise: Noise of the B particles.
        start: Particles at ``grid[0]``, (B, *shape), drawn from the target there; by default from
            :func:`annealed_prior`. A start N(0, sigma^2) for an annealed model would be the wrong
            distribution.
        log_w: Log weights (B,) of the start, where it comes from another distribution.
        dtype: In which the models are called where there is no ``start``.
        noise_scale: zeta: noise in units of the reverse SDE's. The weights are those of exactly this SDE.
        resample_below: Resample where the effective sample size falls below this share; 0 never, 1 always
            where the weights differ.
        populations: Number of independent populations of equal size that the batch is made of.
        clamp: Cut the weight of each step, less its mean, to [-clamp, clamp] nats. That lowers the spread of
            the weights and makes the result wrong; None leaves them exact.

    Returns:
        The particles.

    Raises:
        UserError: Models, grid, start and options do not go together.
    """
    models = Models(target.denoisers, target.conditions, "a Feynman-Kac corrector")
    levels = models.levels(grid, to_zero=False)
    y = annealed_prior(target, levels[0], noise).to(dtype) if start is None else start
    models.check_batch(y, noise)
    _check_options(len(y), log_w, noise_scale, resample_below, populations, clamp)
    shape, device = (populations, len(y) // populations), y.device
    weights = torch.zeros(shape, dtype=torch.float64, device=device)
    if log_w is not None:
        weights = log_w.double().reshape(shape)
    powers = torch.tensor(target.powers, dtype=torch.float64, device=device)
    pulls = strengths(target, levels)
    draws = torch.rand(
        populations, len(levels), generator=generator(noise.seed, "resampling"), dtype=torch.float64
    ).to(device)
    log_normalizer = torch.zeros(populations, dtype=torch.float64, device=device)
    own = torch.arange(shape[1], device=device).expand(shape)
    ancestors, history = own, []
    state = y.double()
    for k, (now, after) in enumerate(pairwise(levels)):
        h = (now - after) * (now + after)
        scores = models.scores(state, now, y.dtype)
        total = torch.einsum("m,mb...->b...", powers, scores)
        change = (
            0.5 * h * (_squared(total) - powers @ _squared(scores.flatten(0, 1)).reshape(len(powers), -1))
        )
        drift = 0.5 * (1 + noise_scale**2) * total
        if target.reward is not None:
            value, slope = reward_and_slope(target.reward, state.to(y.dtype))
            pull = pulls[k] * slope
            drift = drift + 0.5 * noise_scale**2 * pull
            change = change + 0.5 * h * (total * pull).flatten(1).sum(1)
            change = change + (pulls[k + 1] - pulls[k]) * value
        change = change.reshape(shape)
        if clamp is not None:
            center = change.mean(-1, keepdim=True)
            change = center + (change - center).clamp(-clamp, clamp)
        state = state + h * drift
        if noise_scale > 0:
            state = state + noise_scale * math.sqrt(h) * noise.normal(k).double()
        weights = weights + change
        share = effective_sample_size(weights) / shape[1]
        history.append(share)
        chosen = share[:, None] < resample_below
        slots = torch.where(chosen, systematic_indices(weights, draws[:, k]), own)
        gained = log_mean_exp(weights)
        log_normalizer = log_normalizer + torch.where(chosen[:, 0], gained, 0)
        weights = torch.where(chosen, 0, weights)
        state = state[_slots(slots, shape[1])]
        ancestors = ancestors.gather(1, slots)
    return Particles(
        state.to(y.dtype),
        weights,
        log_normalizer + log_mean_exp(weights),
        torch.stack(history),
        ancestors,
        models.calls,
    )


def _slots(indices: Tensor, size: int) -> Tensor:
    """Indices within populations (P, K) as indices into the batch, (B,)."""
    first = size * torch.arange(len(indices), device=indices.device)
    return (indices + first[:, None]).flatten()


def _squared(rows: Tensor) -> Tensor:
    return rows.flatten(1).square().sum(1)


def _check_options(
    n: int,
    log_w: Tensor | None,
    noise_scale: float,
    resample_below: float,
    populations: int,
    clamp: float | None,
) -> None:
    if populations < 1 or n % populations:
        raise UserError("the batch must divide into the populations", got=f"{n} into {populations}")
    if log_w is not None:
        check_one_each("log weight", log_w, n)
    check_number("the noise scale", noise_scale, "[0, inf)")
    check_number(
        "resample_below", resample_below, "[0, 1]", fix="it is a share of the particles: 0 is never, 1 always"
    )
    if clamp is not None:
        check_number("a clamp", clamp, "(0, inf]", fix="None keeps the weights exact")
