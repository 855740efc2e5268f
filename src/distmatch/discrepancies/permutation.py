"""Tests by resampling: p-values that are exact (permutations) or asymptotically so (wild bootstrap)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.discrepancies.chunks import rows_per_chunk

_WEIGHT_ELEMENTS = 2**25


@dataclass(frozen=True)
class TestResult:
    """The outcome of a hypothesis test.

    Attributes:
        statistic: The value on the samples as they are.
        p_value: (1 + number of resamples at least as large) / (1 + resamples), never below 1 / (1 +
            resamples).
        resamples: Number of permutations or bootstrap draws.
        n: The smaller number of samples.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    statistic: float
    p_value: float
    resamples: int
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """The JSON form."""
        return asdict(self)


def checked_resamples(resamples: int) -> int:
    """The number of resamples.

    Raises:
        UserError: It is no positive whole number.
    """
    check_count(
        "the number of resamples",
        resamples,
        fix="199 for a level of 1 %, 999 for reported values",
    )
    return int(resamples)


def result_of(observed: Tensor, null: Tensor, n: int, scale: Tensor | float) -> TestResult:
    """The result for an observed value and its resamples; ties up to rounding count as at least as large.

    Args:
        observed: The statistic, ().
        null: Its resamples, (resamples,).
        n: The number of samples to report.
        scale: The size (not negative) of the terms the statistic is a difference of, for what counts as a
            tie.
    """
    at_least = int((null >= observed - 1e-12 * float(scale)).sum())
    return TestResult(float(observed), (1 + at_least) / (1 + len(null)), len(null), n)


def random_splits(
    m: int, n: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Signed weights (m + n, count): 1/m on a random m of the rows, -1/n on the others."""
    where = generator.device if generator is not None else device
    order = torch.rand(count, m + n, generator=generator, device=where).argsort(1).to(device)
    weights = torch.full((count, m + n), -1 / n, dtype=torch.float64, device=device)
    return weights.scatter_(1, order[:, :m], 1 / m).T


def random_signs(n: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Independent fair signs (n, count)."""
    where = generator.device if generator is not None else device
    return (torch.randint(0, 2, (n, count), generator=generator, device=where).to(device) * 2 - 1).double()


def resampled_forms(
    rows: Callable[[int, int], Tensor], observed: Tensor, draw: Callable[[int], Tensor], resamples: int
) -> tuple[Tensor, Tensor]:
    """The quadratic form of the observed weights (), and those of as many resamples (resamples,).

    Args:
        rows: As for :func:`quadratic_forms`.
        observed: Weights (n, 1).
        draw: Draws that many weight vectors, (n, count); called with as many as are kept at a time.
        resamples: How many.
    """
    forms, left = [], resamples
    while left > 0:
        count = min(left, max(1, _WEIGHT_ELEMENTS // len(observed)))
        forms.append(quadratic_forms(rows, torch.cat([observed, draw(count)], 1)))
        left -= count
    return forms[0][0], torch.cat([f[1:] for f in forms])


def quadratic_forms(rows: Callable[[int, int], Tensor], weights: Tensor) -> Tensor:
    """The values w^T K w of many weight vectors, with each row of K computed once.

    Args:
        rows: Gives the rows ``low:high`` of the symmetric matrix K, (high - low, n).
        weights: The vectors as columns, (n, count).

    Returns:
        (count,).
    """
    n = len(weights)
    forms = weights.new_zeros(weights.shape[1])
    step = rows_per_chunk(n, weights.device)
    for low in range(0, n, step):
        high = min(low + step, n)
        forms += (weights[low:high] * (rows(low, high) @ weights)).sum(0)
    return forms
