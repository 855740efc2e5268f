"""From one point of a path to another: what the teacher predicts, and its steps between two levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distmatch.base.ranks import may_branch_on
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.methods.consistency.direct import Draws

_RHO = 7.0  # the noise levels between two are uniform in sigma^(1/7), as in Karras et al. (2022)


@torch.no_grad()
def teacher_says(teacher: Denoiser, y: Tensor, draws: Draws) -> Tensor:
    """The teacher's D at the levels and conditioning of the draws."""
    return teacher(y, draws["sigma"], draws.conditioning)


def where_needed(
    rows: Tensor, function: Callable[..., Tensor], otherwise: Tensor, *arguments: Tensor | Conditioning
) -> Tensor:
    """A function of each sample in the ``rows`` of a mask (b,), and ``otherwise`` (b, ...) in the others.

    On a CPU the function is called with those rows alone. On an accelerator, and in one of several processes,
    it sees all rows (:func:`~distmatch.base.ranks.may_branch_on`), whose values must be such as it can take.
    """
    if not may_branch_on(rows):
        return torch.where(expand(rows, otherwise), function(*arguments), otherwise)
    chosen = rows.nonzero().squeeze(1)
    if len(chosen) == len(rows):
        return function(*arguments)
    if len(chosen) == 0:
        return otherwise
    found = function(*(v.index(chosen) if isinstance(v, Conditioning) else v[chosen] for v in arguments))
    return otherwise.to(found.dtype).index_put((chosen,), found)


@torch.no_grad()
def teacher_path(
    teacher: Denoiser,
    y: Tensor,
    start: Tensor,
    end: Tensor,
    conditioning: Conditioning = UNCONDITIONAL,
    *,
    solver: Literal["euler", "heun"] = "heun",
    steps: int = 1,
) -> Tensor:
    """Solves the teacher's probability flow, each sample between its own two noise levels.

    Args:
        teacher: The teacher.
        y: Samples at ``start``, (B, *shape).
        start: Levels (B,), positive.
        end: Levels (B,), in [0, start].
        conditioning: What the samples are conditioned on.
        solver: ``euler``, or ``heun``, whose second slope is omitted in a step to sigma 0.
        steps: Number of steps.

    Returns:
        Samples at ``end``, (B, *shape).
    """

    def mean_slope(first: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The mean of a first slope and of that at ``x``."""
        return (first + (x - teacher(x, sigma, cond)) / expand(sigma, x)) / 2

    here = start
    for index in range(1, steps + 1):
        share = index / steps
        there = ((1 - share) * start ** (1 / _RHO) + share * end ** (1 / _RHO)) ** _RHO
        there = end if index == steps else there
        slope = (y - teacher(y, here, conditioning)) / expand(here, y)
        ahead = y + expand(there - here, y) * slope
        if solver == "heun":
            safe = torch.where(there > 0, there, here)
            slope = where_needed(there > 0, mean_slope, slope, slope, ahead, safe, conditioning)
            ahead = y + expand(there - here, y) * slope
        y, here = ahead, there
    return y
