r"""The sums that distance covariance is made of: \|x_i - x_j\|, and \|x_i - x_j\| \|y_i - y_j\|, over j.

For one-dimensional variables in O(n log n), by cumulative sums in both orders, otherwise in chunks of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.discrepancies.chunks import in_chunks, recomputed, rows_per_chunk
from distmatch.discrepancies.kernels import root, squared_distances


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (n, m), with gradient zero at zero."""
    return (x - y.T).abs() if x.shape[1] == 1 else root(squared_distances(x, y))


_LEAST_ROW, _MOST_ROW = 32, 64
_CHILDREN = 256
_CHUNKS = 8


@dataclass(frozen=True)
class ProductSums:
    """Sums over j in float64, (n,) each.

    Attributes:
        a: Distances of the first variable.
        b: Distances of the second.
        ab: Their products.
    """

    a: Tensor
    b: Tensor
    ab: Tensor


def centred(x: Tensor) -> Tensor:
    """The samples about their mean, which changes no distance and saves digits."""
    return x - x.detach().mean(0)


def product_sums(x: Tensor, y: Tensor) -> ProductSums:
    """The sums for paired samples (n, d) and (n, e), differentiable in bounded memory."""
    x, y = centred(x), centred(y)
    if x.shape[1] == 1 and y.shape[1] == 1:
        return _in_one_dimension(x.squeeze(1).double(), y.squeeze(1).double())

    def of_rows(low: int, high: int, x: Tensor, y: Tensor) -> Tensor:
        a, b = distances(x[low:high], x), distances(y[low:high], y)
        return torch.stack([a.sum(1), b.sum(1), (a * b).sum(1)]).double()

    return ProductSums(*in_chunks(of_rows, x, y))


def times_distances(x: Tensor, weights: Tensor) -> Tensor:
    """The sums over j of |x_i - x_j| w_j, (n,) in float64, without a graph."""
    with torch.no_grad():
        x = centred(x)
        if x.shape[1] > 1:
            return in_chunks(
                lambda low, high, x, w: distances(x[low:high], x) @ w, x, weights.to(x.dtype)
            ).double()
        points, order = x.squeeze(1).double().sort()
        terms = torch.stack([weights[order], weights[order] * points])
        mass, moment = 2 * terms.cumsum(1) - terms.sum(1, keepdim=True)
        return torch.empty_like(points).scatter_(0, order, points * mass - moment)


def _signed_within(size: int, key: Tensor, values: Tensor) -> Tensor:
    """The sums over j of sign(i - j) sign(key_i - key_j) values_j, among each ``size`` samples, (n, 4)."""
    before = torch.ones(size, size, dtype=key.dtype, device=key.device).tril(-1)
    order = before - before.T

    def of_groups(key: Tensor, values: Tensor) -> Tensor:
        signs = (key[:, :, None] - key[:, None]).sign_().mul_(order[: key.shape[1], : key.shape[1]])
        return (signs @ values).flatten(0, 1)

    whole = len(key) // size * size
    # An eighth of the usual chunk, so that it stays in the cache from one step to the next.
    step = rows_per_chunk(_CHUNKS * size**2, key.device)
    keys, groups = key[:whole].view(-1, size), values[:whole].view(-1, size, values.shape[1])
    sums = [recomputed(of_groups, k, v) for k, v in zip(keys.split(step), groups.split(step), strict=True)]
    if whole < len(key):
        sums.append(of_groups(key[None, whole:], values[None, whole:]))
    return torch.cat(sums)


def _signed_along(cells: Tensor, dim: int) -> Tensor:
    """The sums over the cells before less those over the cells after."""
    return cells.cumsum(dim).mul_(2).sub_(cells).sub_(cells.sum(dim, keepdim=True))


def _signed_between(values: Tensor, position: Tensor, block: int, child: int, row: int) -> Tensor:
    """The signed sums over the samples in the same block of x and another child of it, (n, 4).

    Args:
        values: One row per sample, (n, 4), block by block, in the order of y within.
        position: The place of each in the order of x, (n,).
        block: Samples of a block.
        child: Samples of a child; it divides ``block``.
        row: Samples in a row of the table of a block; it divides ``block``.
    """
    n, children = len(values), block // child
    blocks, rows = -(-n // block), -(-min(n, block) // row)
    place = torch.arange(n, device=values.device)
    column = position // child
    cell = (place // block * rows + place % block // row) * children + column % children
    table = values.new_zeros(blocks * rows * children, 4).index_add(0, cell, values)
    table = _signed_along(_signed_along(table.view(blocks, rows, children, 4), 1), 2).view(-1, 4)
    return table.index_select(0, cell) + _signed_within(row, column.to(values.dtype), values)


def _distance_sums(z: Tensor) -> Tensor:
    """The sums over j of |z_i - z_j| for sorted samples, (n,)."""
    n, up_to = len(z), z.cumsum(0)
    return z * torch.arange(2 - n, n + 2, 2, device=z.device) + up_to[-1] - 2 * up_to


def _in_one_dimension(x: Tensor, y: Tensor) -> ProductSums:
    r"""The sums for one-dimensional samples, O(n log n).

    \|dx\| \|dy\| is sign(dx) sign(dy) dx dy, and dx dy is linear in (1, x, y, xy) of j (Huo and Szekely
    2016), so it takes the sums of these four, each with the two signs. x is cut into blocks, these into
    children, and so on down to a few samples, whose signs are written out. For the pairs from different
    children of a block the samples are laid out in a table, children by rows of adjacent ranks in y, where
    cumulative sums give those of the pairs that differ in row; the signs within a row are written out. Ties
    contribute nothing either way.
    """
    n = len(x)
    x, order = x.sort()
    y = y[order]
    sorted_y, by_y = y.sort()
    rank = torch.empty_like(y).scatter_(0, by_y, torch.arange(n, dtype=y.dtype, device=y.device))
    values = torch.stack([torch.ones_like(x), x, y, x * y], 1)
    row = min(max(_LEAST_ROW, 2 * math.isqrt(n) // 3), _MOST_ROW)
    signed = _signed_within(row, rank, values)
    levels = math.ceil(math.log(max(n / row, 1), _CHILDREN))
    children = math.ceil((n / row) ** (1 / max(levels, 1)))
    for level in range(levels):
        child = row * children**level
        block = child * children
        position = by_y[(by_y // block).sort(stable=True).indices] if block < n else by_y
        between = _signed_between(values[position], position, block, child, row)
        signed = signed.index_add(0, position, between)
    count, of_x, of_y, of_xy = signed.unbind(1)
    a, products = _distance_sums(x), x * (y * count - of_y) - y * of_x + of_xy
    b = torch.zeros_like(y).index_add(0, by_y, _distance_sums(sorted_y))
    sums = torch.stack([a, b, products])
    return ProductSums(*torch.zeros_like(sums).index_add(1, order, sums))
