"""Do generated data reach as far out as real data: radii, exceedances at matched quantiles, tail index.

A one-step generator is a Lipschitz image of a Gaussian, so its norms concentrate; data with heavier tails are
out of its reach, and this check shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate

SHARES = (0.99, 0.9, 0.5, 0.1, 0.01)


@dataclass(frozen=True)
class Exceedance:
    """The share of the generated data beyond a quantile of the real data.

    Attributes:
        real: Share of the real data at or beyond the radius.
        radius: The real order statistic that is the threshold.
        generated: Share of the generated data beyond it.
        log_ratio: log(generated / real) with the error of both shares; value -inf when none is beyond.
        p_value: Two-sided and exact, whatever the distribution, if both sets come from one.
    """

    real: float
    radius: float
    generated: float
    log_ratio: Estimate
    p_value: float


@dataclass(frozen=True)
class TailCheck:
    """Radii of generated against real data.

    Attributes:
        exceedances: One for each share.
        p_value: Smallest p-value of the exceedances times their number (Bonferroni), at most 1.
        spread: log of the ratio of the radii's standard deviations, generated over real: below 0 the
            generated data are more concentrated on a shell. Its error needs a finite fourth moment.
        index_generated: Tail index of the generated radii: positive for power laws, 0 for exponential and
            Gaussian tails, negative for bounded data.
        index_real: The same of the real radii.
        index_p_value: Two-sided, of equal indices; asymptotic.
    """

    exceedances: tuple[Exceedance, ...]
    p_value: float
    spread: Estimate
    index_generated: Estimate
    index_real: Estimate
    index_p_value: float


def tail_check(
    generated: Tensor,
    real: Tensor,
    *,
    radius: Literal["mahalanobis", "norm"] = "mahalanobis",
    shares: Sequence[float] = SHARES,
    tail: float = 0.05,
    ridge: float = 1e-3,
) -> TailCheck:
    """Compares how far out two sets of samples reach.

    The center and the covariance are those of both sets together. That is symmetric in them, so samples of
    one distribution stay exchangeable, and the number of generated radii above the k-th largest of n real
    ones is beta-binomial with parameters (k, n + 1 - k), exactly, for any continuous distribution.

    Args:
        generated: (m, *shape), m of 20 or more.
        real: (n, *shape), held out from training, n of 20 or more.
        radius: ``"mahalanobis"`` measures in units of the pooled covariance, ``"norm"`` in plain distance.
        shares: Shares of the real data beyond the thresholds, each between 0 and 1.
        tail: Share of each set that the tail index uses.
        ridge: Part of the mean variance that is added to each for the Mahalanobis radius.

    Raises:
        UserError: Sets that do not fit, too few samples, or shares outside (0, 1).
    """
    m, n = len(generated), len(real)
    if generated.shape[1:] != real.shape[1:] or min(m, n) < 20:
        raise UserError(
            "a tail check needs two sets of like samples, 20 or more each",
            got=f"{tuple(generated.shape)} and {tuple(real.shape)}",
        )
    if not shares or not all(0 < s < 1 for s in shares) or not 0 < tail < 1:
        raise UserError("shares must lie between 0 and 1", got=f"shares={tuple(shares)}, tail={tail}")
    ours, theirs = _radii(generated, real, radius, ridge).split([m, n])
    rows = tuple(_exceedance(ours, theirs, share) for share in shares)
    spreads = [_log_spread(r) for r in (ours, theirs)]
    spread = Estimate(spreads[0].value - spreads[1].value, math.hypot(*(s.stderr for s in spreads)), m)
    index = [tail_index(r, max(5, round(tail * len(r)))) for r in (ours, theirs)]
    distance = abs(index[0].value - index[1].value) / math.hypot(*(i.stderr for i in index))
    return TailCheck(
        rows,
        min(1.0, len(rows) * min(row.p_value for row in rows)),
        spread,
        index[0],
        index[1],
        math.erfc(distance / math.sqrt(2)),
    )


def tail_index(values: Tensor, k: int) -> Estimate:
    """The moment estimator of the extreme-value index (Dekkers, Einmahl and de Haan 1989).

    With M_j the mean of (log X_i - log X_k)^j over the k largest, M_1 + 1 - 1 / (2 (1 - M_1^2 / M_2)). Unlike
    Hill's M_1 it also sees bounded tails. It is biased while k reaches into the body of the distribution, so
    compare two sets at the same share rather than reading it alone.

    Args:
        values: Positive numbers, (n,).
        k: How many of the largest to use, from 5 to n - 1.

    Raises:
        UserError: k out of range, or no positive threshold.
    """
    n = len(values)
    if not 5 <= k < n:
        raise UserError("the tail index needs 5 or more of the values and not all", got=f"k={k} of {n}")
    top = values.double().topk(k + 1).values
    if float(top[-1]) <= 0:
        raise UserError("the tail index needs positive values", got=float(top[-1]))
    excess = (top[:-1] / top[-1]).log()
    first, second = float(excess.mean()), float(excess.square().mean())
    if second == 0 or first**2 >= second:
        return Estimate(math.nan, math.nan, k, "the largest values are all equal")
    index = first + 1 - 0.5 / (1 - first**2 / second)
    return Estimate(index, math.sqrt(_variance(index) / k), k)


def _variance(index: float) -> float:
    """The asymptotic variance of the moment estimator (the same paper) times k."""
    if index >= 0:
        return 1 + index**2
    g = index
    inner = 4 - 8 * (1 - 2 * g) / (1 - 3 * g) + (5 - 11 * g) * (1 - 2 * g) / ((1 - 3 * g) * (1 - 4 * g))
    return (1 - g) ** 2 * (1 - 2 * g) * inner


def _radii(generated: Tensor, real: Tensor, radius: str, ridge: float) -> Tensor:
    """Distances from the common mean, (m + n,) float64 on the CPU."""
    check_name("radius", radius, ("mahalanobis", "norm"))
    both = torch.cat([generated.flatten(1).double(), real.flatten(1).double().to(generated.device)])
    centered = both - both.mean(0)
    if radius == "norm":
        return centered.norm(dim=1).cpu()
    covariance = centered.T @ centered / len(centered)
    floor = ridge * float(covariance.diagonal().mean())
    if floor == 0 and float(covariance.diagonal().mean()) == 0:
        raise UserError("all samples are equal", fix="check that the generator works")
    values, vectors = torch.linalg.eigh(covariance)
    return ((centered @ vectors) / (values.clamp_min(0) + floor).sqrt()).norm(dim=1).cpu()


def _exceedance(ours: Tensor, theirs: Tensor, share: float) -> Exceedance:
    m, n = len(ours), len(theirs)
    k = min(max(1, round(share * n)), n)
    threshold = float(theirs.topk(k).values[-1])
    count = int((ours > threshold).sum())
    null = stats.betabinom(m, k, n + 1 - k)
    p = min(1.0, 2 * min(float(null.cdf(count)), float(null.sf(count - 1))))
    real, generated = k / n, count / m
    value = math.log(generated / real) if count else -math.inf
    variance = (1 - generated) / count + (1 - real) / k if count else math.nan
    return Exceedance(real, threshold, generated, Estimate(value, math.sqrt(variance), m), p)


def _log_spread(radii: Tensor) -> Estimate:
    """The log of the standard deviation; by the delta method its variance is (kurtosis - 1) / (4 n)."""
    n = len(radii)
    centered = radii - radii.mean()
    variance = float(centered.square().mean())
    if variance == 0:
        return Estimate(-math.inf, math.nan, n, "all radii are equal")
    kurtosis = float((centered**4).mean()) / variance**2
    return Estimate(0.5 * math.log(variance), math.sqrt(max(kurtosis - 1, 0) / (4 * n)), n)
