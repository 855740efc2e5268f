"""Sequences drawn as curves, a panel for each channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distmatch.report.figures import PNG_COLOR
from distmatch.report.svg import ACCENT, MUTED, RULE, to_png, to_svg

CHANNELS, CURVES = 3, 12  # that are drawn, at most


def curve_limits(sets: Sequence[np.ndarray]) -> np.ndarray:
    """For each channel that is drawn, limits that hold 99.8% of the values of each set, with a margin.

    Args:
        sets: (N, L, D) each, finite.

    Returns:
        (channels, 2).
    """
    rows = [x.reshape(-1, x.shape[-1])[:, :CHANNELS] for x in sets]
    low = np.min([np.quantile(x, 0.001, axis=0) for x in rows], axis=0)
    high = np.max([np.quantile(x, 0.999, axis=0) for x in rows], axis=0)
    margin = np.maximum(0.06 * (high - low), 1e-6)
    return np.stack([low - margin, high + margin], axis=1)


def _draw(layers: Sequence[tuple[np.ndarray, str]], limits: np.ndarray, width: float, quiet: str) -> Figure:
    """One panel a channel, the layers (N, L, D) over each other."""
    figure = Figure(figsize=(width / 72, (40 + 90 * len(limits)) / 72), dpi=72, layout="constrained")
    panels = figure.subplots(len(limits), sharex=True, squeeze=False)[:, 0]
    for channel, axes in enumerate(panels):
        for x, color in layers:
            axes.plot(x[:CURVES, :, channel].T, color=color, linewidth=1.0, alpha=0.8)
        axes.set_ylim(*limits[channel])
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.tick_params(length=0, labelsize=11, labelcolor=quiet, pad=5)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def sequence_panel(x: np.ndarray, behind: np.ndarray | None, limits: np.ndarray, alt: str) -> Markup:
    """The first samples as curves over those of the reference.

    Args:
        x: (N, L, D), finite.
        behind: The reference, or None.
        limits: What :func:`curve_limits` returned.
        alt: Description for the ``<title>``.
    """
    layers = [(x, ACCENT)] if behind is None else [(behind, RULE), (x, ACCENT)]
    return to_svg(_draw(layers, limits, 330.0, MUTED), alt)


def sequences_png(x: np.ndarray) -> bytes:
    """The first of some sequences (N, L, D) as the bytes of a PNG picture."""
    x = x[np.isfinite(x).all(axis=(1, 2))]
    limits = curve_limits([x]) if len(x) else np.tile([0.0, 1.0], (min(x.shape[2], CHANNELS), 1))
    return to_png(_draw([(x, PNG_COLOR)], limits, 500.0, "black"))
