r"""Distance covariance, squared, and its joint and concatenated forms for several variables.

dCov^2 = E\|X-X'\|\|Y-Y'\| + E\|X-X'\| E\|Y-Y'\| - 2 E\|X-X'\|\|Y-Y''\| is zero only for independent
variables. It is not scale invariant: standardize the variables first, and write categories as one-hot
columns. The centering U_ij = a_i./(n-2) + a_.j/(n-2) - a_ij - a../((n-1)(n-2)), U_ii = 0, has the sign of the
paper on joint distance covariance; ``dcor`` has the other one, which matters for products of three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name
from distmatch.base.estimate import Estimate
from distmatch.base.samples import checked, same_count
from distmatch.discrepancies.distance_products import (
    ProductSums,
    centered,
    distances,
    product_sums,
    times_distances,
)
from distmatch.discrepancies.permutation import TestResult, checked_resamples, result_of
from distmatch.discrepancies.u_statistics import centered_square, near_zero, squared_distance_sum

ESTIMATORS = ("unbiased", "biased")
LEAST = 4
"""The unbiased forms divide by n - 3."""

_HELD = 2000


def _paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = checked(x, "x", LEAST), checked(y, "y", LEAST)
    same_count(x, y, ("x", "y"))
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _unbiased(sums: ProductSums) -> Tensor:
    n = len(sums.a)
    product = sums.ab.sum() - 2 * sums.a.dot(sums.b) / (n - 2)
    return (product + sums.a.sum() * sums.b.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def _value(sums: ProductSums, estimator: str) -> Tensor:
    if estimator == "unbiased":
        return _unbiased(sums)
    n = len(sums.a)
    return (sums.ab.sum() - 2 * sums.a.dot(sums.b) / n + sums.a.sum() * sums.b.sum() / n**2) / n**2


def distance_covariance_loss(x: Tensor, y: Tensor, *, estimator: str = "unbiased") -> Tensor:
    """The squared distance covariance as a penalty, differentiable in both in bounded memory.

    Args:
        x: Samples (n, d), n >= 4.
        y: Samples (n, e); row i belongs to row i of ``x``.
        estimator: As in :func:`distance_covariance`.

    Returns:
        () in the precision of the samples.

    Raises:
        UserError: Bad or unpaired samples, or an unknown estimator.
    """
    check_name("estimator", estimator, ESTIMATORS)
    x, y = _paired(x, y)
    return _value(product_sums(x, y, in_order=False), estimator).to(x.dtype)


def _terms(x: Tensor, y: Tensor, sums: ProductSums) -> Tensor:
    """The row means of the product of the two centered matrices; their mean is the unbiased estimate."""
    n = len(x)
    a, b = sums.a / (n - 2), sums.b / (n - 2)
    p, q = a - sums.a.sum() / ((n - 1) * (n - 2)), b - sums.b.sum() / ((n - 1) * (n - 2))
    linear = p * (b.sum() - b - sums.b) + q * (a.sum() - a - sums.a)
    crossed = a.dot(b) - a * b - times_distances(y, a) - times_distances(x, b)
    return ((n - 1) * p * q + linear + crossed + sums.ab) / (n - 3)


def distance_variance(x: Tensor, rows: Tensor) -> Tensor:
    """The squared distance variance, the unbiased distance covariance of ``x`` with itself, () in float64.

    Args:
        x: Samples (n, d).
        rows: Their distance sums, (n,) in float64.
    """
    x = centered(x)
    return centered_square(squared_distance_sum(x, x), rows)


def distance_covariance(x: Tensor, y: Tensor, *, estimator: str = "unbiased") -> Estimate:
    """The squared distance covariance with its standard error; O(n log n) if both are one-dimensional.

    Args:
        x: Samples (n, d), n >= 4.
        y: Samples (n, e); row i belongs to row i of ``x``.
        estimator: ``"unbiased"``: the U-statistic (``dcor.u_distance_covariance_sqr``), which can be
            negative. ``"biased"``: the V-statistic (``dcor.distance_covariance_sqr``), too large by about
            E|X - X'| E|Y - Y'| / n, so it has no standard error.

    Returns:
        The estimate of dCov^2 (not of its root), in the product of the units; 0 where a variable is constant.
        Where a dependence is not clear the estimate carries a warning: decide with the test there.

    Raises:
        UserError: Bad or unpaired samples, or an unknown estimator.
    """
    check_name("estimator", estimator, ESTIMATORS)
    with torch.no_grad():
        x, y = _paired(x, y)
        n = len(x)
        sums = product_sums(x, y)
        if estimator == "biased":
            return Estimate(float(_value(sums, estimator)), math.nan, n)
        # The delete-one jackknife, up to a relative error of order 1/n^2.
        jackknife = 4 * float(_terms(x, y, sums).var()) / n * ((n - 1) / (n - 3)) ** 2
        degenerate = 2 * distance_variance(x, sums.a) * distance_variance(y, sums.b) / (n * (n - 3))
        value = float(_value(sums, estimator))
        return near_zero(value, jackknife, float(degenerate), n, "distance_covariance_test")


def concatenated_distance_covariance(x: Tensor, others: Sequence[Tensor]) -> Estimate:
    """CCdCov: the squared distance covariance of ``x`` with all the others side by side (unbiased).

    Zero only if ``x`` is independent of the others jointly, which no pairwise penalty sees: for x = XOR of
    two fair bits every pair is independent. A gradient gives :func:`distance_covariance_loss` of
    ``torch.cat(others, 1)``.

    Args:
        x: Samples (n, d), n >= 4.
        others: Samples (n, e) each, at least one.

    Raises:
        UserError: Bad or unpaired samples.
    """
    return distance_covariance(x, torch.cat(checked_list(others, 1), 1))


def checked_list(variables: Sequence[Tensor], least: int) -> list[Tensor]:
    """Paired variables as (n, d) matrices of one precision.

    Raises:
        UserError: Fewer than ``least`` variables, or bad or unpaired samples.
    """
    check_count("the number of variables", len(variables), least)
    result = [checked(v, f"variable {i}", LEAST) for i, v in enumerate(variables)]
    for i, v in enumerate(result):
        same_count(result[0], v, ("variable 0", f"variable {i}"))
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in result) else torch.float32
    return [v.to(dtype) for v in result]


def distance_covariance_test(
    x: Tensor, y: Tensor, *, permutations: int = 199, generator: torch.Generator | None = None
) -> TestResult:
    """The permutation test of "x and y are independent" with the unbiased distance covariance; exact level.

    Args:
        x: Samples (n, d), n >= 4.
        y: Samples (n, e).
        permutations: How often the rows of ``y`` are shuffled; each costs as much as the statistic.
        generator: Draws the shuffles.

    Raises:
        UserError: Bad or unpaired samples, or no permutations.
    """
    resamples = checked_resamples(permutations)
    with torch.no_grad():
        x, y = (v.double() for v in _paired(x, y))
        where = generator.device if generator is not None else x.device
        sums = product_sums(x, y)
        n, observed = len(x), _unbiased(sums)
        a, b = (distances(centered(v), centered(v), 0) if n <= _HELD else None for v in (x, y))
        null = []
        for _ in range(resamples):
            order = torch.randperm(n, generator=generator, device=where).to(y.device)
            # Shuffling changes the sum of products only, not what the centering subtracts from each variable.
            if a is None or b is None:
                products = product_sums(x, y[order], in_order=False).ab
            else:
                products = (a * b[order][:, order]).sum(1)
            null.append(_unbiased(ProductSums(sums.a, sums.b[order], products)))
        return result_of(observed, torch.stack(null), n, sums.ab.sum() / n**2)
