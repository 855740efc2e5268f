"""Sums over all pairs of samples in chunks, and the two-sample U-statistic made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.discrepancies.chunks import recomputed, rows_per_chunk
from distmatch.discrepancies.kernels import Kernel
from distmatch.discrepancies.u_statistics import centered_square, near_zero


@dataclass(frozen=True)
class PairSums:
    """Sums of a kernel matrix in float64.

    Attributes:
        rows: Sums over the columns, (n,).
        columns: Sums over the rows, (m,).
        degenerate: Variance of the degenerate part of the mean entry, (); NaN where four samples are missing.
        within: The matrix is of one sample with itself, and the diagonal is left out.
    """

    rows: Tensor
    columns: Tensor
    degenerate: Tensor
    within: bool

    @property
    def pairs(self) -> int:
        """Number of entries that were summed."""
        return len(self.rows) * (len(self.rows) - 1 if self.within else len(self.columns))

    @property
    def mean(self) -> Tensor:
        """Mean entry, ()."""
        return self.rows.sum() / self.pairs

    @property
    def row_means(self) -> Tensor:
        """Mean of each row, (n,)."""
        return self.rows / (self.pairs / len(self.rows))

    @property
    def column_means(self) -> Tensor:
        """Mean of each column, (m,)."""
        return self.columns / (self.pairs / len(self.columns))


def degenerate_within(squares: Tensor, rows: Tensor) -> Tensor:
    """The variance of the degenerate part of a mean over the pairs of one sample, ().

    Args:
        squares: Sum of the squared entries off the diagonal, ().
        rows: Sums of the rows, (n,).
    """
    return 2 * centered_square(squares, rows) / (len(rows) * (len(rows) - 1))


def degenerate_across(squares: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The variance of the degenerate part of a mean over the pairs of two samples, ().

    Args:
        squares: Sum of the squared entries, ().
        rows: Sums of the rows, (m,).
        columns: Sums of the columns, (n,).
    """
    m, n = len(rows), len(columns)
    centered = squares - rows.dot(rows) / n - columns.dot(columns) / m + rows.sum() ** 2 / (m * n)
    return centered.clamp_min(0) / ((m - 1) * (n - 1) * m * n)


def _chunks(n: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    step = rows_per_chunk(columns, device)
    return [(low, min(low + step, n)) for low in range(0, n, step)]


def _square_sum(block: Tensor) -> Tensor:
    # Row by row in the precision of the block, then in float64: accurate without a copy.
    return torch.linalg.vector_norm(block, dim=1).double().square().sum()


def across(kernel: Kernel, x: Tensor, y: Tensor, precision: torch.dtype = torch.float64) -> PairSums:
    """The sums of k(x_i, y_j), whose matrix is computed in ``precision``, without a graph."""
    with torch.no_grad():
        x, y = kernel.scaled(x), kernel.scaled(y)
        rows = torch.empty(len(x), dtype=torch.float64, device=x.device)
        columns, squares = rows.new_zeros(len(y)), rows.new_zeros(())
        for low, high in _chunks(len(x), len(y), x.device):
            block = kernel.of_scaled(x[low:high], y, precision)
            rows[low:high] = block.sum(1)
            columns += block.sum(0)
            squares += _square_sum(block)
        return PairSums(rows, columns, degenerate_across(squares, rows, columns), within=False)


def within(kernel: Kernel, x: Tensor, precision: torch.dtype = torch.float64) -> PairSums:
    """The sums of k(x_i, x_j) over i != j as in :func:`across`; only one triangle is computed."""
    with torch.no_grad():
        x = kernel.scaled(x)
        rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        squares = rows.new_zeros(())
        low = 0
        while low < len(x):
            high = min(low + rows_per_chunk(len(x) - low, x.device), len(x))
            block = kernel.of_scaled(x[low:high], x[low:], precision, 0)
            block.diagonal().zero_()
            rows[low:high] += block.sum(1)
            rows[high:] += block[:, high - low :].sum(0)
            squares += 2 * _square_sum(block) - _square_sum(block[:, : high - low])
            low = high
        return PairSums(rows, rows, degenerate_within(squares, rows), within=True)


def total_across(kernel: Kernel, x: Tensor, y: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """The sum of k(x_i, y_j) in float64, differentiable in bounded memory."""
    x, y = kernel.scaled(x), kernel.scaled(y)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for low, high in _chunks(len(x), len(y), x.device):
        total = total + recomputed(
            lambda a, b: kernel.of_scaled(a, b, precision).sum(1).double().sum(), x[low:high], y
        )
    return total


def total_within(kernel: Kernel, x: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """The sum of k(x_i, x_j) over i != j in float64, differentiable in bounded memory."""

    def both_triangles(a: Tensor, b: Tensor) -> Tensor:
        block = kernel.of_scaled(a, b, precision, 0)
        own, rest = block[:, : len(a)], block[:, len(a) :]
        return own.sum(1).double().sum() - own.diagonal().double().sum() + 2 * rest.sum(1).double().sum()

    x = kernel.scaled(x)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    low = 0
    while low < len(x):
        high = min(low + rows_per_chunk(len(x) - low, x.device), len(x))
        total = total + recomputed(both_triangles, x[low:high], x[low:])
        low = high
    return total


def two_sample_variances(xx: PairSums, yy: PairSums, xy: PairSums) -> tuple[float, float]:
    """Two variances of the U-statistic mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    Returns:
        The jackknife's, from how the row means vary, and that of the degenerate part.
    """
    of_x = (xx.row_means - xy.row_means).var() / len(xx.rows)
    of_y = (yy.row_means - xy.column_means).var() / len(yy.rows)
    return 4 * float(of_x + of_y), float(xx.degenerate + yy.degenerate + 4 * xy.degenerate)


def two_sample(xx: PairSums, yy: PairSums, xy: PairSums, test: str) -> Estimate:
    """The U-statistic mean k(x, x') + mean k(y, y') - 2 mean k(x, y) with its error bar.

    Args:
        xx: Sums of k within x.
        yy: Sums of k within y.
        xy: Sums of k across.
        test: Name of the function that decides near zero.
    """
    value = float(xx.mean + yy.mean - 2 * xy.mean)
    return near_zero(value, *two_sample_variances(xx, yy, xy), min(len(xx.rows), len(yy.rows)), test)
