"""The distances between two samples that a comparison is made of, each measured in one way with its error.

Here p and q are two sets of independent samples in random order, (n, d) and (m, d). Estimators that cost more
than n log n use a part of them; ``n`` of the estimate is their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.estimate import Estimate
from distmatch.discrepancies import (
    TestResult,
    cauchy_schwarz,
    energy_distance,
    energy_test,
    kernel_stein,
    kernel_stein_test,
    max_sliced_wasserstein,
    mmd,
    mmd_test,
    random_directions,
    sinkhorn_estimate,
    sliced_wasserstein,
    wasserstein_1d,
)
from distmatch.divergences.estimators import kl_neighbors
from distmatch.metrics.frechet import frechet_distance
from distmatch.metrics.resampling import jackknife_stderr, kept
from distmatch.metrics.settings import GROUPS

Score = Callable[[Tensor], Tensor]
"""Maps points (n, d) to the gradient of a log-density there, (n, d)."""

NEIGHBORS = 5
_PROJECTIONS = 200
_RELABELLINGS = 19  # one in twenty pairs of equal distributions goes without the warning
_MOST_PAIRS = 5000  # samples of a side where all pairs are seen once, or all samples many times,
_MOST_TESTED = 2000  # where they are seen for each of 999 permutations or many iterations,
_MOST_WIDE = 1000  # and where a matrix of all pairs is decomposed
_WIDE = 1024


@dataclass(frozen=True)
class Measured:
    """One line of a comparison.

    Attributes:
        estimate: The value with its standard error; a :class:`LowerBound` where it is one.
        estimator: How it was measured.
        meaning: Which form of the distance it is, and its unit.
        largest: The largest value that two distributions can have; inf where there is none.
        test: The test of "p and q are the same", where there is one.
    """

    estimate: Estimate
    estimator: str
    meaning: str
    largest: float = math.inf
    test: TestResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: that of the estimate, and what else applies."""
        result: dict[str, Any] = {**self.estimate.to_dict(), "estimator": self.estimator}
        result["meaning"] = self.meaning
        if math.isfinite(self.largest):
            result["largest"] = self.largest
        if self.test is not None:
            result |= {"p_value": self.test.p_value, "resamples": self.test.resamples, "test_n": self.test.n}
        return result


def resampled(
    statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, draws: torch.Generator
) -> Estimate:
    """A smooth statistic of two samples, never negative, with its jackknife error over ten groups of both.

    There is a warning where the value is not larger than between 19 random relabellings of the same samples:
    such a statistic is above zero for equal distributions as well. And where half of the samples, which have
    about twice the bias and to first order no other error, give a value that differs by more than the
    standard error.

    Args:
        statistic: Maps two samples to a number.
        x: Samples (n, ...), in random order.
        y: Samples (m, ...), in random order.
        draws: Draws the relabellings.
    """
    masks = zip(kept(len(x), GROUPS, x.device), kept(len(y), GROUPS, y.device), strict=True)
    replicates = torch.tensor([statistic(x[a], y[b]) for a, b in masks], dtype=torch.float64)
    value, stderr = float(replicates[0]), float(jackknife_stderr(replicates))
    both, null = torch.cat([x, y]), []
    for _ in range(_RELABELLINGS):
        order = torch.randperm(len(both), generator=draws).to(x.device)
        null.append(statistic(both[order[: len(x)]], both[order[len(x) :]]))
    halves = (statistic(x[::2], y[::2]) + statistic(x[1::2], y[1::2])) / 2
    warning = None
    if value <= max(null):
        warning = f"not distinguishable from 0: random permutations of the samples reach {max(null):.3g}"
    elif abs(halves - value) > stderr:
        trend = "less" if halves > value else "more"
        warning = f"biased: half of the samples give {halves:.3g}, and the trend for more is {trend}"
    return Estimate(value, stderr, min(len(x), len(y)), warning)


def _neighbors(p: Tensor, q: Tensor, seed: int) -> Measured:
    found = kl_neighbors(p[:_MOST_PAIRS], q[:_MOST_PAIRS], k=NEIGHBORS, seed=seed)
    return Measured(found, f"{NEIGHBORS} nearest neighbors", "KL(p‖q), nats")


def _neighbors_reversed(p: Tensor, q: Tensor, seed: int) -> Measured:
    found = kl_neighbors(q[:_MOST_PAIRS], p[:_MOST_PAIRS], k=NEIGHBORS, seed=seed)
    if found.warning is not None:
        found = replace(found, warning=f"with p and q exchanged, {found.warning}")
    return Measured(found, f"{NEIGHBORS} nearest neighbors", "KL(q‖p), nats")


def mmd_of(kernel: str, p: Tensor, q: Tensor, seed: int) -> Measured:
    """The squared maximum mean discrepancy with a kernel by name, and its permutation test."""
    estimate = mmd(p[:_MOST_PAIRS], q[:_MOST_PAIRS], kernel)
    draws = seeds.generator(seed, f"between/mmd/{kernel}")
    test = mmd_test(p[:_MOST_TESTED], q[:_MOST_TESTED], kernel, generator=draws)
    return Measured(estimate, f"U-statistic, {kernel} kernel", "squared, can be below 0", test=test)


