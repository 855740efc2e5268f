r"""Maximum mean discrepancy, squared: MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name
from distmatch.base.errors import unknown_name
from distmatch.base.estimate import Estimate
from distmatch.base.samples import about_center, checked_pair
from distmatch.discrepancies.chunks import rows_per_chunk
from distmatch.discrepancies.kernels import Kernel, resolve_kernel
from distmatch.discrepancies.pairwise_sums import across, total_across, total_within, two_sample, within
from distmatch.discrepancies.permutation import (
    TestResult,
    checked_resamples,
    random_splits,
    resampled_forms,
    result_of,
)

ESTIMATORS = ("unbiased", "biased", "linear", "block")
"""What ``estimator`` may be."""

_LEAST_TERMS = 20


def _centered(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, about a common center where the kernel does not see it."""
    x, y = x.double(), y.double()
    return (x, y) if kernel.of_products else about_center(x, y)


def _prepared(x: Tensor, y: Tensor, kernel: str | Kernel) -> tuple[Tensor, Tensor, Kernel, torch.dtype]:
    """The samples in float64, the kernel, and the precision that the samples came in."""
    x, y = checked_pair(x, y)
    kernel = resolve_kernel(kernel, x, y)
    return *_centered(kernel, x, y), kernel, x.dtype


def _linear_terms(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    pairs = min(len(x), len(y)) // 2
    x1, x2, y1, y2 = x[: 2 * pairs : 2], x[1 : 2 * pairs : 2], y[: 2 * pairs : 2], y[1 : 2 * pairs : 2]
    return kernel.paired(x1, x2) + kernel.paired(y1, y2) - kernel.paired(x1, y2) - kernel.paired(x2, y1)


def _block_terms(kernel: Kernel, x: Tensor, y: Tensor, block: int | None, precision: torch.dtype) -> Tensor:
    n = min(len(x), len(y))
    size = max(2, min(math.isqrt(n), n // _LEAST_TERMS)) if block is None else block
    check_count("the block size", size, 2, n)
    groups = n // int(size)
    x, y = (z[: groups * (len(z) // groups)].unflatten(0, (groups, -1)) for z in (x, y))
    m, n = x.shape[1], y.shape[1]
    x, y = kernel.scaled(x), kernel.scaled(y)
    terms = []
    for a, b in zip(
        x.split(rows_per_chunk(m * n, x.device)), y.split(rows_per_chunk(m * n, x.device)), strict=True
    ):
        xx, yy = (kernel.of_scaled(z, z, precision, 0) for z in (a, b))
        own_x, own_y = (k.diagonal(dim1=1, dim2=2).sum(1) for k in (xx, yy))
        inner = (xx.sum((1, 2)) - own_x) / (m * (m - 1)) + (yy.sum((1, 2)) - own_y) / (n * (n - 1))
        terms.append(inner - 2 * kernel.of_scaled(a, b, precision).mean((1, 2)))
    return torch.cat(terms)


def _terms(
    estimator: str, kernel: Kernel, x: Tensor, y: Tensor, block: int | None, precision: torch.dtype
) -> Tensor:
    if estimator == "linear":
        return _linear_terms(kernel, x, y)
    return _block_terms(kernel, x, y, block, precision).double()


def mmd_loss(
    x: Tensor,
    y: Tensor,
    kernel: str | Kernel = "gaussian",
    *,
    estimator: str = "unbiased",
    block: int | None = None,
) -> Tensor:
    """MMD^2 as a number to minimize, differentiable in both samples in bounded memory.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        kernel: A :class:`Kernel` or one of ``KERNELS``; a name takes its bandwidth from the median heuristic,
            through which no gradient runs.
        estimator: As in :func:`mmd`.
        block: As in :func:`mmd`.

    Returns:
        () in the precision of the samples. The unbiased, linear and block forms can be negative.

    Raises:
        UserError: Bad samples, or an unknown kernel or estimator.
    """
    x, y, kernel, given = _prepared(x, y, kernel)
    precision, m, n = kernel.precision(given), len(x), len(y)
    if estimator in ("linear", "block"):
        return _terms(estimator, kernel, x, y, block, precision).mean().to(given)
    cross = 2 * total_across(kernel, x, y, precision) / (m * n)
    inner_x, inner_y = (total_within(kernel, z, precision) for z in (x, y))
    if estimator == "unbiased":
        return (inner_x / (m * (m - 1)) + inner_y / (n * (n - 1)) - cross).to(given)
    if estimator == "biased":
        own_x, own_y = (kernel.paired(z, z).sum() for z in (x, y))
        return ((inner_x + own_x) / m**2 + (inner_y + own_y) / n**2 - cross).to(given)
    raise unknown_name("estimator", estimator, ESTIMATORS)


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: str | Kernel = "gaussian",
    *,
    estimator: str = "unbiased",
    block: int | None = None,
) -> Estimate:
    """An estimate of MMD^2 with its standard error. Memory is bounded whatever n is.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        kernel: A :class:`Kernel` or one of ``KERNELS``; a name takes its bandwidth from the median heuristic.
        estimator: ``"unbiased"``: the U-statistic over all pairs, O(mn). ``"biased"``: the V-statistic, with
            the pairs of a sample with itself; never negative, too large by about
            (E k(x, x) - E k(x, x'))/m + (E k(y, y) - E k(y, y'))/n, so it has no standard error.
            ``"linear"``: the mean over disjoint pairs, O(n), noisy. ``"block"``: the mean of the U-statistics
            of disjoint blocks (Zaremba et al. 2013), O(n b). The last two assume that the samples are in
            random order.
        block: Samples per block; by default the square root of the smaller number of samples n, at most n /
            20.

    Returns:
        The estimate of MMD^2 (not of its root); ``n`` is the smaller number of samples. The unbiased form
        warns where it is too close to zero for an honest interval; :func:`mmd_test` decides there.

    Raises:
        UserError: Bad samples, or an unknown kernel or estimator.
    """
    check_name("estimator", estimator, ESTIMATORS)
    with torch.no_grad():
        x, y, kernel, given = _prepared(x, y, kernel)
        precision = kernel.precision(given)
        count = min(len(x), len(y))
        if estimator == "biased":
            return Estimate(float(mmd_loss(x, y, kernel, estimator=estimator)), math.nan, count)
        if estimator == "unbiased":
            test = "energy_test" if kernel.name == "energy" else "mmd_test"
            own_x, own_y = (within(kernel, z, precision) for z in (x, y))
            return two_sample(own_x, own_y, across(kernel, x, y, precision), test)
        terms = _terms(estimator, kernel, x, y, block, precision)
        stderr = float(terms.std() / math.sqrt(len(terms))) if len(terms) > 1 else math.nan
        few = f"an error bar from {len(terms)} terms is rough, it needs {_LEAST_TERMS} or more"
        return Estimate(float(terms.mean()), stderr, count, few if len(terms) < _LEAST_TERMS else None)


def mmd_test(
    x: Tensor,
    y: Tensor,
    kernel: str | Kernel = "gaussian",
    *,
    permutations: int = 999,
    generator: torch.Generator | None = None,
) -> TestResult:
    """The permutation test of equal distributions with the biased MMD^2 as statistic.

    The level is exact for every sample size, as the bandwidth depends on the pooled sample only. The kernel
    matrix is computed once, in chunks of rows, for all permutations.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        kernel: As in :func:`mmd`. With ``"energy"`` this is the energy test.
        permutations: Number of random relabellings.
        generator: Draws the relabellings.

    Raises:
        UserError: Bad samples, an unknown kernel, or no permutations.
    """
    resamples = checked_resamples(permutations)
    with torch.no_grad():
        x, y = checked_pair(x, y)
        pooled = torch.cat([x, y])
        if not isinstance(kernel, Kernel):
            where = generator.device if generator is not None else x.device
            shuffled = torch.randperm(len(pooled), generator=generator, device=where).to(x.device)
            kernel = resolve_kernel(kernel, pooled[shuffled])
        x, y = _centered(kernel, x, y)
        scaled = kernel.scaled(torch.cat([x, y]))

        def rows(low: int, high: int) -> Tensor:
            return kernel.of_scaled(scaled[low:high], scaled, own=low)

        observed = x.new_full((len(scaled), 1), 1 / len(x))
        observed[len(x) :] = -1 / len(y)
        found = resampled_forms(
            rows,
            observed,
            lambda count: random_splits(len(x), len(y), count, generator, x.device),
            resamples,
        )
        return result_of(*found, min(len(x), len(y)), rows(0, 1).abs().max())
