"""The contribution beyond the largest sample, from a Pareto tail fitted to the largest ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.divergences.estimators.results import few_warning, joined, mean_error

_LEAST = 5  # exceedances that a fit needs
_SMALL = 0.1  # of the standard error: a tail that adds less does no harm
_HEAVY = 0.5  # Pareto index from which the variance is infinite
_LOG_MAX = 700.0  # exp of it is finite in float64
_REACH = torch.linspace(0.0, 30.0, 301, dtype=torch.float64)  # minus log of the share of the part beyond


@dataclass(frozen=True)
class ParetoTail:
    """P(X > threshold + y | X > threshold) = (1 + index y / scale)^(-1 / index).

    Attributes:
        threshold: Where the tail begins.
        scale: Its width, 0 where there is no tail.
        index: Positive for power laws, whose moments exist up to order 1 / index; 0 for exponential tails,
            negative for tails that end.
        count: Samples in the tail.
    """

    threshold: float
    scale: float
    index: float
    count: int

    def beyond(self) -> Tensor:
        """Values at which the tail is exceeded by ``exp(-_REACH)`` of one sample in expectation, (301,)."""
        log_odds = math.log(self.count) + _REACH
        if abs(self.index) < 1e-6:
            return self.threshold + self.scale * log_odds
        return self.threshold + self.scale / self.index * torch.expm1(self.index * log_odds)


@dataclass(frozen=True)
class Unseen:
    """The contribution beyond the samples to the mean of a function of them.

    Attributes:
        amount: What values beyond the largest sample add to the mean in expectation, without its sign.
        index: The Pareto index of the function in the tail; from 1/2 on its variance is infinite.
    """

    amount: float
    index: float


def pareto_tail(values: Tensor) -> ParetoTail:
    """Fits a generalized Pareto distribution to the min(n / 5, 3 sqrt n) largest of ``values``.

    The density is (1 + b y)^(-1/k - 1) b / k with b = k / scale. For a given b the likelihood is largest at
    k = mean log(1 + b y), where its logarithm is count (log(b / k) - k - 1); b is averaged over a grid with
    these weights (Zhang and Stephens, Technometrics 51, 2009). The number of samples is that of Vehtari,
    Simpson, Gelman, Yao and Gabry, arXiv 1507.02646.

    Args:
        values: Finite float64 numbers (n,).
    """
    size = math.ceil(min(len(values) / 5, 3 * math.sqrt(len(values))))
    top = values.topk(min(size + 1, len(values))).values
    threshold = top[-1]
    excess = (top - threshold).flip(0)
    excess = excess[excess > 0]
    count = len(excess)
    if count < _LEAST:
        return ParetoTail(float(threshold), 0.0, 0.0, count)
    largest = excess[-1]
    unit = excess / largest
    points = 30 + int(math.sqrt(count))
    step = torch.arange(1, points + 1, dtype=unit.dtype, device=unit.device) - 0.5
    # From -1 / max, where the tail ends at the largest sample, to far above 1 / (first quartile).
    b = (torch.sqrt(points / step) - 1.0) / (3.0 * unit[count // 4].clamp(min=1e-12)) - 1.0
    k = torch.log1p(b[:, None] * unit).mean(1)
    weight = torch.softmax(count * (torch.log(b / k) - k), 0)
    chosen = (weight * b).sum()
    index = float(torch.log1p(chosen * unit).mean())
    return ParetoTail(float(threshold), index / float(chosen) * float(largest), index, count)


def unseen(values: Tensor, influence: Callable[[Tensor], Tensor]) -> Unseen:
    """The contribution beyond the largest of ``values`` to the mean of their ``influence``.

    Args:
        values: Samples (n,), finite and float64.
        influence: Maps values to what each adds to n times the estimate; also asked far beyond them.
    """
    tail = pareto_tail(values)
    if tail.scale == 0.0:
        return Unseen(0.0, 0.0)
    # With one sample in n beyond the largest: (1/n) int_0^1 influence(quantile(v)) dv, at v = e^-y.
    terms = influence(tail.beyond()) * torch.exp(-_REACH)
    amount = abs(float(torch.trapezoid(terms, _REACH))) / len(values)
    # How fast it grows, as a power of the value; logarithms come out as 0.
    far = influence(torch.exp(torch.tensor([20.0, 40.0], dtype=torch.float64))).abs().log()
    power = max(0.0, round(float(far[1] - far[0]) / 20.0, 1))
    return Unseen(
        amount if math.isfinite(amount) else math.inf,
        max(0.0, tail.index) * power if math.isfinite(power) else math.inf,
    )


def both_tails(log_r: Tensor, influence: Callable[[Tensor], Tensor]) -> tuple[Unseen, Unseen]:
    """:func:`unseen` beyond the largest and beyond the smallest r, for a function of log r.

    Args:
        log_r: Log-ratios (n,), float64; -inf is taken as -700.
        influence: Maps log-ratios to what each adds to n times the estimate.
    """
    held = log_r.clamp(-_LOG_MAX, _LOG_MAX)
    return (
        unseen(held.exp(), lambda r: influence(r.log())),
        unseen((-held).exp(), lambda s: influence(-s.log())),
    )


def judged(terms: Tensor, *tails: Unseen) -> tuple[float, str | None]:
    """The standard error of the mean of ``terms``, and a warning where it is not known.

    The contribution beyond the largest samples is missing from most means and too large in the others; it
    is joined in quadrature. Beyond one standard error, or where the variance is infinite, it is not known.

    Args:
        terms: What each sample adds, (n,).
        tails: What is unseen of them.
    """
    error, amount = mean_error(terms), math.hypot(*(t.amount for t in tails))
    index = max((t.index for t in tails if t.amount > _SMALL * error), default=0.0)
    return math.hypot(error, amount), joined(
        few_warning(terms),
        f"the terms have a tail of Pareto index {index:.2g}, so their variance may be infinite"
        if index >= _HEAVY
        else None,
        f"values beyond the largest observed one may add {amount:.2g}, more than the standard error shows"
        if amount > error
        else None,
    )