def _energy(p: Tensor, q: Tensor, seed: int) -> Measured:
    estimate = energy_distance(p[:_MOST_PAIRS], q[:_MOST_PAIRS])
    draws = seeds.generator(seed, "between/energy")
    test = energy_test(p[:_MOST_TESTED], q[:_MOST_TESTED], generator=draws)
    return Measured(estimate, "U-statistic", "units of the samples, can be below 0", test=test)


def _sinkhorn(p: Tensor, q: Tensor, seed: int) -> Measured:
    found = sinkhorn_estimate(p[:_MOST_TESTED], q[:_MOST_TESTED])
    return Measured(found, "Sinkhorn, less its bias", "cost ½‖x−y‖², squared units of the samples")


def _sliced(p: Tensor, q: Tensor, seed: int) -> Measured:
    draws = seeds.generator(seed, "between/sliced")
    p, q = p[:_MOST_PAIRS], q[:_MOST_PAIRS]
    directions = random_directions(p.shape[1], _PROJECTIONS, generator=draws, like=p)
    over_directions = sliced_wasserstein(p, q, directions=directions).stderr
    # Projected once for all resamples: in the projections the directions are the axes.
    axes = torch.eye(_PROJECTIONS, dtype=p.dtype, device=p.device)
    found = resampled(
        lambda x, y: sliced_wasserstein(x, y, directions=axes).value,
        p @ directions.T,
        q @ directions.T,
        draws,
    )
    found = replace(found, stderr=math.hypot(found.stderr, over_directions))
    return Measured(found, f"{_PROJECTIONS} random directions", "W_2, units of the samples")


def _max_sliced(p: Tensor, q: Tensor, seed: int) -> Measured:
    # On the samples it was chosen by, the largest of many directions is too large.
    draws = seeds.generator(seed, "between/max_sliced")
    direction = max_sliced_wasserstein(p[::2], q[::2], generator=draws).direction
    found = resampled(_line, p[1::2] @ direction, q[1::2] @ direction, draws)
    return Measured(found, "direction found on the other half", "W_2 along one line, units of the samples")


def _line(x: Tensor, y: Tensor) -> float:
    return float(wasserstein_1d(x, y))


def _wasserstein(p: Tensor, q: Tensor, seed: int) -> Measured:
    found = resampled(_line, p, q, seeds.generator(seed, "between/line"))
    return Measured(found, "sorting", "W_2, units of the samples")


def _cauchy_schwarz(p: Tensor, q: Tensor, seed: int) -> Measured:
    found = cauchy_schwarz(p[:_MOST_PAIRS], q[:_MOST_PAIRS])
    return Measured(
        found, "kernel densities, Silverman's bandwidth", "of both distributions smoothed by the kernel, nats"
    )


def _frechet(p: Tensor, q: Tensor, seed: int) -> Measured:
    most = _MOST_PAIRS if p.shape[1] <= _WIDE else _MOST_WIDE
    found = resampled(frechet_distance, p[:most], q[:most], seeds.generator(seed, "between/frechet"))
    return Measured(found, "means and covariances", "W_2² of Gaussian fits, squared units of the samples")


DISTANCES: dict[str, Callable[[Tensor, Tensor, int], Measured]] = {
    "kl_neighbors": _neighbors,
    "reverse_kl_neighbors": _neighbors_reversed,
    "mmd": partial(mmd_of, "gaussian"),
    "energy": _energy,
    "sinkhorn": _sinkhorn,
    "wasserstein": _wasserstein,
    "sliced_wasserstein": _sliced,
    "max_sliced_wasserstein": _max_sliced,
    "frechet": _frechet,
    "cauchy_schwarz": _cauchy_schwarz,
}
"""What needs samples of p and of q, and a seed."""


_NEVER_BELOW_ZERO = ("cauchy_schwarz", "sinkhorn", "kl_neighbors", "reverse_kl_neighbors")


def impossible(name: str, row: Measured) -> str | None:
    """Why an impossible value is not reported; None where it can be.

    Estimates without bias fall below zero by their noise near zero, where they stay.
    """
    found = row.estimate
    if not math.isfinite(found.value):
        return f"came out as {found.value}" + (f": {found.warning}" if found.warning else "")
    if name not in _NEVER_BELOW_ZERO or found.value >= 0 or found.value >= -3 * found.stderr:
        return None
    why = found.warning or "the samples are too few"
    return f"came out as {found.value:.3g}, which is below the minimum 0: {why}"


def stein(x: Tensor, score: Score, seed: int, whose: str) -> Measured:
    """The squared kernel Stein discrepancy of samples to a density known by its score, with its test.

    Args:
        x: Samples (n, d).
        score: The score of the density.
        seed: Of the test.
        whose: In words, whose samples and whose score these are.
    """
    x = x[:_MOST_PAIRS]
    at_x = score(x)
    estimate = kernel_stein(x, at_x)
    draws = seeds.generator(seed, "between/stein")
    test = kernel_stein_test(x[:_MOST_TESTED], at_x[:_MOST_TESTED], generator=draws)
    return Measured(estimate, "U-statistic, imq kernel", f"squared, {whose}", test=test)
