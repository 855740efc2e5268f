"""Precision, recall, density and coverage from nearest-neighbour balls.

Conventions. A radius is the distance to the k-th nearest other sample of the same set. Precision and recall
(Kynkaanniemi et al. 2019) use closed balls (``<=``) and k = 3; density and coverage (Naeem et al. 2020) use
open balls (``<``) and k = 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.errors import UserError
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


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Float32 squared distances (N, M) of float64 points.

    The matrix product is in float64 and what is below its rounding error counts as zero, so that equal points
    are at distance zero and the final rounding to float32 makes equal distances compare as equal.
    """
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    squared = torch.addmm(norms, a, b.T, alpha=-2)
    return squared.masked_fill_(squared < norms.mul_(1e-13), 0.0).float()


def _radii(x: Tensor, ks: tuple[int, int], parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared radii (R, N) for both k in every replicate, -1 for samples left out, and who takes part.

    Keeping the nearest ``max(ks)`` of every group makes each replicate exact without a second pass.
    """
    n, most, groups = x.shape[0], max(ks), parts.shape[1]
    edges = group_bounds(n, groups)
    near = torch.full((n, groups, most), torch.inf, device=x.device)
    for low in range(0, n, _ROWS):
        distances = _squared_distances(x[low : low + _ROWS], x)
        distances.diagonal(low).fill_(torch.inf)
        for g, (start, stop) in enumerate(pairwise(edges)):
            count = min(most, stop - start)
            near[low : low + _ROWS, g, :count] = distances[:, start:stop].topk(count, largest=False).values
    nearest = torch.stack([near[:, part].flatten(1).topk(most, largest=False).values for part in parts])
    present = (membership(n, groups, x.device) @ parts.T.double()).T.bool()
    first, second = (nearest[..., k - 1].masked_fill(~present, -1.0) for k in ks)
    return first, second, present


def prdc_replicates(
    real: Tensor, fake: Tensor, *, halves: bool = False, k_precision: int = 3, k_coverage: int = 5
) -> Tensor:
    """Precision, recall, density, coverage of all samples, then of the two halves of each of seven halvings.

    Distances are computed in chunks of rows, once for all replicates.

    Args:
        real: Reference features (N, D), in random order if ``halves``.
        fake: Generated features (M, D), likewise.
        halves: Whether to compute the half-samples (see :func:`half_sample_stderr`).
        k_precision: Neighbours for precision and recall.
        k_coverage: Neighbours for density and coverage.

    Returns:
        Float64 (15, 4), or (1, 4) without halves.

    Raises:
        UserError: A set has too few samples for that many neighbours.
    """
    parts = (half_samples() if halves else torch.ones(1, 1, dtype=torch.bool)).to(real.device)
    most, groups = max(k_precision, k_coverage), parts.shape[1]
    least, needed = min(real.shape[0], fake.shape[0]), (most + 1) * (2 if halves else 1)
    if least < needed:
        raise UserError(
            "too few samples for nearest-neighbour metrics",
            got=least,
            expected=f"at least {needed}",
            fix="generate more samples or use a smaller k",
        )
    centre = real.double().mean(0)  # near the origin the squared norms cancel less
    real, fake = real.double() - centre, fake.double() - centre
    real_closed, real_open, in_real = _radii(real, (k_precision, k_coverage), parts)
    fake_closed, _, in_fake = _radii(fake, (k_precision, k_coverage), parts)

    # How far a sample is outside the nearest ball: zero or less is inside. Subtracting is exact in its sign.
    fake_outside = torch.full(in_fake.shape, torch.inf, device=real.device)
    real_outside = torch.full(in_real.shape, torch.inf, device=real.device)
    balls = torch.zeros(in_fake.shape, device=real.device)
    nearest = torch.full((groups, real.shape[0]), torch.inf, device=real.device)
    ones = torch.ones(real.shape[0], device=real.device)
    for group, (start, stop) in enumerate(pairwise(group_bounds(fake.shape[0], groups))):
        for low in range(start, stop, _ROWS):
            rows = slice(low, min(low + _ROWS, stop))
            distances = _squared_distances(fake[rows], real)
            scratch = torch.empty_like(distances)
            nearest[group] = torch.minimum(nearest[group], distances.amin(0))
            for r in parts[:, group].nonzero()[:, 0].tolist():
                fake_outside[r, rows] = torch.sub(distances, real_closed[r], out=scratch).amin(1)
                balls[r, rows] = torch.lt(distances, real_open[r], out=scratch) @ ones
                closest = torch.sub(distances, fake_closed[r, rows, None], out=scratch).amin(0)
                real_outside[r] = torch.minimum(real_outside[r], closest)
    precise, recalled = (fake_outside <= 0) & in_fake, (real_outside <= 0) & in_real
    reached = torch.stack([nearest[part].amin(0) for part in parts])
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
        k_precision: Neighbours for precision and recall.
        k_coverage: Neighbours for density and coverage.

    Returns:
        The four shares.

    Raises:
        UserError: A set has too few samples for that many neighbours.
    """
    values = prdc_replicates(real, fake, k_precision=k_precision, k_coverage=k_coverage)[0]
    return PRDC(*values.tolist())
