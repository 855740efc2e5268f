"""Gaussian kernels around samples of p: what uLSIF, RuLSIF and KLIEP build a ratio from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.discrepancies.kernels import squared_distances
from distmatch.ratio.samples import CHUNK

_WIDTHS = (0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0)  # in units of the median distance
_MEDIAN_OF = 1000  # points


def log_kernel(x: Tensor, centers: Tensor, width: float) -> Tensor:
    """Log of the unnormalized Gaussian kernels, (N, b)."""
    return squared_distances(x, centers) * (-0.5 / width**2)


def choose_centers(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most ``count`` samples of p, drawn without replacement."""
    check_count("the number of centers", count)
    return p[torch.randperm(len(p), generator=generator)[:count].to(p.device)]


def candidate_widths(widths: Sequence[float] | None, p: Tensor, q: Tensor) -> list[float]:
    """The widths to choose from: the given ones, or multiples of the median distance within both samples.

    Given widths are in the unit of standardized samples.

    Raises:
        UserError: A given width is not a positive number, or there is none.
    """
    if widths is not None:
        return positive(widths, "width")
    pooled = torch.cat([p[:_MEDIAN_OF], q[:_MEDIAN_OF]])
    distances = squared_distances(pooled, pooled, own=0).flatten()
    median = math.sqrt(distances[distances > 0].median().item())
    return [median * factor for factor in _WIDTHS]


def positive(values: Sequence[float], name: str) -> list[float]:
    """The values as floats.

    Raises:
        UserError: One is not a positive finite number, or there is none.
    """
    found = [float(v) for v in values]
    if not found or not all(math.isfinite(v) and v > 0 for v in found):
        raise UserError(
            f"every {name} must be a positive number", got=found, expected="for example [0.5, 1.0]"
        )
    return found


def second_moment(x: Tensor, centers: Tensor, width: float) -> Tensor:
    """Mean of phi phi^T over ``x``, (b, b)."""
    total = torch.zeros(len(centers), len(centers), dtype=x.dtype, device=x.device)
    for part in x.split(CHUNK):
        phi = log_kernel(part, centers, width).exp()
        total += phi.T @ phi
    return total / len(x)


def first_moment(x: Tensor, centers: Tensor, width: float) -> Tensor:
    """Mean of phi over ``x``, (b,)."""
    parts = [log_kernel(part, centers, width).exp().sum(0) for part in x.split(CHUNK)]
    return torch.stack(parts).sum(0) / len(x)
