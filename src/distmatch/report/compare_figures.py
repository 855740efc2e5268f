"""Quality against diversity: every method with its errors, and the Pareto front through the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distmatch.base.estimate import Estimate
from distmatch.report.figures import panel
from distmatch.report.svg import ACCENT, INK, MUTED, SOFT, to_svg

_FAR = 4.0
"""A value is far from the others at so many interquartile ranges from the nearer quartile."""


@dataclass(frozen=True)
class Point:
    """A point of the plot.

    Attributes:
        label: Written next to it.
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

    A point far from all others is an arrow at the edge, pointing towards it, with its value.

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
    axes.margins(0.12)
    kept = _near([p.x.value for p in points]) & _near([p.y.value for p in points])
    for p, near in zip(points, kept, strict=True):
        if near:
            _mark(axes, p, (p.x.value, p.y.value), "o" if p.is_method else "D")
    sides = axes.get_xlim(), axes.get_ylim()

    def shown(p: Point) -> tuple[float, float]:
        return float(np.clip(p.x.value, *sides[0])), float(np.clip(p.y.value, *sides[1]))

    for p, near in zip(points, kept, strict=True):
        if not near and np.isfinite(p.x.value + p.y.value):
            _mark(axes, p, shown(p), _arrow(p, shown(p), lower_is_better))
    front = sorted(shown(p) for p in points if p.on_front)
    if front:
        axes.step(*zip(*front, strict=True), where="pre", color=SOFT, linewidth=1.6, zorder=0)
    axes.set_xlim(*sides[0])
    axes.set_ylim(*sides[1])
    if lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel(f"{x_title} →", color=MUTED, fontsize=11)
    axes.set_ylabel(f"{y_title} →" + (" (lower is up)" if lower_is_better else ""), color=MUTED, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return to_svg(figure, alt)


def _mark(axes: Axes, point: Point, at: tuple[float, float], marker: str) -> None:
    """A point with its errors and its name, or with its values if it is drawn at the edge."""
    color = (ACCENT if point.on_front else INK) if point.is_method else MUTED
    outside = at != (point.x.value, point.y.value)
    axes.errorbar(
        *at,
        xerr=None if outside else _bar(point.x),
        yerr=None if outside else _bar(point.y),
        fmt=marker,
        color=color,
        markersize=5,
        elinewidth=1.0,
        clip_on=not outside,
    )
    left, right = axes.get_xlim()
    turned = outside and at[0] > (left + right) / 2
    axes.annotate(
        f"{point.label} ({point.x.value:.3g}, {point.y.value:.3g})" if outside else point.label,
        at,
        # The teacher often lies on the real data: its name goes below, theirs above.
        xytext=(-6 if turned else 6, -13 if point.label == "Teacher" else 5),
        textcoords="offset points",
        ha="right" if turned else "left",
        color=color,
        fontsize=12,
    )


def _arrow(point: Point, shown: tuple[float, float], turned: bool) -> str:
    """The marker at the edge that points towards an outlier, by the axis that it exceeds."""
    if point.x.value != shown[0]:
        return "<" if point.x.value < shown[0] else ">"
    return "v" if (point.y.value < shown[1]) != turned else "^"


def _near(values: Sequence[float]) -> np.ndarray:
    """The values that are not outliers, which would compress the others."""
    found = np.array(values)
    finite = np.isfinite(found)
    if not finite.any():
        return finite
    low, high = np.quantile(found[finite], (0.25, 0.75))
    away = np.where(finite, np.maximum(low - found, found - high), np.inf)
    return finite & ((away <= _FAR * (high - low)) | (high == low))


def _bar(value: Estimate) -> float | None:
    return value.stderr if np.isfinite(value.stderr) else None
