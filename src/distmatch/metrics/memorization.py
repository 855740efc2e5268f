"""Signs that samples are copies of real ones, from nearest neighbors in a feature space.

What they find are copies of the samples in the reference block: where the block is a part of the training
data, copies of the rest look like new samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.samples import checked_pair
from distmatch.discrepancies.kernels import squared_distances
from distmatch.metrics.resampling import group_bounds, half_samples, membership

_ROWS = 1024
_COPY = 1 / 3  # ratio of the distances to the nearest and the second nearest sample


def memorization_replicates(real: Tensor, fake: Tensor, *, halves: bool = False) -> Tensor:
    """Authentic and memorized shares of all samples, then of the two halves of each of seven halvings.

    Args:
        real: Reference features (N, D), in random order if ``halves``.
        fake: Generated features (M, D), likewise.
        halves: Whether to compute the half-samples.

    Returns:
        Float64 (15, 2), or (1, 2) without halves.

    Raises:
        UserError: There are fewer than two reference samples, or eight with halves.
    """
    parts = (half_samples() if halves else torch.ones(1, 1, dtype=torch.bool)).to(real.device)
    groups = parts.shape[1]
    check_count(
        "the number of samples for nearest neighbors", len(real), max(2, groups), fix="use more samples"
    )
    center = real.double().mean(0)  # near the origin the squared norms cancel less
    real, fake = real.double() - center, fake.double() - center
    own, _ = _nearest(real, real, groups, 1, same=True)
    near, which = _nearest(fake, real, groups, 2, same=False)
    present = (membership(len(fake), groups, real.device) @ parts.T.double()).T.bool()
    found = []
    for part, inside in zip(parts, present, strict=True):
        distances, order = near[:, part].flatten(1).topk(2, largest=False)
        first = which[:, part].flatten(1).gather(1, order[:, :1])[:, 0]
        isolation = own[:, part, 0].amin(1)[first]
        authentic = distances[:, 0] > isolation
        memorized = distances[:, 0] < _COPY**2 * distances[:, 1]
        found.append(torch.stack([authentic[inside].double().mean(), memorized[inside].double().mean()]))
    return torch.stack(found)


def _nearest(x: Tensor, y: Tensor, groups: int, k: int, *, same: bool) -> tuple[Tensor, Tensor]:
    """Squared distances from each of x to the k nearest in each group of y, and which they are."""
    near = torch.full((len(x), groups, k), torch.inf, device=x.device, dtype=torch.float64)
    which = torch.zeros(len(x), groups, k, dtype=torch.int64, device=x.device)
    for low in range(0, len(x), _ROWS):
        rows = slice(low, low + _ROWS)
        distances = squared_distances(x[rows], y, own=low if same else None)
        if same:
            distances.diagonal(low).fill_(torch.inf)
        for g, (start, stop) in enumerate(pairwise(group_bounds(len(y), groups))):
            count = min(k, stop - start)
            values, places = distances[:, start:stop].topk(count, largest=False)
            near[rows, g, :count], which[rows, g, :count] = values, places + start
    return near, which


def authenticity(real: Tensor, fake: Tensor) -> float:
    """The share of generated samples that are no copies of reference samples (AuthPct, Alaa et al. 2022).

    A sample is authentic if it is farther from the nearest reference sample than that one is from the nearest
    other. About half of new samples of the same distribution are; none of exact copies.

    Args:
        real: Reference features (N, D), N >= 2.
        fake: Generated features (M, D).

    Returns:
        The share in [0, 1].

    Raises:
        UserError: Fewer than two samples, values that are not finite, or sets of different dimension.
    """
    return float(memorization_replicates(*checked_pair(real, fake, names=("real", "fake")))[0, 0])


def memorized_share(real: Tensor, fake: Tensor) -> float:
    """The share of generated samples that are three times closer to one reference sample than to all others.

    The ratio of nearest-neighbor distances with the threshold 1/3 (Yoon et al. 2023).

    Args:
        real: Reference features (N, D), N >= 2.
        fake: Generated features (M, D).

    Returns:
        The share in [0, 1]; 0 or almost for new samples.

    Raises:
        UserError: Fewer than two samples, values that are not finite, or sets of different dimension.
    """
    return float(memorization_replicates(*checked_pair(real, fake, names=("real", "fake")))[0, 1])
