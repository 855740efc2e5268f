"""Joint distance covariance of several variables (Chakraborty and Zhang 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.estimate import Estimate
from distmatch.discrepancies.chunks import in_chunks
from distmatch.discrepancies.distance_covariance import checked_list, distance_variance
from distmatch.discrepancies.distance_products import centered, distances
from distmatch.discrepancies.u_statistics import centered_square, near_zero


def _product(centered_rows: list[Tensor], c: float) -> Tensor:
    """prod_k (U^k + c)."""
    product = centered_rows[0] + c
    for u in centered_rows[1:]:
        product = product * (u + c)
    return product


def _interactions(centered_rows: list[Tensor], c: float, about_first: bool) -> Tensor:
    """The terms of prod_k (U^k + c) with two factors U and more; with ``about_first`` those that hold U^1.

    The other terms add up to a constant, as each centered matrix adds up to zero.
    """
    first, others = centered_rows[0], _product(centered_rows[1:], c)
    power = c ** (len(centered_rows) - 1)
    if about_first:
        return first * (others - power)
    return (first + c) * others - power * torch.stack(centered_rows).sum(0) - c * power


def _row_sums(
    entries: Callable[[list[Tensor]], Tensor], variables: list[Tensor], margins: list[Tensor], weights: Tensor
) -> Tensor:
    """The sums over j != i of w_j times the entry of the U^k_ij = margin_i + margin_j - distance, (n,)."""

    def of_rows(low: int, high: int, *tensors: Tensor) -> Tensor:
        points, own, w = tensors[: len(variables)], tensors[len(variables) : -1], tensors[-1]
        apart = torch.ones(high - low, len(w), dtype=torch.bool, device=w.device)
        apart.diagonal(low).zero_()
        centered_rows = [
            margin[low:high, None] + margin - distances(x[low:high], x, low)
            for x, margin in zip(points, own, strict=True)
        ]
        return (entries(centered_rows) * apart * w).sum(1)

    return in_chunks(of_rows, *variables, *margins, weights)


def _margins(x: Tensor, weights: Tensor, shrink: float) -> Tensor:
    """Weighted row sums of the distances less half of their total, so that two of them center an entry."""
    rows = in_chunks(lambda low, high, x, w: distances(x[low:high], x, low) @ w, x, weights)
    return rows - shrink * rows.dot(weights) / 2


def _sums(variables: list[Tensor], weights: Tensor, c: float, about_first: bool) -> Tensor:
    """The weighted row sums of the interactions, (n,), with unbiased centering for weights 1 / (n - 2)."""
    n = len(weights)
    margins = [_margins(x, weights, (n - 2) / (n - 1)) for x in variables]
    return _row_sums(lambda us: _interactions(us, c, about_first), variables, margins, weights)


def _unbiased(variables: list[Tensor], c: float, about_first: bool) -> Tensor:
    n = len(variables[0])
    weights = variables[0].new_full((n,), 1 / (n - 2))
    return _sums(variables, weights, c, about_first).sum() * (n - 2) / (n * (n - 3))


def _jackknife(variables: list[Tensor], c: float, about_first: bool) -> float:
    """The variance by the jackknife, from how the statistic changes with the weight of each sample."""
    n = len(variables[0])
    variables = [x.detach() for x in variables]
    with torch.enable_grad():
        weights = variables[0].new_full((n,), 1 / (n - 2)).requires_grad_()
        sums = _sums(variables, weights, c, about_first)
        (gradient,) = torch.autograd.grad(sums.dot(weights), weights)
    return float(gradient.var()) * ((n - 1) * (n - 2)) ** 2 / (n * (n - 3) ** 4)


def _degenerate(variables: list[Tensor], c: float, about_first: bool) -> float:
    """The variance of the degenerate part, which is all there is without dependence.

    The statistic is then a mean of products of independent centered matrices with mean squares v_k: those of
    two factors and more of prod_k (U^k + c), or U^1 times the rest of the product, which may be dependent.
    """
    n, ones = len(variables[0]), torch.ones_like(variables[0][:, 0])
    v = [float(distance_variance(x, _margins(x, ones, 0.0))) for x in variables]
    if about_first:
        others = variables[1:]
        margins = [_margins(x, ones / (n - 2), (n - 2) / (n - 1)) for x in others]
        rows = _row_sums(lambda us: _product(us, c), others, margins, ones)
        squares = _row_sums(lambda us: _product(us, c).square(), others, margins, ones)
        mean_square = v[0] * float(centered_square(squares.sum(), rows))
    else:
        d = len(v)
        mean_square = math.prod(s + c**2 for s in v) - c ** (2 * d) - c ** (2 * d - 2) * sum(v)
    return 2 * mean_square / (n * (n - 3))


def _prepared(variables: Sequence[Tensor], c: float) -> list[Tensor]:
    check_number("c", c, "(0, inf)", fix="1 weighs all orders of interaction alike")
    return [centered(x) for x in checked_list(variables, 2)]


def joint_distance_covariance_loss(
    variables: Sequence[Tensor], *, c: float = 1.0, about_first: bool = False
) -> Tensor:
    """JdCov as a penalty, differentiable in all variables in bounded memory.

    Args:
        variables: As in :func:`joint_distance_covariance`.
        c: As there.
        about_first: As there.

    Returns:
        () in the precision of the variables.

    Raises:
        UserError: Bad or unpaired samples, fewer than two variables, or c not positive.
    """
    given = checked_list(variables, 2)[0].dtype
    return _unbiased(_prepared(variables, c), c, about_first).to(given)


def joint_distance_covariance(
    variables: Sequence[Tensor], *, c: float = 1.0, about_first: bool = False
) -> Estimate:
    """JdCov: zero only if all variables are independent jointly, not just in pairs (U-centered form).

    mean over pairs of prod_k (U^k + c), less c^d: for two variables the squared distance covariance (c = 1),
    for three the sum of the three pairwise ones, times c, and a triple term.

    Args:
        variables: Two or more paired samples (n, d_k), n >= 4.
        c: Small c weighs the high orders of interaction, large c the pairs.
        about_first: Omit every term without the first variable. Those are constant in it, so the
            gradient is the same; the rest measures how the first depends on the others, regardless of their
            mutual dependence.

    Returns:
        The estimate with its standard error; it can be negative, and warns where it is too close to zero for
        an honest interval. The pairwise terms are unbiased; those of
        three and more variables are too small by a relative error of order 1/n.

    Raises:
        UserError: Bad or unpaired samples, fewer than two variables, or c not positive.
    """
    with torch.no_grad():
        points = _prepared(variables, c)
        n = len(points[0])
        jackknife, degenerate = (f(points, c, about_first) for f in (_jackknife, _degenerate))
        which = "the first" if about_first else "each"
        test = f"distance_covariance_test of {which} variable with all others"
        value = float(_unbiased(points, c, about_first))
        return near_zero(value, jackknife, degenerate, n, test)
