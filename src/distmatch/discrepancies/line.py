"""Transport on the line: many pairs of weighted samples at once, by sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.discrepancies.measures import Measures, checked_measures


def checked_order(p: float) -> float:
    """The order of a Wasserstein distance.

    Raises:
        UserError: Less than one, or not finite.
    """
    if not (math.isfinite(p) and p >= 1):
        raise UserError("the order p of a Wasserstein distance must be finite and at least 1", got=p)
    return float(p)


def _sorted(values: Tensor, want_order: bool, *, runs: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows in ascending order and, where asked for or needed by autograd, the permutation."""
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


def _equal_weights(u: Tensor, v: Tensor, p: float) -> Tensor:
    n, m = u.shape[1], v.shape[1]
    u, v = _sorted(u, False)[0], _sorted(v, False)[0]
    if n == m:
        return _powers(u - v, p).mean(1)
    # The levels i/n and j/m, exact as the whole numbers i m and j n, are those of every row.
    of_x = torch.arange(1, n + 1, device=u.device) * m
    of_y = torch.arange(1, m + 1, device=u.device) * n
    levels, order = torch.cat([of_x, of_y]).sort()
    share = torch.diff(levels, prepend=levels.new_zeros(1)).to(torch.float64) / (n * m)
    ix, iy = _merged(order, n, m)
    moved = share > 0
    ix, iy, share = ix[moved], iy[moved], share[moved].to(u.dtype)
    return _powers(u.index_select(1, ix) - v.index_select(1, iy), p) @ share


def _any_weights(u: Tensor, v: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    n, m = u.shape[1], v.shape[1]
    u, order_u = _sorted(u, True)
    v, order_v = _sorted(v, True)
    levels, order = _sorted(torch.cat([a[order_u].cumsum(1), b[order_v].cumsum(1)], 1), True, runs=True)
    if order is None:
        raise RuntimeError("a sort lost its permutation")
    ix, iy = _merged(order, n, m)
    costs = _powers(u.gather(1, ix) - v.gather(1, iy), p).to(levels.dtype)
    first = levels[:, 0] * costs[:, 0]
    return (first + torch.linalg.vecdot(torch.diff(levels, dim=1), costs[:, 1:])).to(u.dtype)


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
    if measures.uniform:
        return _equal_weights(u, v, p)
    return _any_weights(u, v, measures.a, measures.b, p)


def wasserstein_1d(
    x: Tensor, y: Tensor, *, p: float = 2.0, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """The Wasserstein distance W_p between two samples on the line, exact.

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
    cost = line_costs(measures.x.T, measures.y.T, measures, p)[0]
    return torch.where(cost > 0, cost, 1.0).pow(1 / p) * (cost > 0)
