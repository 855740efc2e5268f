r"""Energy distance 2 E\|X - Y\|^e - E\|X - X'\|^e - E\|Y - Y'\|^e (Szekely and Rizzo).

It is MMD^2 of the kernel -\|x - y\|^e. In one dimension with e = 1 it is 2 int (F - G)^2, computed by sorting
in O(n log n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.estimate import Estimate
from distmatch.base.samples import checked_pair
from distmatch.discrepancies.kernels import energy
from distmatch.discrepancies.mmd import mmd, mmd_loss, mmd_test
from distmatch.discrepancies.pairwise_sums import PairSums, degenerate_across, degenerate_within, two_sample
from distmatch.discrepancies.permutation import TestResult
from distmatch.discrepancies.u_statistics import squared_distance_sum

ESTIMATORS = ("unbiased", "biased")


def distance_rows(x: Tensor, y: Tensor) -> Tensor:
    r"""The sums over j of \|x_i - y_j\| for one-dimensional samples, by sorting.

    Args:
        x: (n,).
        y: (m,).

    Returns:
        (n,), with the graph of both.
    """
    y = y.sort().values
    below = torch.searchsorted(y.detach(), x.detach().contiguous())
    before = torch.cat([y.new_zeros(1), y.cumsum(0)])
    return x * (2 * below - len(y)) + before[-1] - 2 * before[below]


def _in_one_dimension(x: Tensor, y: Tensor) -> tuple[PairSums, PairSums, PairSums]:
    """The sums of -|x_i - y_j| within x, within y and across."""
    center = torch.cat([x, y]).detach().mean()
    x, y = (x.squeeze(1).double() - center), (y.squeeze(1).double() - center)

    def within(z: Tensor) -> PairSums:
        rows = distance_rows(z, z)
        return PairSums(-rows, -rows, degenerate_within(squared_distance_sum(z, z), rows), within=True)

    rows, columns = distance_rows(x, y), distance_rows(y, x)
    degenerate = degenerate_across(squared_distance_sum(x, y), rows, columns)
    return within(x), within(y), PairSums(-rows, -columns, degenerate, within=False)


def energy_distance_loss(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, estimator: str = "unbiased"
) -> Tensor:
    """The energy distance as a number to minimize, differentiable in both samples in bounded memory.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        exponent: e in (0, 2).
        estimator: As in :func:`energy_distance`.

    Returns:
        () in the precision of the samples.

    Raises:
        UserError: Bad samples, exponent or estimator.
    """
    check_name("estimator", estimator, ESTIMATORS)
    kernel = energy(exponent)
    x, y = checked_pair(x, y)
    if x.shape[1] > 1 or exponent != 1:
        return mmd_loss(x, y, kernel, estimator=estimator)
    xx, yy, xy = _in_one_dimension(x, y)
    if estimator == "unbiased":
        return (xx.mean + yy.mean - 2 * xy.mean).to(x.dtype)
    shrunk = xx.rows.sum() / len(x) ** 2 + yy.rows.sum() / len(y) ** 2
    return (shrunk - 2 * xy.mean).to(x.dtype)


def energy_distance(x: Tensor, y: Tensor, *, exponent: float = 1.0, estimator: str = "unbiased") -> Estimate:
    """An estimate of the energy distance with its standard error.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        exponent: e in (0, 2).
        estimator: ``"unbiased"``: the U-statistic, which can be negative. ``"biased"``: the V-statistic, what
            ``dcor.energy_distance`` gives and the square of what ``scipy.stats.energy_distance`` gives; too
            large by about E|X - X'|/m + E|Y - Y'|/n, so it has no standard error.

    Returns:
        The estimate, in the unit of the samples to the power e; ``n`` is the smaller number of samples. The
        unbiased form warns where it is too close to zero for an honest interval.

    Raises:
        UserError: Bad samples, exponent or estimator.
    """
    with torch.no_grad():
        if estimator != "unbiased":
            value = energy_distance_loss(x, y, exponent=exponent, estimator=estimator)
            return Estimate(float(value), math.nan, min(len(x), len(y)))
        kernel = energy(exponent)
        x, y = checked_pair(x, y)
        if x.shape[1] > 1 or exponent != 1:
            return mmd(x, y, kernel)
        return two_sample(*_in_one_dimension(x, y), "energy_test")


def energy_test(
    x: Tensor,
    y: Tensor,
    *,
    exponent: float = 1.0,
    permutations: int = 999,
    generator: torch.Generator | None = None,
) -> TestResult:
    """The permutation test of equal distributions with the biased energy distance as statistic.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        exponent: e in (0, 2).
        permutations: Number of random relabellings.
        generator: Draws the relabellings.

    Raises:
        UserError: Bad samples, exponent or number of permutations.
    """
    return mmd_test(x, y, energy(exponent), permutations=permutations, generator=generator)
