"""Results of the estimators besides value and standard error, and their warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate

_FEW = 50.0  # with fewer samples that really count, a standard error computed from them is itself a guess,
_SHARE = 0.1  # or, of fewer than 500 samples, this part of them

_MASS_TOLERANCE = 1e-3  # the rounding of float32 log-densities of a few thousand nats


@dataclass(frozen=True)
class WeightedEstimate(Estimate):
    """An estimate from weighted samples.

    Attributes:
        ess: The effective sample size (sum w)^2 / sum w^2 of the weights w proportional to p/q: the number
            of samples of p itself that would give a mean of the same accuracy.
    """

    ess: float = math.nan


@dataclass(frozen=True)
class LowerBound(Estimate):
    """An estimate of a lower bound of the divergence, valid for every critic.

    The standard error is that of the bound for this critic: the interval covers the bound, and the
    divergence may be far above it.
    """

    def __str__(self) -> str:
        return f">= {super().__str__()}"


def effective_number(weights: Tensor) -> float:
    """``(sum |w|)^2 / sum w^2``, between 1 and n; n for weights that are all equal (or all zero)."""
    size = weights.abs().double()
    largest = float(size.max())
    if largest == 0.0 or not math.isfinite(largest):
        return float(len(size)) if largest == 0.0 else 1.0
    size = size / largest  # so that the squares neither overflow nor vanish
    return float(size.sum() ** 2 / size.square().sum())


def effective_from_log(log_weights: Tensor) -> float:
    """:func:`effective_number` of ``exp(log_weights)``."""
    return effective_number(torch.exp(log_weights - log_weights.max()))


def mean_error(terms: Tensor) -> float:
    """The standard error of the mean of independent ``terms``, widened for their skewness.

    The plain s / sqrt(n) is too small where a long tail is poorly sampled. By the Edgeworth expansion (Hall,
    The Bootstrap and Edgeworth Expansion, 1992, section 2.6) the 95 % interval then needs 1 + c g^2 / n times
    the width, g the skewness, c = 1.08; c = 2 is taken, because the skewness of a sample is too low as well.
    """
    if not bool(terms.isfinite().all()):
        return math.nan
    n = len(terms)
    return float(terms.std(correction=1)) / math.sqrt(n) * (1.0 + 2.0 * skewness(terms) ** 2 / n)


def skewness(terms: Tensor) -> float:
    """The third standardized moment; 0 for terms that are all equal."""
    centered = terms - terms.mean()
    size = centered.abs().max()
    if not float(size) > 0.0:
        return 0.0
    unit = centered / size
    return float(unit.pow(3).mean() / unit.square().mean().pow(1.5))


def few(n: int) -> float:
    """How many of ``n`` samples must really count."""
    return min(_FEW, _SHARE * n)


def few_warning(terms: Tensor) -> str | None:
    """A warning where few of ``terms`` make up their mean (or, for deviations, their variance)."""
    count = effective_number(terms)
    if count >= few(len(terms)):
        return None
    return f"about {count:.0f} of {len(terms)} samples dominate the mean, so its error is not known"


def mass_warning(excess: Tensor) -> str | None:
    """A warning where the mean of ``excess`` = p/q - 1 over samples of q is not zero, as it must be."""
    mean = float(excess.mean())
    error = mean_error(excess)
    if abs(mean) <= 5.0 * error + _MASS_TOLERANCE:
        return None
    return (
        f"the mean of p/q over samples of q is {1 + mean:.3g} ± {error:.1g}, not 1: the densities are not "
        "normalized, or q has no or too few samples in the support of p"
    )


def joined(*warnings: str | None) -> str | None:
    """The warnings that are there as one text; None without any."""
    found = [w for w in warnings if w]
    return "; ".join(found) if found else None
