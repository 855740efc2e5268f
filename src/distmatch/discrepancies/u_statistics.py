r"""The standard error of a U-statistic of order two, and when it needs a warning.

Its variance is that of a first-order part, which vanishes at zero, and that of a degenerate second-order
part, which does not and is skewed: a sum of lambda_k (z_k^2 - 1). The jackknife counts the first once and
the second twice, so near zero it is too wide, except for low values, where it is too short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate

_FIRST_ORDER = 5.0
_FAR = 6.0


def centered_square(squares: Tensor, rows: Tensor) -> Tensor:
    """The mean square of the entries of a symmetric matrix without diagonal, less its row and column means.

    Unbiased for the entries k(x_i, x_j) of independent samples, as the U-centering of distance covariance
    (Szekely and Rizzo 2014) is.

    Args:
        squares: Sum of the squared entries, ().
        rows: Sums of the rows, (n,).

    Returns:
        The mean square, (); NaN for n < 4, where centering leaves nothing.
    """
    n = len(rows)
    if n < 4:
        return torch.full_like(squares, math.nan)
    centered = squares - 2 * rows.dot(rows) / (n - 2) + rows.sum() ** 2 / ((n - 1) * (n - 2))
    return centered.clamp_min(0) / (n * (n - 3))


def squared_distance_sum(x: Tensor, y: Tensor) -> Tensor:
    r"""The sum over i and j of \|x_i - y_j\|^2, () in float64, for samples (n, ...) about a common center."""
    x, y = x.double(), y.double()
    own = len(y) * x.square().sum() + len(x) * y.square().sum()
    return own - 2 * (x.sum(0) * y.sum(0)).sum()


def near_zero(value: float, jackknife: float, degenerate: float, n: int, test: str) -> Estimate:
    """The estimate with its standard error, and a warning where it is not reliable.

    An interval is claimed where the first-order part has four times the variance of the degenerate one, so
    that the estimate is nearly normal, or where the value is six times the spread it has at zero: so far away
    with a small first-order part, the degenerate part has many components and is nearly normal too. There the
    standard error is the jackknife's, whose small excess compensates the small errors of low values.
    Elsewhere it is the square root of the unbiased variance, or of that at zero where this is larger.

    Args:
        value: The U-statistic, zero in expectation where its hypothesis holds.
        jackknife: Its variance by the jackknife.
        degenerate: The variance of its degenerate part, NaN where there are too few samples.
        n: The number of samples to report.
        test: Name of the function that decides whether the truth is zero.
    """
    if math.isnan(degenerate):
        return Estimate(value, math.nan, n, "an error bar takes 4 samples or more of each set")
    if jackknife >= _FIRST_ORDER * degenerate or value > _FAR * math.sqrt(degenerate):
        return Estimate(value, math.sqrt(jackknife), n)
    stderr = math.sqrt(max(jackknife - degenerate, degenerate))
    warning = f"the value is too close to zero for its noise and the error bar is rough: decide with {test}"
    return Estimate(value, stderr, n, warning)
