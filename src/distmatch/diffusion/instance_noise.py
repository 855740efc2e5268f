"""Likelihoods of data on a low-dimensional set: with a ladder of noise, never without.

For data on a set of dimension d in D dimensions there is no density, and maximum likelihood is not
consistent: the likelihood grows without bound with the sharpness of the model. Noise of level s on the data
makes it finite. A generator is fitted, as its distribution blurred by the same s, to the blurred data, and
the generator without the noise is the estimate (Chae et al. 2021, "A likelihood approach to nonparametric
estimation of a singular distribution using deep generative models"). As s goes to 0 the mean of -log p_s goes
to minus infinity as ``(D - d) log s``, so one reports the whole ladder; its slope counts the missing
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.seeds import generator
from distmatch.diffusion.likelihood import mean_log_likelihood

LogProb = Callable[[Tensor, float], Tensor]
_CHUNK = 2**22  # distances at a time, without gradients


@dataclass(frozen=True)
class NoiseLadder:
    """Negative log-likelihoods of blurred data.

    Attributes:
        levels: Noise levels s, falling.
        nll: Mean of -log p_s(x + s e) at each, in nats.
        slopes: d nll / d log s between neighbors; tends to the codimension D - d as s falls.
    """

    levels: tuple[float, ...]
    nll: tuple[Estimate, ...]
    slopes: tuple[Estimate, ...]

    @property
    def codimension(self) -> Estimate:
        """The slope between the two smallest levels."""
        return self.slopes[-1]


def noise_ladder(log_prob: LogProb, x: Tensor, levels: Sequence[float], *, seed: int = 0) -> NoiseLadder:
    """Evaluates a model on data blurred by each of several levels; all levels share their noise.

    Args:
        log_prob: ``log_prob(y, s)``, (n,) in nats: the distribution of the model blurred by s. For a teacher,
            ``lambda y, s: log_likelihood(teacher, y, sigma=s).log_prob``; for samples of a generator,
            ``lambda y, s: blurred_log_prob(samples, y, s)``; a mixture's own ``log_prob``.
        x: Data (n, *shape).
        levels: Noise levels, positive, two or more.
        seed: Seed of the noise.

    Raises:
        UserError: Fewer than two levels, or one that is not positive.
    """
    falling = sorted({float(level) for level in levels}, reverse=True)
    if len(falling) < 2 or not all(0 < level < math.inf for level in falling):
        raise UserError(
            "a noise ladder needs two or more different noise levels above zero",
            got=list(levels),
            fix="at sigma 0 data on a low-dimensional set have no density",
        )
    noise = torch.randn(x.shape, generator=generator(seed, "instance noise"), dtype=torch.float64)
    noise = noise.to(device=x.device, dtype=x.dtype)
    values = [-log_prob(x + level * noise, level).detach().double().cpu() for level in falling]
    logs = [math.log(level) for level in falling]
    slopes = [(values[k + 1] - values[k]) / (logs[k + 1] - logs[k]) for k in range(len(falling) - 1)]
    return NoiseLadder(tuple(falling), *(tuple(map(mean_log_likelihood, rows)) for rows in (values, slopes)))


def blurred_log_prob(samples: Tensor, y: Tensor, level: float) -> Tensor:
    """Log of the mean of N(y; sample, level^2 I) over the samples of a generator, (n,) in nats.

    It is a lower bound in expectation, tight for many samples near y: an importance-weighted bound with the
    prior as proposal. It is differentiable in the samples, so that its mean over data blurred by the same
    level is an objective to train a generator with.

    Args:
        samples: G(z) for unit normal z, (m, *shape).
        y: Blurred data (n, *shape).
        level: Noise level s.

    Raises:
        UserError: The level is not positive, or the shapes differ.
    """
    check_number("the noise level", level, "(0, inf)")
    if samples.shape[1:] != y.shape[1:]:
        raise UserError("samples and data differ in shape", got=f"{samples.shape[1:]} and {y.shape[1:]}")
    flat, targets = samples.flatten(1), y.flatten(1)
    rows = len(y) if samples.requires_grad else max(1, _CHUNK // len(samples))
    parts = [
        torch.logsumexp(-0.5 * (torch.cdist(part, flat, compute_mode=_EXACT) / level) ** 2, dim=1)
        for part in targets.split(rows)
    ]
    constant = math.log(len(samples)) + flat.shape[1] * math.log(level * math.sqrt(2 * math.pi))
    return torch.cat(parts) - constant


_EXACT = "donot_use_mm_for_euclid_dist"  # products of norms would lose the small distances
