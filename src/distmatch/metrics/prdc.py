"""Precision, recall, density and coverage from nearest-neighbor balls.

Conventions. A radius is the distance to the k-th nearest other sample of the same set. Precision and recall
(Kynkaanniemi et al. 2019) use closed balls (``<=``) and k = 3; density and coverage (Naeem et al. 2020) use
open balls (``<``) and k = 5. Where the k-th and the next are at one distance, as among repeated samples, the
ball is closed for these two as well, and in the density it counts k over the number of samples that it holds.
So equal distributions have density 1 and a coverage near 1 with repeats as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.metrics.moments import center_of
from distmatch.metrics.near_pairs import Points, distances, in_float64, nearest, points
from distmatch.metrics.resampling import group_bounds, half_samples, membership

_ROWS = 1024


@dataclass(frozen=True)
class PRDC:
    """The four shares.

    Attributes:
        precision: Share of generated samples inside a ball around a reference sample, in [0, 1].
        recall: Share of reference samples inside a ball around a generated sample, in [0, 1].
        density: Mean number of reference balls around a generated sample, over k; 1 when the distributions
            agree.
        coverage: Share of reference balls that hold a generated sample, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class _Balls:
    """The balls around one set, in every replicate (R, N).

    Attributes:
        closed: Squared radii of precision and recall, -1 for samples left out.
        opened: Squared radii of density and coverage, the next larger number where the ball is closed.
        tied: Where it is.
        present: The samples that are used.
    """

    closed: Tensor
    opened: Tensor
    tied: Tensor
    present: Tensor

    def weights(self, x: Points, k: int, parts: Tensor) -> Tensor:
        """What a ball counts in the density: 1, or k over the number of other samples in a closed one."""
        if not bool(self.tied.any()):
            return torch.ones_like(self.opened)
        held = torch.zeros_like(self.opened)
        for rows in self.tied.any(0).nonzero()[:, 0].split(_ROWS):
            found = in_float64(x, rows, x)
            for group, (start, stop) in enumerate(pairwise(group_bounds(len(x.given), parts.shape[1]))):
                for r in parts[:, group].nonzero()[:, 0].tolist():
                    held[r, rows] += (found[:, start:stop] < self.opened[r, rows, None]).sum(1)
        return torch.where(self.tied, k / (held - 1).clamp_min(1), 1.0)  # less the center

    def range(self, radii: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The least and the largest of some radii of each sample, over replicates, (N,) each."""
        every, present = torch.cat(list(radii)), self.present.repeat(len(radii), 1)
        return every.where(present, torch.inf).amin(0), every.amax(0)


def _balls(x: Points, ks: tuple[int, int], parts: Tensor) -> _Balls:
    """The balls for both k in every replicate.

    Keeping the nearest of every group makes each replicate exact without a second pass.
    """
    n, most, groups = len(x.given), max(ks) + 1, parts.shape[1]
    among = nearest(x, group_bounds(n, groups), parts, most)
    present = (membership(n, groups, among.device) @ parts.T.double()).T.bool()
    first, second = (among[..., k - 1].masked_fill(~present, -1.0) for k in ks)
    tied = present & (among[..., ks[1] - 1] == among[..., ks[1]]) & among[..., ks[1]].isfinite()
    beyond = torch.nextafter(second, torch.full_like(second, torch.inf))
    return _Balls(first, torch.where(tied, beyond, second), tied, present)


def prdc_replicates(
    real: Tensor, fake: Tensor, *, halves: bool = False, k_precision: int = 3, k_coverage: int = 5
) -> Tensor:
    """Precision, recall, density, coverage of all samples, then of the two halves of each of seven halvings.

    Distances are computed in chunks of rows, once for all replicates.

    Args:
        real: Reference features (N, D), in random order if ``halves``.
        fake: Generated features (M, D), likewise.
        halves: Whether to compute the half-samples (see :func:`half_sample_stderr`).
        k_precision: Neighbors for precision and recall.
        k_coverage: Neighbors for density and coverage.

    Returns:
        Float64 (15, 4), or (1, 4) without halves.

    Raises:
        UserError: A set has too few samples for that many neighbors.
    """
    parts = (half_samples() if halves else torch.ones(1, 1, dtype=torch.bool)).to(real.device)
    most, groups = max(k_precision, k_coverage), parts.shape[1]
    least, needed = min(real.shape[0], fake.shape[0]), (most + 1) * (2 if halves else 1)
    fix = "generate more samples or use a smaller k"
    check_count("the number of samples for nearest-neighbor metrics", least, needed, fix=fix)
    center = center_of(real)
    reals, fakes = points(real, center), points(fake, center)
    of_real, of_fake = (_balls(x, (k_precision, k_coverage), parts) for x in (reals, fakes))
    real_closed, real_open, in_real = of_real.closed, of_real.opened, of_real.present
    fake_closed, in_fake = of_fake.closed, of_fake.present
    weights = of_real.weights(reals, k_coverage, parts)
    radii = of_fake.range([fake_closed]), of_real.range([real_closed, real_open])

    # How far a sample is outside the nearest ball: zero or less is inside. Subtracting is exact in its sign.
    fake_outside = torch.full(in_fake.shape, torch.inf, device=real.device)
    real_outside = torch.full(in_real.shape, torch.inf, device=real.device)
    balls = torch.zeros(in_fake.shape, device=real.device)
    closest_fake = torch.full((groups, real.shape[0]), torch.inf, device=real.device)
    for group, (start, stop) in enumerate(pairwise(group_bounds(fake.shape[0], groups))):
        for low in range(start, stop, _ROWS):
            rows = slice(low, min(low + _ROWS, stop))
            found = distances(fakes, rows, reals, *radii)
            scratch = torch.empty_like(found)
            closest_fake[group] = torch.minimum(closest_fake[group], found.amin(0))
            for r in parts[:, group].nonzero()[:, 0].tolist():
                fake_outside[r, rows] = torch.sub(found, real_closed[r], out=scratch).amin(1)
                balls[r, rows] = torch.lt(found, real_open[r], out=scratch) @ weights[r]
                closest = torch.sub(found, fake_closed[r, rows, None], out=scratch).amin(0)
                real_outside[r] = torch.minimum(real_outside[r], closest)
    precise, recalled = (fake_outside <= 0) & in_fake, (real_outside <= 0) & in_real
    reached = torch.stack([closest_fake[part].amin(0) for part in parts])
    covered = reached < real_open  # samples left out have radius -1 and are never covered
    n_real, n_fake = in_real.sum(1).double(), in_fake.sum(1).double()
    return torch.stack(
        [
            precise.sum(1) / n_fake,
            recalled.sum(1) / n_real,
            (balls.double() * in_fake).sum(1) / (k_coverage * n_fake),
            covered.sum(1) / n_real,
        ],
        dim=1,
    )


def prdc(real: Tensor, fake: Tensor, *, k_precision: int = 3, k_coverage: int = 5) -> PRDC:
    """Precision, recall, density and coverage; the conventions are at the top of this file.

    For equal distributions the expected density is 1 and the expected coverage is
    ``1 - prod_{i=1..k} (N - i) / (M + N - i)``.

    Args:
        real: Reference features (N, D).
        fake: Generated features (M, D).
        k_precision: Neighbors for precision and recall.
        k_coverage: Neighbors for density and coverage.

    Returns:
        The four shares.

    Raises:
        UserError: A set has too few samples for that many neighbors.
    """
    values = prdc_replicates(real, fake, k_precision=k_precision, k_coverage=k_coverage)[0]
    return PRDC(*values.tolist())
