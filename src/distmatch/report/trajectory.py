"""The picture of a model's predictions along its trajectory, and of when the layout is determined."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter
from PIL import Image

from distmatch.report.figures import frame, plane
from distmatch.report.grid import MOST_FRAMES, animation, image_grid
from distmatch.report.sequences import curve_limits
from distmatch.report.svg import to_png

_COLUMNS = 10  # levels shown as images; more would be too small to see
_PATHS = 60  # paths of vectors drawn; more hide each other
_TILE = 0.62  # inches
_COARSE, _DETAIL, _DARK, _PALE = "#0b6e6e", "#b3812f", "#333333", "#c9c9c9"


@dataclass(frozen=True)
class Way:
    """What is drawn.

    Attributes:
        levels: Noise levels, decreasing, (S,).
        x0: Predictions at each level: images (S, R, H, W[, C]) or video (S, R, T, H, W, C), uint8; vectors
            (S, R, D) or sequences (S, R, L, D), floats.
        detail: Share of the samples that is still open at each level, (S,).
        layout: The same of the coarse image, (S,).
        marks: Shares of the layout, such as 0.5, and the noise level at which that much is determined.
        beside: Further samples from the same noise, by name, without the first axis.
    """

    levels: np.ndarray
    x0: np.ndarray
    detail: np.ndarray
    layout: np.ndarray
    marks: Mapping[float, float]
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)


def trajectory_png(way: Way) -> bytes:
    """The bytes of a PNG picture.

    Images and sequences: a row a sample, a column a level, the curves below on the same axis; video is
        animated. Vectors: the paths of the predictions in the plane, and the curves next to it.

    Args:
        way: What to draw.
    """
    if way.x0.ndim == 6:
        return animation([Image.open(io.BytesIO(trajectory_png(frame))) for frame in _frames(way)])
    return to_png(_of_images(way) if way.x0.ndim > 3 else _of_vectors(way))


def _frames(way: Way) -> Iterator[Way]:
    """The frames of video, each as a way of images."""
    for t in range(min(way.x0.shape[2], MOST_FRAMES)):
        beside = {name: samples[:, t] for name, samples in way.beside.items()}
        yield replace(way, x0=way.x0[:, :, t], beside=beside)


def _of_images(way: Way) -> Figure:
    shown = np.unique(np.linspace(0, len(way.levels) - 1, min(_COLUMNS, len(way.levels))).round().astype(int))
    rows = way.x0.shape[1]
    columns = len(shown) + 1.25 * len(way.beside)
    # Placed by hand in inches, so that the curve's axis is that of the columns.
    width, height = _TILE * columns + 0.8, _TILE * (rows + 0.35) + 2.35
    figure = Figure(figsize=(width, height))
    left, across = 0.65 / width, _TILE * columns / width
    top = figure.add_axes((left, 2.1 / height, across, _TILE * (rows + 0.35) / height))
    bottom = figure.add_axes((left, 0.45 / height, across, 1.5 / height))
    centers = np.arange(len(shown)) + 0.5
    draw = _column if way.x0.dtype == np.uint8 else partial(_curve_column, limits=_limits(way.x0))
    for center, step in zip(centers, shown, strict=True):
        draw(top, way.x0[step], center)
        top.text(center, rows + 0.06, f"{way.levels[step]:.3g}", ha="center", va="bottom", fontsize=7.5)
    for number, (name, samples) in enumerate(way.beside.items()):
        center = len(shown) + 0.75 + 1.25 * number
        draw(top, samples, center)
        top.text(center, rows + 0.06, name, ha="center", va="bottom", fontsize=7.5, color=_COARSE)
    top.set(xlim=(0, columns), ylim=(0, rows + 0.35))
    top.set_axis_off()
    top.set_title("predicted sample at noise level σ", fontsize=9, color=_DARK)

    def place(levels: np.ndarray) -> np.ndarray:
        """The positions of noise levels on the axis of the columns."""
        return np.interp(-np.log(levels), -np.log(way.levels[shown]), centers)

    _curves(bottom, way, place(way.levels))
    _marks(bottom, way, place)
    bottom.set_xlim(0, columns)
    bottom.xaxis.set_major_locator(FixedLocator(centers.tolist()))
    bottom.set_xticklabels([f"{v:.3g}" for v in way.levels[shown]], fontsize=7.5)
    bottom.set_xlabel("noise level σ", fontsize=8, color=_DARK)
    return figure


def _column(axes: Axes, images: np.ndarray, center: float) -> None:
    """Images below each other, each in a unit square."""
    for row, image in enumerate(images):
        bottom = len(images) - 1 - row
        tile = np.asarray(image_grid(image[None], 1))
        height, width = (side / max(tile.shape[:2]) * 0.47 for side in tile.shape[:2])
        middle = bottom + 0.5
        axes.imshow(tile, extent=(center - width, center + width, middle - height, middle + height))


def _limits(x0: np.ndarray) -> np.ndarray:
    """Limits (channels, 2) of the curves of sequences (S, R, L, D)."""
    return curve_limits([x0.reshape(-1, *x0.shape[2:])])


def _curve_column(axes: Axes, sequences: np.ndarray, center: float, *, limits: np.ndarray) -> None:
    """Sequences (R, L, D) as curves below each other, each in a unit square."""
    across = center + np.linspace(-0.45, 0.45, sequences.shape[1])
    for row, sequence in enumerate(sequences):
        bottom = len(sequences) - 1 - row
        for (low, high), values, color in zip(limits, sequence.T, (_COARSE, _DETAIL, _DARK), strict=False):
            share = np.clip((values - low) / (high - low), 0, 1)
            axes.plot(across, bottom + 0.06 + 0.88 * share, color=color, linewidth=0.8)


def _of_vectors(way: Way) -> Figure:
    steps, count, dims = way.x0.shape
    origin, axes = plane(way.x0[-1])
    paths = (way.x0[:, :_PATHS] - origin) @ axes
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    ends = paths[-1]
    beside = {name: (points[:_PATHS] - origin) @ axes for name, points in way.beside.items()}
    if min(2, dims) == 1:
        height = np.arange(steps)
        left.plot(paths[:, :, 0], height, color=_COARSE, linewidth=0.7, alpha=0.6)
        left.set(xlabel="predicted sample", yticks=[0, steps - 1], yticklabels=["start", "end"])
        for (name, points), marker in zip(beside.items(), "x+", strict=False):
            left.plot(points[:, 0], np.full(len(points), steps - 1), marker, label=name, color=_DETAIL)
    else:
        left.plot(paths[:, :, 0], paths[:, :, 1], color=_COARSE, linewidth=0.6, alpha=0.5)
        left.plot(*ends.T, "o", color=_COARSE, markersize=3, markeredgewidth=0, label="end")
        for (name, points), marker in zip(beside.items(), "x+", strict=False):
            for a, b in zip(ends, points, strict=True):
                left.plot(*np.stack([a, b]).T, color=_PALE, linewidth=0.5, zorder=0)
            left.plot(*points.T, marker, color=_DETAIL, markersize=4, label=name)
        low, high = frame([paths.reshape(-1, 2), *beside.values()])
        left.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    left.set_title(f"paths of the predicted sample, {min(count, _PATHS)} shown", fontsize=9, color=_DARK)
    if beside:
        left.legend(fontsize=7.5, frameon=False, loc="upper right")
    left.tick_params(labelsize=7.5)
    _curves(right, way, way.levels)
    right.set_xscale("log")
    right.set_xlim(way.levels[0], way.levels[-1])
    right.xaxis.set_minor_formatter(NullFormatter())
    _marks(right, way, lambda levels: levels)
    right.set_xlabel("noise level σ", fontsize=8, color=_DARK)
    return figure


def _curves(axes: Axes, way: Way, at: np.ndarray) -> None:
    """What is still open at each level."""
    lines: Sequence[tuple[np.ndarray, str, str]] = ((way.layout, _COARSE, "of the layout"),)
    if not np.allclose(way.detail, way.layout):
        lines = ((way.detail, _DETAIL, "of all detail"), *lines)
    for values, color, name in lines:
        axes.plot(at, values, "o-", color=color, markersize=2.5, linewidth=1.4, label=name)
    axes.set_ylim(0, 1.04 * max(1.0, float(way.layout.max()), float(way.detail.max())))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.1, 0.5, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.xaxis.set_minor_locator(NullLocator())
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_ylabel("still open", fontsize=8, color=_DARK)
    if len(lines) > 1:
        axes.legend(fontsize=7.5, frameon=False, loc="lower left")


def _marks(axes: Axes, way: Way, place: Callable[[np.ndarray], np.ndarray]) -> None:
    """The noise levels at which given shares of the layout are determined, with texts below each other."""
    for number, (share, level) in enumerate(way.marks.items()):
        at = float(place(np.array([level]))[0])
        axes.axvline(at, color=_DARK, linewidth=0.9, linestyle=(0, (3, 2)))
        text = f"{share:.0%} determined\nat σ = {level:.2g}"
        axes.annotate(
            text,
            (at, 1.0 - 0.26 * number),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7,
            va="top",
            color=_DARK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
