"""Consistency models by pairs of noise levels (CM, iCT, ECT), and the levels of trajectory models (CTM).

A consistency function D takes every point of one path of the probability flow, x_t = x0 + sigma eps at the
start, to the same clean sample. It is trained on the distance between its values at two points of a path, of
which the one at the lower level is held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.diffusion.noise import Karras

_CLOSEST = 1 - 0.999
CTM_CELL = 1 / 18
"""A cell of CTM's grid of 18 levels, as a share of the Karras distribution: what a solver step may cross."""


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """``sqrt(|a - b|^2 + c^2) - c`` of each sample: a square when small, then linear.

    Song & Dhariwal 2023 (arXiv 2310.14189). Also the loss of CTM (arXiv 2310.02279), with a and b the jumps
    of student and teacher, both continued to the data by an average of the network.

    Args:
        prediction: (B, ...), with gradient.
        target: (B, ...), detached.
        c: Where it turns, in the unit of the data: :func:`pseudo_huber_scale`; 0 is the norm.

    Returns:
        (B,), in the unit of the data: of the norm over a sample's elements, not of their mean.
    """
    square = (prediction - target).flatten(1).square().sum(dim=1)
    # The root has no derivative at 0, where its argument may be when c is 0 and a is b.
    return (square + c**2).clamp_min(torch.finfo(square.dtype).tiny).sqrt() - c


def pseudo_huber_scale(share: float, shape: Sequence[int], sigma_data: float) -> float:
    """The c of :func:`pseudo_huber` that is a share of the size of a sample (iCT takes about 1e-3).

    Args:
        share: Share of ``sigma_data sqrt(elements)``.
        shape: Of one sample.
        sigma_data: Standard deviation of the data.
    """
    return share * sigma_data * math.sqrt(math.prod(shape))


def consistency_loss(prediction: Tensor, target: Tensor, sigma: Tensor, lower: Tensor, c: float) -> Tensor:
    """``d(D(x_t, t), D(x_r, r)) / (t - r)`` with the pseudo-Huber distance d (iCT, arXiv 2310.14189).

    Consistency distillation takes x_r by a step of a solver along the teacher's flow, consistency training
    (arXiv 2303.01469) is without a teacher: x_r = x0 + r eps has the same x0 and eps.

    Args:
        prediction: D(x_t, t), (B, ...), with gradient.
        target: D(x_r, r) of the same weights, (B, ...), detached; x_r itself where r is 0.
        sigma: t, (B,).
        lower: r, (B,), below ``sigma``.
        c: As for :func:`pseudo_huber`.

    Returns:
        (B,), without unit.
    """
    return pseudo_huber(prediction, target, c) / (sigma - lower)


def ect_lower_level(sigma: Tensor, sigma_data: float, stage: int) -> Tensor:
    """The lower level of a pair: ``t - t 2^-(stage + 1) (1 + 8 sigmoid(-t))``, at least 0.

    The mapping of easy consistency tuning (Geng et al. 2024, arXiv 2406.14548) for data of standard deviation
    1/2, to which levels are scaled here. At stage 0 the low levels go all the way to the data, which is plain
    denoising, and at each further stage the two levels of a pair come closer by half.

    Args:
        sigma: The upper levels (B,).
        sigma_data: Standard deviation of the data.
        stage: Number of the stage, from 0.

    Returns:
        (B,), in [0, sigma).
    """
    t = sigma * (0.5 / sigma_data)
    share = max(2.0 ** -(stage + 1), _CLOSEST)
    return sigma * (1 - share * (1 + 8 * torch.sigmoid(-t))).clamp_min(0)


def ctm_levels(sigma: Tensor, distribution: Karras, reach: float, share: Tensor) -> tuple[Tensor, Tensor]:
    """The level s that a sample of CTM jumps to, and the level u to which the teacher takes it first.

    In the Karras distribution's own units s is uniform below t, where the lowest interval of 18 represents
    the data, as on the paper's grid, and u is as far from t as the solver steps, but not below s (arXiv
    2310.02279).

    Args:
        sigma: Levels t, (B,).
        distribution: The one whose quantiles measure distances.
        reach: How far the solver goes, in quantiles: a number of steps times :data:`CTM_CELL`.
        share: Uniform numbers in [0, 1], (B,).

    Returns:
        s and u, (B,) each, 0 <= s <= u <= t.
    """
    top = distribution.cdf(sigma)
    bottom = share * top
    middle = torch.maximum(bottom, top - reach)
    to = torch.where(bottom < CTM_CELL, torch.zeros_like(sigma), distribution.quantile(bottom))
    via = distribution.quantile(middle).clamp_max(sigma)
    return torch.minimum(to, via), via
