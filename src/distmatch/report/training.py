"""The charts of a training log: curves over steps, and averages over noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from distmatch.report.figures import curve_panel, noise_panel, smooth
from distmatch.report.log import Event, curves, scalar_keys

_PERIODS = 4
_TITLES = {
    "loss": ("Denoising loss", ""),
    "loss_student": ("Student loss", "half the mean square of the gradient at the samples"),
    "loss_fake": ("Fake-score loss", "denoising loss of the network that follows the student"),
    "loss_ratio": ("Ratio loss", "1.386 = 2 log 2 means that student and data cannot be distinguished"),
    "loss_gan": ("Adversarial loss", "0.693 = log 2 means the same"),
    "ess": (
        "Effective sample size",
        "effective sample size of the weights, as a share of the batch; 1 when all are equal",
    ),
    "clip_fraction": ("Clipped ratios", "share of a batch at the clipping bounds"),
    "pooled_bins": ("Pooled noise bins", "bins with too few samples for their own mean"),
    "grad_dm": ("Gradient norm, matching", "at the samples"),
    "grad_gan": ("Gradient norm, adversarial", "at the samples"),
    "grad_norm_student": ("Gradient norm, student", "of its parameters, before clipping"),
    "grad_norm_fake": ("Gradient norm, fake score", "of its parameters, before clipping"),
    "grad_norm": ("Gradient norm", "of the parameters, before clipping"),
    "lr": ("Learning rate", ""),
}
_AGAINST_DATA = {
    "fd": ("Fréchet distance to real data", "± one standard error"),
    "precision": ("Precision", "± one standard error"),
    "recall": ("Recall", "± one standard error"),
    "coverage": ("Coverage", "± one standard error"),
}
_WATCHED = {
    "diversity": ("Diversity", "distance between samples of one condition, over the teacher's"),
    "vendi": ("Vendi score", "over the teacher's"),
    "energy": ("Energy distance to the teacher", "over the mean distance between the teacher's samples"),
    "saturation": ("Saturated values", "share at the ends of the range"),
    "solid": ("Images of one color", "share of the samples"),
    "motion": ("Motion", "change between frames, over the teacher's"),
    "fake_score_lag": ("Fake-score lag", "its loss on new samples of the student, over its training loss"),
}


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, a remark, and the last value of its running mean as text."""

    title: str
    remark: str
    last: str
    svg: Markup


@dataclass(frozen=True)
class NoiseSection:
    """The charts over noise levels and the names of the periods of their lines, early first."""

    charts: list[Chart]
    periods: list[str]


def curve_charts(events: Sequence[Event]) -> list[Chart]:
    """One chart for each number that the ``train`` events hold: known ones first, in a fixed order."""
    present = scalar_keys(events)
    charts = []
    for key in [k for k in _TITLES if k in present] + [k for k in present if k not in _TITLES]:
        steps, values = curves(events, key)
        charts += _curve(steps, values, *_TITLES.get(key, (key, "")))
    return charts


def watch_charts(events: Sequence[Event]) -> list[Chart]:
    """One chart for each measurement of the ``watch`` events; the teacher's value is in its remark.

    What is measured against real data has its standard errors as bars, and a line for real data.
    """
    charts = []
    how = _how(events)
    for key, (title, remark) in _AGAINST_DATA.items():
        steps, values = curves(events, key, "watch")
        at, errors = curves(events, f"{key}_stderr", "watch")
        floor = curves(events, f"floor_{key}", "watch")[1]
        known = errors if np.array_equal(at, steps) and errors.ndim == 1 else None
        level = float(floor[-1]) if floor.ndim == 1 and floor.size and np.isfinite(floor[-1]) else None
        of = f"; {how}" if how else ""
        of += "" if level is None else f"; dotted: real data, {level:.3g}"
        charts += _curve(steps, values, title, remark + of, known, level)
    for key, (title, remark) in _WATCHED.items():
        steps, values = curves(events, key, "watch")
        theirs = curves(events, f"teacher_{key}", "watch")[1]
        if theirs.ndim == 1 and theirs.size and np.isfinite(theirs[-1]):
            remark += f"; the teacher's is {theirs[-1]:.3g}"
        charts += _curve(steps, values, title, remark)
    return charts


def _how(events: Sequence[Event]) -> str:
    """The features, numbers of samples and solver steps of what was last measured against real data."""
    last = next((e for e in reversed(events) if e["event"] == "watch" and "fd" in e), {})
    parts = [f"{last['features']} features"] if isinstance(last.get("features"), str) else []
    parts += [f"2 blocks of {last['n']:,} samples"] if type(last.get("n")) is int else []
    if type(last.get("solver_steps")) is int:
        parts += [f"{last['solver_steps']} steps of {last.get('solver', 'a solver')}"]
    return ", ".join(parts)


