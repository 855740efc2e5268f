r"""The sums that distance covariance is made of: \|x_i - x_j\|, and \|x_i - x_j\| \|y_i - y_j\|, over j.

For one-dimensional variables in O(n log n) by counting concordant pairs, otherwise in chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.discrepancies.chunks import in_chunks
from distmatch.discrepancies.kernels import root, squared_distances


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (n, m), with gradient zero at zero."""
    return (x - y.T).abs() if x.shape[1] == 1 else root(squared_distances(x, y))


_BASE = 16


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
        return _by_counting(x.squeeze(1).double(), y.squeeze(1).double())

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


def _below(values: Tensor, by_y: Tensor) -> Tensor:
    """Sums of the columns of ``values`` (n, 4) over the rows that come before in both orders, (n, 4).

    Args:
        values: One row per sample, in the order of x.
        by_y: The rows in the order of y.
    """
    n, width = values.shape
    size = max(_BASE, 1 << max(n - 1, 1).bit_length())
    place = torch.cat([by_y, torch.arange(n, size, device=values.device)])
    rank = torch.empty_like(place).scatter_(0, place, torch.arange(size, device=values.device))
    padded = torch.nn.functional.pad(values, (0, 0, 0, size - n))
    own, sums, block = padded.index_select(0, place), torch.zeros_like(padded), size
    while block > _BASE:
        # Halve each block of x: its right half collects from its left half, all in the order of y.
        half = block // 2
        in_right = (place & half) != 0
        left, right = (side.nonzero().view(-1, half) for side in (~in_right, in_right))
        order = torch.cat([left, right], 1).flatten()
        place, own, sums = place[order], own.index_select(0, order), sums.index_select(0, order)
        so_far = own.view(-1, 2, half, width)[:, 0].cumsum(1)
        so_far = torch.nn.functional.pad(so_far, (0, 0, 1, 0)).flatten(0, 1)
        steps = torch.arange(half, device=values.device)
        lefts = (
            (right & (block - 1))
            - steps
            + torch.arange(len(right), device=values.device)[:, None] * (half + 1)
        )
        collected = so_far.index_select(0, lefts.flatten()).view(-1, half, width)
        sums = sums.view(-1, 2, half, width)
        sums = torch.stack([sums[:, 0], sums[:, 1] + collected], 1).view(-1, width)
        block = half
    rank = rank.view(-1, block)
    earlier = torch.ones(block, block, dtype=torch.bool, device=values.device).tril(-1)
    before = ((rank[:, None, :] < rank[:, :, None]) & earlier).to(values.dtype)
    within_block = (before @ padded.view(-1, block, width)).flatten(0, 1)
    return within_block.index_add(0, place, sums)[:n]


def _by_counting(x: Tensor, y: Tensor) -> ProductSums:
    r"""The sums for one-dimensional samples, O(n log n).

    \|dx\| \|dy\| is dx dy for concordant pairs and -dx dy for the others, and dx dy is linear in
    (1, x, y, xy) of j. So it takes the sums of these four over the j below i in both orders (Huo and Szekely
    2016; here by a wavelet tree, which keeps every level a few vector operations). Ties contribute nothing
    either way.
    """
    order = x.detach().argsort()
    x, y = x[order], y[order]
    by_y = y.detach().argsort()
    values = torch.stack([torch.ones_like(x), x, y, x * y], 1)
    total = values.sum(0)
    up_to_x = values.cumsum(0)
    up_to_y = torch.zeros_like(values).index_add(0, by_y, values[by_y].cumsum(0))
    below = _below(values, by_y)
    # Those above i in both orders: all, less those up to i in either. (i itself adds nothing to its own sum.)
    above = total - up_to_x - up_to_y + below
    count, of_x, of_y, of_xy = (2 * (below + above) - total).unbind(1)
    a = x * (2 * up_to_x[:, 0] - total[0]) + total[1] - 2 * up_to_x[:, 1]
    b = y * (2 * up_to_y[:, 0] - total[0]) + total[2] - 2 * up_to_y[:, 2]
    sums = torch.stack([a, b, x * y * count - x * of_y - y * of_x + of_xy])
    return ProductSums(*torch.zeros_like(sums).index_add(1, order, sums))
