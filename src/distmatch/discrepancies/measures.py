"""Weighted samples: what the transport distances accept, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_number, check_one_each
from distmatch.base.errors import UserError
from distmatch.base.samples import checked, checked_pair, same_device

_WEIGHT_SLACK = 1e-4


@dataclass(frozen=True)
class Measures:
    """Two discrete probability measures on one space, of one dtype and device.

    Attributes:
        x: Points of the first measure (n, d), float32 or float64, with the graph of the input.
        y: Points of the second measure (m, d).
        a: Weights of ``x`` (n,) float64, summing to one.
        b: Weights of ``y`` (m,) float64, summing to one.
        uniform: Whether neither side was given weights.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    uniform: bool


def checked_weights(weights: Tensor | None, points: Tensor, what: str) -> Tensor:
    """Probabilities of the points as float64 (n,), with the graph of ``weights``.

    Args:
        weights: (n,) not negative, summing to one up to rounding; None for equal weights.
        points: The points they belong to (n, d).
        what: How the message names them.

    Raises:
        UserError: Wrong shape or device, negative, not finite, or not summing to one.
    """
    n = points.shape[0]
    if weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64, device=points.device)
    checked(weights, f"weights {what}", least=1)
    check_one_each(f"weight in {what}", weights, n)
    same_device(weights, points, (what, "its samples"))
    low, total = (float(v) for v in (weights.detach().min(), weights.detach().double().sum()))
    check_number(f"the smallest weight in {what}", low, "[0, inf)")
    if abs(total - 1) > _WEIGHT_SLACK:
        raise UserError(f"{what} must sum to one", got=f"{total:g}", fix=f"divide {what} by its sum")
    return weights.double() / total


def checked_measures(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Measures:
    """Two measures from samples and optional weights.

    Args:
        x: Samples (n, d), (n,) or (n, ...).
        y: Samples (m, d), likewise.
        a: Weights of ``x`` (n,), or None.
        b: Weights of ``y`` (m,), or None.

    Raises:
        UserError: Samples or weights that are not usable.
    """
    x, y = checked_pair(x, y, least=1)
    return Measures(
        x, y, checked_weights(a, x, "a"), checked_weights(b, y, "b"), uniform=a is None and b is None
    )
