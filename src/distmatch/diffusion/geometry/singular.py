"""Data on a set of lower dimension have no density; the likelihood of the noised data gives the codimension.

Near a set of dimension k in R^D the density of the data noised to level s grows as s^-(D - k), so the
negative log-likelihood falls as (D - k) log s when s does (compare arXiv 2105.04046, where maximum likelihood
without noise is inconsistent on such data). A likelihood of singular data means something only with its s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.base.seeds import initial_noise


@dataclass(frozen=True)
class Ladder:
    """Negative log-likelihoods at falling noise levels.

    Attributes:
        sigmas: The levels.
        nll: Mean negative log-likelihood of the noised data at each, in nats.
        slopes: d NLL / d log sigma of each sample by least squares, (n,).
        codimension: Mean of the slopes: D minus the dimension of the data, over this range of levels.
    """

    sigmas: tuple[float, ...]
    nll: tuple[Estimate, ...]
    slopes: Tensor
    codimension: Estimate


def nll_ladder(
    log_prob: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float], *, seed: int = 0
) -> Ladder:
    """Noises ``x`` to each level, with the same noise at all, and takes the likelihood there.

    Args:
        log_prob: Positions (n, *shape) and a level to nats (n,): the log-density of the model's samples
            noised to that level, for example
            ``lambda y, s: log_likelihood(denoiser, y, sigma=s).log_prob``.
        x: Clean data, (n, *shape).
        sigmas: Two or more different positive levels.
        seed: Seed of the noise.

    Raises:
        UserError: Fewer than two levels, or levels that are not positive.
    """
    levels = [float(s) for s in sigmas]
    if len(set(levels)) < 2 or not all(0 < s < math.inf for s in levels):
        raise UserError("the fit needs two or more different positive noise levels", got=levels)
    noise = initial_noise(len(x), tuple(x.shape[1:]), seed, "ladder").to(x)
    nll = torch.stack([-log_prob(x + s * noise, s).double().cpu() for s in levels])
    t = torch.tensor(levels, dtype=torch.float64).log()
    t = t - t.mean()
    slopes = (t[:, None] * nll).sum(0) / t.square().sum()
    return Ladder(tuple(levels), tuple(mean_of(row) for row in nll), slopes, mean_of(slopes))
