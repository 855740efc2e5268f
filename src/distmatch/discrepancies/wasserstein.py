"""Optimal transport in one dimension: many pairs of weighted samples at once, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.discrepancies.measures import Measures, checked_measures

_SPARE = 1e10
"""How far from the ends of the number range a mean must be, so that none of its large terms was out of it."""


def checked_order(p: float) -> float:
    """The order of a Wasserstein distance.

    Raises:
        UserError: Less than one, or not finite.
    """
    check_number("the order p of a Wasserstein distance", p, "[1, inf)")
    return float(p)


def _sorted(values: Tensor, want_order: bool, *, runs: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows in ascending order and, if requested or needed by autograd, the permutation."""
    graph = torch.is_grad_enabled() and values.requires_grad
    if values.device.type != "cpu":
        ordered, order = values.sort(dim=1)
        return ordered, order
    # NumPy sorts with vector instructions, many times faster than torch does on a CPU.
    array = values.detach().numpy()
    if not graph and not want_order:
        array = array.copy()
        array.sort(axis=1)
        return torch.from_numpy(array), None
    # The stable kind also profits from levels that come as two ascending runs.
    order = torch.from_numpy(array.argsort(axis=1, kind="stable" if runs else None))
    return values.gather(1, order), order


def _powers(gaps: Tensor, p: float) -> Tensor:
    if p == 2:
        return gaps.square()
    return gaps.abs() if p == 1 else gaps.abs().pow(p)


def _merged(order: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """For each step between merged levels, which point of x and which of y it moves.

    ``order`` (..., n + m) sorts the n cumulative weights of x followed by the m of y.
    """
    of_x = (order < n).long()
    before_x = of_x.cumsum(-1).sub_(of_x)
    before_y = torch.arange(n + m, device=order.device) - before_x
    return before_x.clamp_(max=n - 1), before_y.clamp_(max=m - 1)


def _equal_weights(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    n, m = u.shape[1], v.shape[1]
    u, v = _sorted(u, False)[0], _sorted(v, False)[0]
    if n == m:
        return u - v, None
    # The levels i/n and j/m, exact as the whole numbers i m and j n, are those of every row.
    of_x = torch.arange(1, n + 1, device=u.device) * m
    of_y = torch.arange(1, m + 1, device=u.device) * n
    levels, order = torch.cat([of_x, of_y]).sort()
    share = torch.diff(levels, prepend=levels.new_zeros(1)).to(torch.float64) / (n * m)
    ix, iy = _merged(order, n, m)
    moved = share > 0
    ix, iy, share = ix[moved], iy[moved], share[moved].to(u.dtype)
    return u.index_select(1, ix) - v.index_select(1, iy), share


def _any_weights(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n, m = u.shape[1], v.shape[1]
    u, order_u = _sorted(u, True)
    v, order_v = _sorted(v, True)
    levels, order = _sorted(torch.cat([a[order_u].cumsum(1), b[order_v].cumsum(1)], 1), True, runs=True)
    if order is None:
        raise RuntimeError("a sort lost its permutation")
    ix, iy = _merged(order, n, m)
    share = torch.cat([levels[:, :1], torch.diff(levels, dim=1)], 1)
    return u.gather(1, ix) - v.gather(1, iy), share


def _plan(u: Tensor, v: Tensor, measures: Measures) -> tuple[Tensor, Tensor | None]:
    """How far mass is moved in each row (L, k), and how much of it: (k,) or (L, k); None for equal shares."""
    if measures.uniform:
        return _equal_weights(u, v)
    return _any_weights(u, v, measures.a, measures.b)


def _mean(values: Tensor, share: Tensor | None) -> Tensor:
    """The mean of each row under the shares, (L,)."""
    if share is None:
        return values.mean(1)
    if share.ndim == 1:
        return values @ share
    return torch.linalg.vecdot(share, values.to(share.dtype)).to(values.dtype)


def line_costs(u: Tensor, v: Tensor, measures: Measures, p: float) -> Tensor:
    """W_p^p between each row of ``u`` and the same row of ``v``, exact and differentiable.

    Args:
        u: Positions of the first sample (L, n).
        v: Positions of the second sample (L, m).
        measures: Their weights.
        p: Order, at least 1.

    Returns:
        (L,).
    """
    gaps, share = _plan(u, v, measures)
    return _mean(_powers(gaps, p), share)


def line_distances(u: Tensor, v: Tensor, measures: Measures, p: float) -> Tensor:
    """W_p, the p-th roots of :func:`line_costs`, (L,), also where powers of the gaps are out of range.

    There the gaps are divided by the largest of their row first. At a distance of zero the gradient is zero.
    """
    gaps, share = _plan(u, v, measures)
    mean = _mean(_powers(gaps, p), share)
    low, high = (float(z) for z in mean.detach().aminmax())
    numbers = torch.finfo(mean.dtype)
    if low > _SPARE * numbers.tiny and high < numbers.max / _SPARE:
        return mean.pow(1 / p)
    largest = gaps.detach().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    mean = _mean(_powers(gaps / scale, p), share)
    return torch.where(mean > 0, mean, 1.0).pow(1 / p) * (mean > 0) * scale[:, 0]


def wasserstein_1d(
    x: Tensor, y: Tensor, *, p: float = 2.0, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """The Wasserstein distance W_p between two one-dimensional samples, exact.

    Args:
        x: Samples (n,) or (n, 1).
        y: Samples (m,) or (m, 1).
        p: Order, at least 1.
        a: Weights of ``x`` (n,), not negative, summing to one; equal ones by default.
        b: Weights of ``y`` (m,).

    Returns:
        W_p, the p-th root of the cost, as a tensor () in the precision of the samples. Where it is zero, its
        gradient is given as zero.

    Raises:
        UserError: Samples, weights or an order that are not usable, or more than one coordinate.
    """
    p = checked_order(p)
    measures = checked_measures(x, y, a, b)
    if measures.x.shape[1] != 1:
        raise UserError(
            "wasserstein_1d works on the line",
            got=f"{measures.x.shape[1]} coordinates",
            fix="use sliced_wasserstein or sinkhorn_divergence",
        )
    return line_distances(measures.x.T, measures.y.T, measures, p)[0]
