"""The drawings of the page, each one small panel, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from distmatch.report.svg import ACCENT, INK, MUTED, RULE, SOFT, TIMES, to_png, to_svg

_RAW_POINTS = 400  # more points than this a small panel cannot show
_SHOWN_SAMPLES = 1000  # points in a scatter panel; more only hide each other
PNG_COLOR = "#0b6e6e"  # the accent of the page, for pictures that stand alone


def panel(width: float = 330.0, height: float = 190.0) -> tuple[Figure, Axes]:
    """An empty panel; width and height are in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr,call-arg]
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=MUTED, pad=5)
    return figure, axes


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers (1, 2 or 5 times a power of ten) between two positive bounds."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**k for k in powers for s in steps if low <= s * 10.0**k <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def _log_axis(axes: Axes, which: str, most: int) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(FixedLocator(_round_ticks(low, high, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("e-0", "e-")))


def _finish_y(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic scale where positive values span a factor of 30, else a linear one."""
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 30 * finite.min():
        _log_axis(axes, "y", 5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}"))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered running mean over ``window`` entries (fewer at the ends); NaN entries do not count.

    Args:
        values: (T,).
        window: Number of entries; an even number is raised by one.
    """
    half = window // 2
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def curve_panel(
    steps: np.ndarray,
    values: np.ndarray,
    alt: str,
    errors: np.ndarray | None = None,
    level: float | None = None,
) -> Markup:
    """One training curve: the logged values pale, their running mean on top.

    Args:
        steps: (T,).
        values: (T,), NaN where unknown.
        alt: Description for the ``<title>``.
        errors: (T,), one standard error of each value, drawn as bars; NaN where unknown.
        level: Height of a dotted guide line, or None.
    """
    figure, axes = panel()
    stride = max(1, len(steps) // _RAW_POINTS)
    if errors is not None:
        at, of, bars = (part[::stride] for part in (steps, values, errors))
        axes.errorbar(at, of, bars, fmt="none", ecolor=MUTED, elinewidth=1.0)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.plot(steps[::stride], values[::stride], color=SOFT, linewidth=1.0)
    mean = smooth(values, max(1, len(values) // 25))
    axes.plot(steps[::stride], mean[::stride], color=ACCENT, linewidth=1.8, solid_capstyle="round")
    if np.isfinite(values).sum() == 1:  # a line through one point is invisible
        axes.plot(steps, values, "o", color=ACCENT, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    _finish_y(axes, values if level is None else np.append(values, level))
    return to_svg(figure, alt)


def noise_panel(
    levels: np.ndarray, series: np.ndarray, alt: str, *, is_sigma: bool, level: float | None
) -> Markup:
    """Averages by noise level, one line for each period of training.

    Args:
        levels: (bins,) noise levels sigma, or bin numbers.
        series: (periods, bins), early first, at most four periods; NaN where a bin was empty.
        alt: Description for the ``<title>``.
        is_sigma: Whether ``levels`` are sigmas, drawn on a logarithmic axis.
        level: Height of a dotted guide line, or None.
    """
    figure, axes = panel(390.0, 230.0)
    for color, values in zip(TIMES[-len(series) :], series, strict=True):
        axes.plot(levels, values, "o-", color=color, linewidth=1.8, markersize=3.5, markeredgewidth=0)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    if is_sigma:
        _log_axis(axes, "x", 7)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("noise level σ" if is_sigma else "noise bin", color=MUTED, fontsize=11)
    _finish_y(axes, series.ravel())
    return to_svg(figure, alt)


def plane(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plane on which vectors are shown: the axes themselves up to two, else the two main ones.

    Args:
        reference: (N, D) the samples whose first two principal axes are taken when D > 2.

    Returns:
        Origin (D,) and axes (D, min(D, 2)): the picture of ``x`` is ``(x - origin) @ axes``.
    """
    x = np.asarray(reference, dtype=np.float64)
    x = x[np.isfinite(x).all(axis=1)]
    dims = reference.shape[1]
    if dims <= 2 or len(x) < 2:
        return np.zeros(dims), np.eye(dims)[:, : min(dims, 2)]
    mean = x.mean(axis=0)
    # eigh gives ascending order and free signs; the largest entry of each axis is made positive
    axes = np.linalg.eigh((x - mean).T @ (x - mean))[1][:, ::-1][:, :2]
    return mean, axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])


def frame(points: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Limits that hold 99.8% of each coordinate of each set, with a margin and equal spans.

    Args:
        points: Sets of shape (N, D), finite.

    Returns:
        Lower and upper limits, (D,) each.
    """
    low = np.min([np.quantile(p, 0.001, axis=0) for p in points], axis=0)
    high = np.max([np.quantile(p, 0.999, axis=0) for p in points], axis=0)
    half = np.full_like(low, 0.56 * max(float((high - low).max()), 1e-6))  # equal spans: circles stay circles
    return (low + high) / 2 - half, (low + high) / 2 + half


def scatter_panel(
    points: np.ndarray, behind: np.ndarray | None, limits: tuple[np.ndarray, np.ndarray], alt: str
) -> Markup:
    """Samples in the plane (or on a line: a histogram), over the reference drawn pale.

    Args:
        points: (N, 2) or (N, 1); of more than a thousand every second, third... is drawn.
        behind: The reference in the same plane, or None.
        limits: What :func:`frame` returned.
        alt: Description for the ``<title>``.
    """
    (low, high), dims = limits, points.shape[1]
    figure, axes = panel(320.0, 320.0 if dims == 2 else 200.0)
    if dims == 1:
        edges = np.linspace(low[0], high[0], 61)
        for values, color, fill in ((behind, RULE, True), (points, ACCENT, False)):
            if values is not None:
                counts = np.histogram(values[:, 0], edges)[0] / (len(values) * (edges[1] - edges[0]))
                axes.stairs(counts, edges, color=color, fill=fill, linewidth=1.5)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        for values, color, size in ((behind, RULE, 3.0), (points, ACCENT, 2.4)):
            if values is not None:
                shown = values[:: -(-len(values) // _SHOWN_SAMPLES)]
                axes.plot(*shown.T, "o", color=color, markersize=size, markeredgewidth=0, alpha=0.75)
        axes.set_ylim(low[1], high[1])
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlim(low[0], high[0])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return to_svg(figure, alt)


def scatter_png(x: np.ndarray) -> bytes:
    """Vectors (N, D) as the bytes of a PNG picture: a scatter of two axes, or a histogram of one."""
    origin, axes = plane(x)
    points = ((x - origin) @ axes)[np.isfinite(x).all(axis=1)]
    low, high = frame([points]) if len(points) else (np.zeros(2), np.ones(2))
    figure = Figure(figsize=(5, 5), layout="constrained")
    inside = figure.add_subplot()
    if points.shape[1] == 1:
        inside.hist(points[:, 0], bins=60, range=(low[0], high[0]), color=PNG_COLOR)
    else:
        inside.plot(*points.T, "o", color=PNG_COLOR, markersize=2.4, markeredgewidth=0, alpha=0.6)
        inside.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    return to_png(figure)
