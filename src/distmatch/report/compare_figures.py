"""Quality against diversity: every method with its errors, and the Pareto front through the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from distmatch.base.estimate import Estimate
from distmatch.report.figures import panel
from distmatch.report.svg import ACCENT, INK, MUTED, SOFT, to_svg

_FAR = 10.0
"""A value is far from the others at so many times their median distance from the middle."""


@dataclass(frozen=True)
class Point:
    """A point of the plot.

    Attributes:
        label: Written beside it.
        x: Diversity.
        y: Quality.
        on_front: Whether no method beats it in both.
        is_method: False for real data and the teacher, which are drawn for orientation.
    """

    label: str
    x: Estimate
    y: Estimate
    on_front: bool
    is_method: bool


def front_panel(
    points: Sequence[Point], x_title: str, y_title: str, alt: str, *, lower_is_better: bool
) -> Markup:
    """All points with one standard error each way, the front as a staircase.

    A point far from all others is an arrow at the edge, towards where it lies, with its value.

    Args:
        points: What to draw.
        x_title: Name of the diversity, of which more is better.
        y_title: Name of the quality.
        alt: Description for the ``<title>``.
        lower_is_better: Whether less of the quality is better; the axis is then turned, so that the upper
            right corner is the best one in every panel.
    """
    figure, axes = panel(420.0, 320.0)
    axes.grid(axis="x", color=axes.get_ygridlines()[0].get_color(), linewidth=0.7)
    across = _window([p.x.value for p in points])
    upward = _window([p.y.value for p in points])
    front = sorted((np.clip(p.x.value, *across), np.clip(p.y.value, *upward)) for p in points if p.on_front)
    if front:
        axes.step(*zip(*front, strict=True), where="pre", color=SOFT, linewidth=1.6)
    for p in points:
        colour = (ACCENT if p.on_front else INK) if p.is_method else MUTED
        x, y = np.clip(p.x.value, *across), np.clip(p.y.value, *upward)
        outside = bool(np.isfinite(x + y)) and (x, y) != (p.x.value, p.y.value)
        axes.errorbar(
            *(x, y),
            xerr=None if outside else _bar(p.x),
            yerr=None if outside else _bar(p.y),
            fmt=_arrow(p, (x, y), lower_is_better) if outside else "o" if p.is_method else "D",
            color=colour,
            markersize=5,
            elinewidth=1.0,
        )
        right = outside and across[0] < x and x > (across[0] + across[1]) / 2
        axes.annotate(
            f"{p.label} ({p.x.value:.3g}, {p.y.value:.3g})" if outside else p.label,
            (x, y),
            xytext=(-6 if right else 6, 5),
            textcoords="offset points",
            ha="right" if right else "left",
            color=colour,
            fontsize=12,
        )
    if lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel(f"{x_title} →", color=MUTED, fontsize=11)
    axes.set_ylabel(f"{y_title} →" + (" (lower is up)" if lower_is_better else ""), color=MUTED, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.margins(0.12)
    return to_svg(figure, alt)


def _arrow(point: Point, shown: tuple[float, float], turned: bool) -> str:
    """The marker that points from the edge to where the point lies, by the axis that it is off."""
    if point.x.value != shown[0]:
        return "<" if point.x.value < shown[0] else ">"
    return "v" if (point.y.value < shown[1]) != turned else "^"


def _window(values: Sequence[float]) -> tuple[Any, Any]:
    """The range of the values without those that lie far from all others, which would press them together."""
    found = np.array(values)
    found = found[np.isfinite(found)]
    if not len(found):
        return -np.inf, np.inf
    away = np.abs(found - np.median(found))
    kept = found[away <= _FAR * np.median(away)] if np.median(away) > 0 else found
    room = 0.25 * np.ptp(kept)
    return max(kept.min() - room, found.min()), min(kept.max() + room, found.max())


def _bar(value: Estimate) -> float | None:
    return value.stderr if np.isfinite(value.stderr) else None
