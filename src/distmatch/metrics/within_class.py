"""How far apart the samples of a class are, compared with real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.discrepancies.kernels import squared_distances
from distmatch.metrics.resampling import membership

_ROWS = 2048


def _pairs(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the distances over pairs of different samples, of all and without each group; the pairs."""
    sums = x.new_zeros(groups.shape[1], groups.shape[1])
    for low in range(0, len(x), _ROWS):
        distances = squared_distances(x[low : low + _ROWS], x, own=low).clamp_(min=0).sqrt_()
        sums += groups[low : low + _ROWS].T @ (distances @ groups)
    sizes = groups.sum(0)
    counts = torch.outer(sizes, sizes) - torch.diag(sizes)
    return _without(sums), _without(counts)


def _without(table: Tensor) -> Tensor:
    """The total of a (g, g) matrix, then with row a and column a left out for each a."""
    total = table.sum()
    return torch.cat([total[None], total - table.sum(0) - table.sum(1) + table.diagonal()])


def class_distance_replicates(
    fake: Tensor, fake_labels: Tensor, real: Tensor, real_labels: Tensor, groups: int
) -> Tensor:
    """The mean distance between samples of a class over that of real ones, then without each group.

    The mean is over the classes that have two samples on both sides whichever group is left out.

    Args:
        fake: Generated features (M, D).
        fake_labels: Their classes, int64 (M,); -1 for none.
        real: Reference features (N, D).
        real_labels: Their classes, int64 (N,).
        groups: Number of jackknife groups.

    Returns:
        Float64 (1 + groups,), 1 for the same distribution; NaN where no class has enough samples.
    """
    sides = []
    for x, labels in ((fake.double(), fake_labels), (real.double(), real_labels)):
        belongs = membership(len(x), groups, x.device)
        found = {}
        for label in labels.unique().tolist():
            rows = (labels == label).to(x.device)
            if label >= 0 and int(rows.sum()) > 1:
                found[label] = _pairs(x[rows], belongs[rows])
        sides.append(found)
    ratios = []
    for label in sides[0].keys() & sides[1].keys():
        (sums, counts), (real_sums, real_counts) = sides[0][label], sides[1][label]
        if min(counts.min(), real_counts.min()) > 0 and real_sums.min() > 0:
            ratios.append((sums / counts) / (real_sums / real_counts))
    if not ratios:
        return torch.full((1 + groups,), torch.nan, dtype=torch.float64, device=fake.device)
    return torch.stack(ratios).mean(0)
