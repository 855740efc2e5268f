r"""Kernel Stein discrepancy, squared: how far samples are from a density known by its score.

u(x, x') = s.s' k + s.grad_x' k + s'.grad_x k + tr grad_x grad_x' k has mean zero under q in each argument
(Liu et al. 2016, Chwialkowski et al. 2016). Kernels of v = \|x - x'\|^2: k = phi(v), with phi' and phi'' in
closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.base.estimate import Estimate
from distmatch.base.samples import checked_pair
from distmatch.discrepancies.chunks import in_chunks
from distmatch.discrepancies.kernels import median_bandwidth, squared_distances
from distmatch.discrepancies.permutation import (
    TestResult,
    checked_resamples,
    random_signs,
    resampled_forms,
    result_of,
)
from distmatch.discrepancies.u_statistics import centered_square, near_zero

KERNELS = ("imq", "gaussian")
ESTIMATORS = ("unbiased", "biased")


def _profile(kernel: str, v: Tensor, s: float, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel as a function of the squared distance, with its first two derivatives."""
    if kernel == "gaussian":
        k = (-v / (2 * s**2)).exp()
        return k, -k / (2 * s**2), k / (4 * s**4)
    base = 1 + v / s**2
    k = base**exponent
    first = exponent / s**2 * k / base
    return k, first, (exponent - 1) / s**2 * first / base


def _stein_rows(
    x: Tensor,
    score: Tensor,
    low: int,
    high: int,
    kernel: str,
    s: float,
    exponent: float,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """The rows low:high of the matrix u(x_i, x_j), from float64 samples, in ``precision``."""
    some, own = x[low:high], score[low:high]
    v = squared_distances(some, x, precision, low)
    k, first, second = _profile(kernel, v, s, exponent)
    # (x - x').(s' - s), from grad_x k = 2 phi' (x - x') = -grad_x' k
    slope = some @ score.T - (some * own).sum(1, keepdim=True) - (x * score).sum(1) + own @ x.T
    slope, products = slope.to(precision), (own @ score.T).to(precision)
    return products * k + 2 * first * slope - 2 * x.shape[1] * first - 4 * second * v


def _prepared(
    x: Tensor, score: Tensor, kernel: str, bandwidth: float | None, exponent: float
) -> tuple[Tensor, Tensor, float, torch.dtype]:
    """Centered samples and scores in float64, the bandwidth, and the precision they came in."""
    check_name("Stein kernel", kernel, KERNELS)
    check_number("the exponent", exponent, "(-1, 0)")
    x, score = checked_pair(x, score, names=("x", "score"), paired=True)
    if bandwidth is None:
        bandwidth = median_bandwidth(x)
    check_number("the bandwidth", bandwidth, "(0, inf)", fix="None chooses one")
    given, x = x.dtype, x.double()
    return x - x.detach().mean(0), score.double(), float(bandwidth), given


def kernel_stein_loss(
    x: Tensor,
    score: Tensor,
    *,
    kernel: str = "imq",
    bandwidth: float | None = None,
    exponent: float = -0.5,
    estimator: str = "unbiased",
) -> Tensor:
    """The squared kernel Stein discrepancy, differentiable in the samples and the score.

    Arguments and errors are those of :func:`kernel_stein`; no gradient runs through the default bandwidth.

    Returns:
        () in the precision of the samples.
    """
    check_name("estimator", estimator, ESTIMATORS)
    x, score, s, given = _prepared(x, score, kernel, bandwidth, exponent)

    def of_rows(low: int, high: int, x: Tensor, score: Tensor) -> Tensor:
        u = _stein_rows(x, score, low, high, kernel, s, exponent, given)
        rows = u.sum(1).double()
        return rows - u.diagonal(low).double() if estimator == "unbiased" else rows

    n = len(x)
    total = in_chunks(of_rows, x, score).sum()
    return (total / (n * (n - 1) if estimator == "unbiased" else n**2)).to(given)


def kernel_stein(
    x: Tensor,
    score: Tensor,
    *,
    kernel: str = "imq",
    bandwidth: float | None = None,
    exponent: float = -0.5,
    estimator: str = "unbiased",
) -> Estimate:
    r"""An estimate of the squared kernel Stein discrepancy of samples to a density q.

    Args:
        x: Samples (n, d), n >= 2.
        score: grad log q at the samples, (n, d).
        kernel: ``"imq"``, (1 + \|x - x'\|^2 / s^2)^b; or ``"gaussian"``, which for d >= 3 can miss samples
            that run away.
        bandwidth: s, in the unit of the samples; None for the median heuristic.
        exponent: b in (-1, 0) of ``"imq"``.
        estimator: ``"unbiased"``: the U-statistic, which can be negative. ``"biased"``: the V-statistic,
            never negative, too large by about E u(x, x) / n, so it has no standard error.

    Returns:
        The estimate; the unbiased form warns where it is too close to zero for an honest interval.

    Raises:
        UserError: Bad samples, scores, bandwidth or names.
    """
    with torch.no_grad():
        if estimator != "unbiased":
            value = kernel_stein_loss(
                x, score, kernel=kernel, bandwidth=bandwidth, exponent=exponent, estimator=estimator
            )
            return Estimate(float(value), math.nan, len(x))
        x, score, s, given = _prepared(x, score, kernel, bandwidth, exponent)
        n = len(x)

        def of_rows(low: int, high: int, x: Tensor, score: Tensor) -> Tensor:
            u = _stein_rows(x, score, low, high, kernel, s, exponent, given)
            u.diagonal(low).zero_()
            return torch.stack([u.sum(1).double(), torch.linalg.vector_norm(u, dim=1).double().square()])

        rows, squares = in_chunks(of_rows, x, score)
        means, pairs = rows / (n - 1), n * (n - 1)
        degenerate = 2 * float(centered_square(squares.sum(), rows)) / pairs
        return near_zero(float(means.mean()), 4 * float(means.var()) / n, degenerate, n, "kernel_stein_test")


def kernel_stein_test(
    x: Tensor,
    score: Tensor,
    *,
    kernel: str = "imq",
    bandwidth: float | None = None,
    exponent: float = -0.5,
    resamples: int = 999,
    generator: torch.Generator | None = None,
) -> TestResult:
    """The test of "x are independent samples of q" with the V-statistic, by the wild bootstrap.

    The null draws give each sample a random sign. The level holds for large n, not exactly, and for
    independent samples only: the samples of a Markov chain must be thinned first.

    Args:
        x: Samples (n, d), n >= 2.
        score: grad log q at the samples, (n, d).
        kernel: As in :func:`kernel_stein`.
        bandwidth: As there.
        exponent: As there.
        resamples: Number of sign vectors.
        generator: Draws the signs.

    Raises:
        UserError: Bad samples, scores, bandwidth, names or number of resamples.
    """
    count = checked_resamples(resamples)
    with torch.no_grad():
        x, score, s, _ = _prepared(x, score, kernel, bandwidth, exponent)
        n = len(x)
        observed, null = resampled_forms(
            lambda low, high: _stein_rows(x, score, low, high, kernel, s, exponent),
            x.new_ones(n, 1) / n,
            lambda drawn: random_signs(n, drawn, generator, x.device) / n,
            count,
        )
        return result_of(observed, null, n, observed)
