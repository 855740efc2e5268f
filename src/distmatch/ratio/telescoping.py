"""The telescoping ratio: a product of easy ratios between waypoints from p to q.

Waypoint k mixes pairs of samples, x_k = cos(t_k) x_p + sin(t_k) x_q with 0 = t_0 < ... < t_m = pi/2, and
log p/q = sum of the log-ratios of neighboring waypoints (Rhodes, Xu and Gutmann, arXiv 2006.12204).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_count
from distmatch.ratio.logistic import ClassifierSettings, balanced_accuracy, fit_classifier, fit_regression
from distmatch.ratio.samples import Fitted, LogRatio, split

_EASY = 0.8  # a bridge that a regression crosses more often than this is halved
_TOO_HARD = 0.95
_MOST_BRIDGES = 64
_HALVINGS = 40  # of one interval: a ratio of scales of 1e12


@dataclass(frozen=True)
class TelescopingSettings:
    """The options of the waypoints.

    Attributes:
        bridges: Number of bridges at equal angles; None halves those that are too hard until none is.
        classifier: How each bridge is fitted.
    """

    bridges: int | None = None
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)

    def __post_init__(self) -> None:
        check_count("the number of bridges", 1 if self.bridges is None else self.bridges, 1, _MOST_BRIDGES)


def fit_telescoping(p: Tensor, q: Tensor, settings: TelescopingSettings, seed: int) -> Fitted:
    """Fits the sequence of classifiers.

    Args:
        p: Samples of p, (n, d) float64, standardized.
        q: Samples of q, (m, d), likewise.
        settings: The settings.
        seed: Seed of the pairing and of the classifiers.
    """
    n = max(len(p), len(q))
    stream = seeds.generator(seed, "ratio/pairs")
    first, last = _stretched(p, n, stream), _stretched(q, n, stream)
    if settings.bridges is None:
        angles = _easy_angles(first, last, seed)
    else:
        angles = [0.5 * math.pi * k / settings.bridges for k in range(settings.bridges + 1)]
    bridges: list[LogRatio] = []
    hardest, chosen = 0.5, {}
    for k in range(len(angles) - 1):
        start, end = _waypoint(first, last, angles[k]), _waypoint(first, last, angles[k + 1])
        center, scale = _scaling(start, end)
        fitted = fit_classifier(
            (start - center) / scale,
            (end - center) / scale,
            settings.classifier,
            seeds.stream_seed(seed, f"{k}"),
        )
        bridges.append(lambda x, log_r=fitted.log_r, c=center, s=scale: log_r((x - c) / s))  # type: ignore[misc]
        hardest = max(hardest, float(fitted.chosen["accuracy"]))
        chosen = {"model": fitted.chosen["model"], "calibration": fitted.chosen["calibration"]}
    chosen |= {"bridges": len(bridges), "hardest_accuracy": hardest}
    warnings = []
    if hardest > _TOO_HARD:
        warnings.append(f"the hardest bridge is classified with accuracy {hardest:.1%}: use more bridges")
    return Fitted(lambda x: torch.stack([bridge(x) for bridge in bridges]).sum(0), chosen, tuple(warnings))


def _stretched(x: Tensor, n: int, stream: torch.Generator) -> Tensor:
    """The samples in random order, (n, d), repeated if there are fewer than ``n``."""
    orders = [torch.randperm(len(x), generator=stream) for _ in range(-(-n // len(x)))]
    return x[torch.cat(orders)[:n].to(x.device)]


def _waypoint(first: Tensor, last: Tensor, angle: float) -> Tensor:
    return math.cos(angle) * first + math.sin(angle) * last


def _scaling(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([start, end])
    scale = both.std(0)
    return both.mean(0), torch.where(scale > 0, scale, torch.ones_like(scale))


def _easy_angles(first: Tensor, last: Tensor, seed: int) -> list[float]:
    """Angles from 0 to pi/2, halved wherever a quadratic regression separates the two ends too well."""
    train, held = split(len(first), 0.5, seeds.generator(seed, "ratio/angles"), first.device)

    def accuracy(low: float, high: float) -> float:
        start, end = _waypoint(first, last, low), _waypoint(first, last, high)
        center, scale = _scaling(start, end)
        start, end = (start - center) / scale, (end - center) / scale
        log_r = fit_regression(start[train], end[train], "quadratic")
        return balanced_accuracy(log_r(start[held]), log_r(end[held]))

    done = [0.0]
    waiting = [0.5 * math.pi]
    while waiting:
        low, high = done[-1], waiting[-1]
        room = len(done) + len(waiting) <= _MOST_BRIDGES
        if room and high - low > 0.5**_HALVINGS and accuracy(low, high) > _EASY:
            waiting.append(0.5 * (low + high))
        else:
            done.append(waiting.pop())
    return done
