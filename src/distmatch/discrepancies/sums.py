"""Sums over all pairs of samples in chunks, and the two-sample U-statistic made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.discrepancies.chunks import recomputed, rows_per_chunk
from distmatch.discrepancies.kernels import Kernel


@dataclass(frozen=True)
class PairSums:
    """Sums of a kernel matrix in float64.

    Attributes:
        rows: Sums over the columns, (n,).
        columns: Sums over the rows, (m,).
        within: The matrix is of one sample with itself, and the diagonal is left out.
    """

    rows: Tensor
    columns: Tensor
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


def _chunks(n: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    step = rows_per_chunk(columns, device)
    return [(low, min(low + step, n)) for low in range(0, n, step)]


def across(kernel: Kernel, x: Tensor, y: Tensor) -> PairSums:
    """The sums of k(x_i, y_j), without a graph."""
    with torch.no_grad():
        x, y = kernel.scaled(x), kernel.scaled(y)
        rows = torch.empty(len(x), dtype=torch.float64, device=x.device)
        columns = rows.new_zeros(len(y))
        for low, high in _chunks(len(x), len(y), x.device):
            block = kernel.of_scaled(x[low:high], y)
            rows[low:high] = block.sum(1)
            columns += block.sum(0)
        return PairSums(rows, columns, within=False)


def within(kernel: Kernel, x: Tensor) -> PairSums:
    """The sums of k(x_i, x_j) over i != j, without a graph; only one triangle is computed."""
    with torch.no_grad():
        x = kernel.scaled(x)
        rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        low = 0
        while low < len(x):
            high = min(low + rows_per_chunk(len(x) - low, x.device), len(x))
            block = kernel.of_scaled(x[low:high], x[low:])
            block.diagonal().zero_()
            rows[low:high] += block.sum(1)
            rows[high:] += block[:, high - low :].sum(0)
            low = high
        return PairSums(rows, rows, within=True)


def total_across(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """The sum of k(x_i, y_j) in float64, differentiable in bounded memory."""
    x, y = kernel.scaled(x), kernel.scaled(y)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for low, high in _chunks(len(x), len(y), x.device):
        total = total + recomputed(lambda a, b: kernel.of_scaled(a, b).sum(1).double().sum(), x[low:high], y)
    return total


def total_within(kernel: Kernel, x: Tensor) -> Tensor:
    """The sum of k(x_i, x_j) over i != j in float64, differentiable in bounded memory."""

    def both_triangles(a: Tensor, b: Tensor) -> Tensor:
        block = kernel.of_scaled(a, b)
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


def two_sample(xx: PairSums, yy: PairSums, xy: PairSums) -> tuple[float, float]:
    r"""The U-statistic mean k(x, x') + mean k(y, y') - 2 mean k(x, y) and its standard error.

    The error is the jackknife's, from how the row means vary. Where both samples have the same law the row
    means vary by their own noise alone, which gives twice the variance: the interval is then a little wide
    (it holds the truth about 97 % of the time), and that makes up for the skewness of the null law.
    """
    of_x = (xx.row_means - xy.row_means).var() / len(xx.rows)
    of_y = (yy.row_means - xy.column_means).var() / len(yy.rows)
    return float(xx.mean + yy.mean - 2 * xy.mean), 2 * math.sqrt(float(of_x + of_y))
