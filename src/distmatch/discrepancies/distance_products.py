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


def distances(x: Tensor, y: Tensor, own: int | None = None) -> Tensor:
    """Euclidean distances (n, m), with gradient zero at zero; ``own`` as for :func:`squared_distances`."""
    return (x - y.T).abs() if x.shape[1] == 1 else root(squared_distances(x, y, own=own))


_LEAST_ROW, _MOST_ROW = 32, 64
_CHILDREN = 256
_CHUNKS = 16


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


def centered(x: Tensor) -> Tensor:
    """The samples in float64 about their mean.

    Distance covariance is a small difference of large sums: with one outlier, the cancellation exceeds the
        digits of float32.
    """
    x = x.double()
    return x - x.detach().mean(0)


def product_sums(x: Tensor, y: Tensor, in_order: bool = True) -> ProductSums:
    """The sums for paired samples (n, d) and (n, e), differentiable in bounded memory.

    Args:
        x: Samples (n, d).
        y: Samples (n, e).
        in_order: The sums come in the order of the samples; otherwise in any, the same for all three.
    """
    x, y = centered(x), centered(y)
    if x.shape[1] == 1 and y.shape[1] == 1:
        sums, order = _in_one_dimension(x.squeeze(1), y.squeeze(1))
        return ProductSums(*(torch.zeros_like(sums).index_add(1, order, sums) if in_order else sums))

    def of_rows(low: int, high: int, x: Tensor, y: Tensor) -> Tensor:
        a, b = distances(x[low:high], x, low), distances(y[low:high], y, low)
        return torch.stack([a.sum(1), b.sum(1), (a * b).sum(1)])

    return ProductSums(*in_chunks(of_rows, x, y))


def times_distances(x: Tensor, weights: Tensor) -> Tensor:
    """The sums over j of |x_i - x_j| w_j, (n,) in float64, without a graph."""
    with torch.no_grad():
        x = centered(x)
        if x.shape[1] > 1:
            return in_chunks(lambda low, high, x, w: distances(x[low:high], x, low) @ w, x, weights)
        points, order = x.squeeze(1).sort()
        terms = torch.stack([weights[order], weights[order] * points])
        mass, moment = 2 * terms.cumsum(1) - terms.sum(1, keepdim=True)
        return torch.empty_like(points).scatter_(0, order, points * mass - moment)


def _signed_within(order: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """The sums over j of sign(i - j) sign(key_i - key_j) values_j, in groups of consecutive samples, (n, 4).

    Args:
        order: sign(i - j), as large as a group.
        key: What the other sign is of, (n,).
        values: The four, (n, 4).
    """
    size = len(order)

    def of_groups(key: Tensor, values: Tensor) -> Tensor:
        signs = (key[:, :, None] - key[:, None]).sign_().mul_(order[: key.shape[1], : key.shape[1]])
        return (signs @ values).flatten(0, 1)

    whole = len(key) // size * size
    # A sixteenth of the usual chunk, so that it stays in the cache from one step to the next.
    step = rows_per_chunk(_CHUNKS * size**2, key.device)
    keys, groups = key[:whole].view(-1, size), values[:whole].view(-1, size, values.shape[1])
    sums = [recomputed(of_groups, k, v) for k, v in zip(keys.split(step), groups.split(step), strict=True)]
    if whole < len(key):
        sums.append(of_groups(key[None, whole:], values[None, whole:]))
    return torch.cat(sums)


def _signed_along(cells: Tensor, dim: int) -> Tensor:
    """The sums over the cells before less those over the cells after."""
    return cells.cumsum(dim).mul_(2).sub_(cells).sub_(cells.sum(dim, keepdim=True))


def _signed_between(values: Tensor, position: Tensor, block: int, child: int, order: Tensor) -> Tensor:
    """The signed sums over the samples in the same block of x and another child of it, (n, 4).

    Args:
        values: One row per sample, (n, 4), block by block, in the order of y within.
        position: The place of each in the order of x, (n,).
        block: Samples of a block.
        child: Samples of a child; it divides ``block``.
        order: As in :func:`_signed_within`, as large as a row of the table of a block; a row divides it.
    """
    n, row, children = len(values), len(order), block // child
    rows, blocks = block // row, -(-n // block)
    column = position // child
    cell = torch.arange(n, device=values.device) // row * children + column % children
    table = values.new_zeros(blocks * rows * children, 4).index_add(0, cell, values)
    table = _signed_along(_signed_along(table.view(blocks, rows, children, 4), 1), 2).view(-1, 4)
    return table.index_select(0, cell) + _signed_within(order, column.to(values.dtype), values)


def _distance_sums(z: Tensor) -> Tensor:
    """The sums over j of |z_i - z_j| for sorted samples, (n,)."""
    n, up_to = len(z), z.cumsum(0)
    return z * torch.arange(2 - n, n + 2, 2, device=z.device) + up_to[-1] - 2 * up_to


def _in_one_dimension(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""The three sums for one-dimensional samples in the order of x, (3, n), and that order; O(n log n).

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
    rank = torch.empty_like(by_y).scatter_(0, by_y, torch.arange(n, device=y.device))
    values = torch.stack([torch.ones_like(x), x, y, x * y], 1)
    row = min(max(_LEAST_ROW, 2 * math.isqrt(n) // 3), _MOST_ROW)
    before = torch.ones(row, row, dtype=y.dtype, device=y.device).tril(-1)
    signs = before - before.T
    signed = _signed_within(signs, rank.to(y.dtype), values)
    levels = math.ceil(math.log(max(n / row, 1), _CHILDREN))
    children = math.ceil((n / row) ** (1 / max(levels, 1)))
    for level in range(levels):
        child = row * children**level
        block = child * children
        position = by_y[(by_y // block).sort(stable=True).indices] if block < n else by_y
        between = _signed_between(values[position], position, block, child, signs)
        signed = signed.index_add(0, position, between)
    count, of_x, of_y, of_xy = signed.unbind(1)
    products = x * (y * count - of_y) - y * of_x + of_xy
    return torch.stack([_distance_sums(x), _distance_sums(sorted_y)[rank], products]), order