def _curve(
    steps: np.ndarray,
    values: np.ndarray,
    title: str,
    remark: str,
    errors: np.ndarray | None = None,
    level: float | None = None,
) -> list[Chart]:
    """The chart of a curve; none of lists, and where no value is known."""
    if values.ndim != 1 or not np.isfinite(values).any():
        return []
    mean = smooth(values, max(1, len(values) // 25))
    known = mean[np.isfinite(mean)]
    alt = f"{title} over {steps[-1]:,.0f} steps: from {known[0]:.3g} to {known[-1]:.3g}"
    lost = int((~np.isfinite(values)).sum())
    if lost:
        remark = f"{remark}; {lost} values were not finite".lstrip("; ")
    last = f"{known[-1]:#.3g}".rstrip(".")
    if errors is not None and np.isfinite(errors[-1]):
        last += f" ± {errors[-1]:.2g}"
    return [Chart(title, remark, last, curve_panel(steps, values, alt, errors, level))]


def bin_levels(bins: object, count: int) -> tuple[np.ndarray, bool]:
    """The noise levels to draw ``count`` bins at.

    Args:
        bins: ``sigma_bins`` of the ``start`` event: ``count`` centers, or ``count + 1`` edges of which the
            outer ones may be 0 or null (open); anything else is not understood.
        count: Number of bins.

    Returns:
        The levels (count,) and whether they are sigmas; bin numbers 1..count where they are not.
    """
    numbers = (
        [float(b) if isinstance(b, (int, float)) else math.nan for b in bins]
        if isinstance(bins, list)
        else []
    )
    values = np.array(numbers)
    if len(values) == count + 1 and count > 2:
        inner = values[1:-1]  # an open outer bin is drawn as wide, on the logarithmic axis, as its neighbor
        low, high = values[0], values[-1]
        low = low if np.isfinite(low) and low > 0 else inner[0] ** 2 / inner[1]
        high = high if np.isfinite(high) else inner[-1] ** 2 / inner[-2]
        edges = np.concatenate([[low], inner, [high]])
        values = np.sqrt(edges[:-1] * edges[1:])
    if (
        len(values) == count
        and np.isfinite(values).all()
        and (values > 0).all()
        and (np.diff(values) > 0).all()
    ):
        return values, True
    return np.arange(1, count + 1, dtype=np.float64), False


def period_means(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Means over up to four equal stretches of the log.

    Args:
        steps: (T,).
        values: (T, bins), NaN where a bin was empty.

    Returns:
        Means (periods, bins) of what is known, and the names of the periods.
    """
    parts = np.array_split(np.arange(len(steps)), min(_PERIODS, len(steps)))
    known = np.isfinite(values)
    sums = np.stack([np.where(known, values, 0.0)[p].sum(axis=0) for p in parts])
    counts = np.stack([known[p].sum(axis=0) for p in parts])
    names = [f"steps {steps[p[0]]:,.0f} to {steps[p[-1]]:,.0f}" for p in parts]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), names


def noise_charts(events: Sequence[Event]) -> NoiseSection:
    """Weight and ratio by noise level, at several times of training."""
    bins = next(
        (e["sigma_bins"] for e in reversed(events) if e["event"] == "start" and "sigma_bins" in e), None
    )
    charts: list[Chart] = []
    periods: list[str] = []
    for key, title, remark, level in (
        (
            "weight_mean",
            "Weight h(r)",
            "factor of the score difference; its mean over a batch is 1",
            1.0,
        ),
        (
            "ratio_mean",
            "Ratio r = teacher / student",
            "before normalization; a calibrated ratio has mean 1 at every noise level",
            1.0,
        ),
    ):
        steps, values = curves(events, key)
        if values.ndim != 2 or not np.isfinite(values).any():
            continue
        levels, is_sigma = bin_levels(bins, values.shape[1])
        means, periods = period_means(steps, values)
        last = means[-1][np.isfinite(means[-1])]
        span = f"{last.min():.3g} to {last.max():.3g}" if last.size else "nothing known"
        alt = f"{title} over {len(levels)} noise levels in {len(periods)} periods; in the last one {span}"
        svg = noise_panel(levels, means, alt, is_sigma=is_sigma, level=level)
        charts.append(Chart(title, remark, span, svg))
    return NoiseSection(charts, periods)
