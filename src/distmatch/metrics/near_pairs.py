"""Squared distances that compare with radii as in float64, from products in float32 wherever these decide.

A bound of the error of each product says which pairs are decided; the others are computed again, one by one
in float64. Where they are too many, as among repeated samples, the whole part of the matrix is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.discrepancies.kernels import squared_distances

_ROWS = 1024
_WIDE = 256
"""Coordinates from which on a product in float64 is what takes the time."""
_SPARE = 4
"""Neighbors by product beyond those asked for, so that the nearest are among them."""
_UNSURE = 1 / 64
"""Share of the pairs from which on one product in float64 is faster than these pairs alone."""
_PAIR_NUMBERS = 2**17
"""Coordinates of the pairs whose differences are held at once: they stay in the cache."""


@dataclass(frozen=True)
class Points:
    """Samples as the functions of this file take them.

    Attributes:
        given: The samples (N, D).
        center: What is subtracted before products, which then cancel less; float64 (D,).
        fast: Whether products are taken in float32.
        low: Less the center, in float32; empty if not.
        least: The smallest that the squared norms can be together with half of the error of any product.
        width: The error of products, so that a squared distance is in [product, product + width + width].
    """

    given: Tensor
    center: Tensor
    fast: bool
    low: Tensor
    least: Tensor
    width: Tensor

    def exact(self, rows: Tensor | slice) -> Tensor:
        """Some of the samples less the center, in float64."""
        return self.given[rows].double() - self.center


def points(x: Tensor, center: Tensor) -> Points:
    """Prepares samples (N, D).

    A product of D terms in float32 is off by at most D eps / 2 of the product of the norms, in any order of
    the sum, and twice that product is at most the sum of their squares. The other roundings add a few eps.
    """
    x = x.detach()
    parts = [(part.square().sum(1), part.float()) for part in (y.double() - center for y in x.split(_ROWS))]
    squares, low = (torch.cat(found) for found in zip(*parts, strict=True))
    error = (x.shape[1] / 2 + 8) * torch.finfo(torch.float32).eps * squares + 1e-36
    fast = (
        x.device.type == "cpu"  # on accelerators float32 may mean fewer digits, and float64 may be fast
        and torch.get_float32_matmul_precision() == "highest"
        and x.shape[1] >= _WIDE
        and bool(squares.amax() < 1e30)
    )
    return Points(x, center, fast, low if fast else low[:0], (squares - error).float(), (2 * error).float())


def _products(a: Points, rows: slice, b: Points, others: slice = slice(None)) -> Tensor:
    """Float32 lower bounds of squared distances (n, m)."""
    found = torch.addmm(b.least[others], a.low[rows], b.low[others].T, alpha=-2)
    return found.add_(a.least[rows, None]).clamp_min_(0)


def in_float64(a: Points, rows: Tensor | slice, b: Points) -> Tensor:
    """Squared distances (n, M) of some of ``a`` and all of ``b`` in float64, rounded to float32.

    The rounding makes equal distances compare as equal.
    """
    return squared_distances(a.exact(rows), b.exact(slice(None))).float()


def _one_by_one(a: Points, i: Tensor, b: Points, j: Tensor) -> Tensor:
    """Float64 squared distances of the pairs (i, j), zero between equal ones."""
    result = torch.empty(len(i), dtype=torch.float64)
    count = max(1, _PAIR_NUMBERS // a.given.shape[1])
    for low in range(0, len(i), count):
        part = slice(low, low + count)
        difference = a.given.index_select(0, i[part]).double()
        difference.sub_(b.given.index_select(0, j[part]))
        torch.sum(difference.square_(), 1, out=result[part])
    return result


def distances(a: Points, rows: slice, b: Points, of_a: Sequence[Tensor], of_b: Sequence[Tensor]) -> Tensor:
    """Float32 numbers (n, M) that compare with radii as the squared distances in float64 do when rounded.

    Args:
        a: Samples.
        rows: Which of them.
        b: Others.
        of_a: The least and the largest squared radius around each of ``a``, (N,) each.
        of_b: The same around each of ``b``.
    """
    if not (a.fast and b.fast):
        return in_float64(a, rows, b)
    found = _products(a, rows, b)
    (least_a, most_a), (least_b, most_b) = ([v[rows] for v in of_a], of_b)
    i, j = ((found <= most_a[:, None]) | (found <= most_b)).nonzero(as_tuple=True)
    lower = found[i, j]
    upper = lower + a.width[rows][i] + b.width[j]
    unsure = (lower <= most_a[i]) & (upper >= least_a[i]) | (lower <= most_b[j]) & (upper >= least_b[j])
    i, j = i[unsure], j[unsure]
    if len(i) > _UNSURE * found.numel():
        return in_float64(a, rows, b)
    found[i, j] = _one_by_one(a, i + rows.start, b, j).float()
    return found


class _Candidates:
    """The least lower bounds that were added for each sample, by group, and the samples they lead to."""

    def __init__(self, n: int, edges: Sequence[int], count: int) -> None:
        self.edges = edges
        self.lower = torch.full((n, len(edges) - 1, count), torch.inf)
        self.index = torch.zeros(n, len(edges) - 1, count, dtype=torch.long)

    def add(self, rows: slice, lower: Tensor, first: int) -> None:
        """Adds bounds between the samples of ``rows`` and those from ``first`` on."""
        for g, (start, stop) in enumerate(pairwise(self.edges)):
            start, stop = max(start - first, 0), min(stop - first, lower.shape[1])
            if start >= stop:
                continue
            count = min(self.lower.shape[2], stop - start)
            least, index = lower[:, start:stop].contiguous().topk(count, largest=False)
            least = torch.cat([self.lower[rows, g], least], 1)
            index = torch.cat([self.index[rows, g], index + (first + start)], 1)
            self.lower[rows, g], kept = least.topk(self.lower.shape[2], largest=False)
            self.index[rows, g] = index.gather(1, kept)


def nearest(x: Points, edges: Sequence[int], parts: Tensor, count: int) -> Tensor:
    """Float32 squared distances to the ``count`` nearest others in each replicate, (R, N, count), ascending.

    Args:
        x: Samples.
        edges: Of the groups, which are slices.
        parts: The groups of each replicate, bool (R, groups).
        count: How many; where a replicate has fewer, the last are infinite.
    """
    n = len(x.given)
    near = torch.full((n, len(edges) - 1, count + _SPARE), torch.inf, device=x.given.device)
    left = torch.ones(n, dtype=torch.bool, device=near.device)
    if x.fast:
        found = _candidates(x, edges, count + _SPARE)
        for rows in _chunks(n):
            near[rows], left[rows] = _of_candidates(x, rows, found, parts, count)
    for rows in left.nonzero()[:, 0].split(_ROWS) if bool(left.any()) else ():
        near[rows] = _of_all(x, rows, edges, count)
    return torch.stack([near[:, part].flatten(1).topk(count, largest=False).values for part in parts])


def _chunks(n: int) -> list[slice]:
    return [slice(low, min(low + _ROWS, n)) for low in range(0, n, _ROWS)]


def _candidates(x: Points, edges: Sequence[int], count: int) -> _Candidates:
    found = _Candidates(len(x.given), edges, count)
    for rows in _chunks(len(x.given)):  # itself and those after it: those before it have been added
        lower = _products(x, rows, x, slice(rows.start, None))
        lower.diagonal().fill_(torch.inf)
        found.add(rows, lower, rows.start)
        found.add(slice(rows.stop, None), lower[:, len(lower) :].T, rows.start)
    return found


def _of_candidates(
    x: Points, rows: slice, found: _Candidates, parts: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Distances to candidates by group, infinite where irrelevant, and for which rows others may count."""

    def enough(bounds: Tensor) -> Tensor:
        """What the nearest of all replicates are below."""
        return torch.stack([bounds[:, part].flatten(1).kthvalue(count).values for part in parts]).amax(0)

    lower, index = found.lower[rows], found.index[rows]
    upper = lower + x.width[rows, None, None] + x.width[index]
    relevant = (lower <= enough(upper)[:, None, None]) & lower.isfinite()
    near = torch.full_like(lower, torch.inf)
    i = rows.start + relevant.nonzero()[:, 0]
    near[relevant] = _one_by_one(x, i, x, index[relevant]).float()
    return near, (lower[:, :, -1] < enough(near)[:, None]).any(1)  # all others are as far as the last


def _of_all(x: Points, rows: Tensor, edges: Sequence[int], count: int) -> Tensor:
    """The nearest of each group for some rows in float64, and infinity where there are fewer."""
    found = in_float64(x, rows, x)
    found[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    result = torch.full((len(rows), len(edges) - 1, count + _SPARE), torch.inf, device=rows.device)
    for g, (start, stop) in enumerate(pairwise(edges)):
        some = min(count, stop - start)
        result[:, g, :some] = found[:, start:stop].topk(some, largest=False).values
    return result
