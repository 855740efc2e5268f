"""The samples of the models side by side: pictures or clips of the same labels, points, or curves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from distmatch.data.kinds import KINDS
from distmatch.report.conditions import conditions_note, grouped
from distmatch.report.figures import frame, plane, scatter_panel
from distmatch.report.grid import grid_png
from distmatch.report.run import MODELS, Samples
from distmatch.report.sequences import CHANNELS, CURVES, curve_limits, sequence_panel

_CLASSES = 10  # rows of a grid
_COLUMNS = 8
TAUGHT = "Teacher, other noise"
"""The title of a reference that is samples of the teacher."""
_NAMES = {"reference": "Real", "teacher": "Teacher", "student": "Student"}


@dataclass(frozen=True)
class Panel:
    """The samples of one model: a PNG with its ``row_names``, or an SVG drawing.

    Of clips the PNG is animated, and ``still`` shows their first frames for reduced motion.
    """

    title: str
    alt: str
    png: bytes = b""
    still: bytes = b""
    row_names: tuple[str, ...] = ()
    svg: Markup | None = None


@dataclass(frozen=True)
class SamplesSection:
    """All panels and the sentence below them."""

    panels: list[Panel]
    note: str


def samples_section(samples: dict[str, Samples], of: str = "") -> SamplesSection:
    """Builds the panels for the models that have samples; samples of different kinds are not mixed.

    ``of`` says what the reference is where it is no real data.
    """
    return side_by_side(titled({m: samples[m] for m in MODELS if m in samples}, of))


def titled(samples: dict[str, Samples], of: str) -> dict[str, Samples]:
    """The samples with another title for a reference that is no real data."""
    return {TAUGHT if of and model == "reference" else model: s for model, s in samples.items()}


def side_by_side(present: dict[str, Samples]) -> SamplesSection:
    """The same for any models, in the order given; one of another name than those of a run keeps it."""
    for kind in reversed(KINDS):
        of_this = {m: s for m, s in present.items() if s.kind == kind}
        if not of_this:
            continue
        if kind in ("image", "video"):
            return _image_panels(of_this)
        shape = next(iter(of_this.values())).x.shape[1:]
        alike = {m: s for m, s in of_this.items() if s.x.shape[1:] == shape}
        return _vector_panels(alike) if kind == "vector" else _sequence_panels(alike)
    return SamplesSection([], "")


def _title(model: str) -> str:
    return _NAMES.get(model, model)


def _evenly(items: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` entries, evenly spread from first to last."""
    return items if len(items) <= most else items[np.linspace(0, len(items) - 1, most).round().astype(int)]


def pick_by_label(label_sets: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Chooses samples so that every set shows the same labels in the same order.

    Args:
        label_sets: One (N,) array a model.

    Returns:
        The labels shown (classes,), and for each set the indices (classes, columns) of its samples; the first
        ones of each label are taken. Labels that a set lacks are omitted; no label in common gives no rows.
    """
    common = label_sets[0]
    for labels in label_sets:
        common = np.intersect1d(common, labels)
    shown = _evenly(common, _CLASSES)
    if len(shown) == 0:
        return shown, [np.zeros((0, 0), dtype=int) for _ in label_sets]
    columns = min(_COLUMNS, *(int((labels == c).sum()) for labels in label_sets for c in shown))
    return shown, [np.stack([np.flatnonzero(labels == c)[:columns] for c in shown]) for labels in label_sets]


def _image_panels(images: dict[str, Samples]) -> SamplesSection:
    groups = grouped(list(images.values()))
    rows: tuple[str, ...] = ()
    columns = _COLUMNS
    if groups is not None:
        shown, indices = pick_by_label(groups.of)
        rows = tuple(groups.names[group] for group in shown)
    if groups is not None and rows:
        what = groups.what
        note = (
            f"Each row is one {what}, the same in every grid; the first samples of each {what}, not selected."
        )
        text = f"one row for each {what}: {', '.join(rows) if what == 'label' else '; '.join(rows)}"
        columns = indices[0].shape[1]
        if what != "label":  # too long to stand beside a row
            note += "".join(f" Row {number}: {name}." for number, name in enumerate(rows, 1))
            rows = tuple(str(number) for number in range(1, len(rows) + 1))
    else:
        count = min([_CLASSES * _COLUMNS, *(len(s.x) for s in images.values())])
        indices = [np.arange(count) for _ in images]
        note = "The first samples, not selected." + conditions_note(list(images.values()))
        text = "no labels in common"
    panels = []
    for (model, s), at in zip(images.items(), indices, strict=True):
        x = s.x[at.ravel()]
        panels.append(
            Panel(
                title=_title(model),
                alt=f"{at.size} samples, {_title(model).lower()}; {text}",
                png=grid_png(x, columns),
                still=grid_png(x[:, 0], columns) if s.kind == "video" else b"",
                row_names=rows,
            )
        )
    if any(panel.still for panel in panels):
        note += " Clips loop; if the browser is set to reduced motion, their first frames are shown."
    return SamplesSection(panels, note)


def _vector_panels(vectors: dict[str, Samples]) -> SamplesSection:
    base = next(iter(vectors.values())).x  # the reference where there is one: it comes first in MODELS
    origin, axes = plane(base)
    known = {m: s.x[np.isfinite(s.x).all(axis=1)].astype(np.float64) for m, s in vectors.items()}
    flat = {m: (x - origin) @ axes for m, x in known.items() if len(x)}
    if not flat:
        return SamplesSection([], "All samples have values that are not finite.")
    low, high = frame(list(flat.values()))
    panels = []
    for model, points in flat.items():
        mean = ", ".join(f"{v:.3g}" for v in points.mean(axis=0))
        alt = f"{len(points)} samples, {_title(model).lower()}, with mean {mean}"
        outside = float(np.mean(((points < low) | (points > high)).any(axis=1)))
        alt += f", {outside:.1%} outside the frame" if outside > 0 else ""
        behind = flat.get("reference") if model != "reference" else None
        panels.append(Panel(_title(model), alt, svg=scatter_panel(points, behind, (low, high), alt)))
    note = "Real data are drawn in pale color behind the models' samples; all panels share their axes."
    if base.shape[1] > 2:
        whose = "real data" if "reference" in vectors else "the first panel"
        note += f" The {base.shape[1]} dimensions are projected on the first two principal axes of {whose}."
    note += conditions_note(list(vectors.values()))
    for model, samples in vectors.items():
        lost = len(samples.x) - len(known[model])
        note += f" {_title(model)}: {lost} samples have values that are not finite." if lost else ""
    return SamplesSection(panels, note)


def _sequence_panels(sequences: dict[str, Samples]) -> SamplesSection:
    known = {m: s.x[np.isfinite(s.x).all(axis=(1, 2))] for m, s in sequences.items()}
    known = {m: x for m, x in known.items() if len(x)}
    if not known:
        return SamplesSection([], "All samples have values that are not finite.")
    limits = curve_limits(list(known.values()))
    panels = []
    for model, x in known.items():
        alt = f"the first {min(len(x), CURVES)} samples, {_title(model).lower()}, as curves"
        behind = known.get("reference") if model != "reference" else None
        panels.append(Panel(_title(model), alt, svg=sequence_panel(x, behind, limits, alt)))
    channels = next(iter(known.values())).shape[2]
    note = f"The first {CURVES} samples, not selected, over pale real ones; all panels share their axes."
    if channels > CHANNELS:
        note += f" The first {CHANNELS} of {channels} channels are shown."
    note += conditions_note(list(sequences.values()))
    return SamplesSection(panels, note)
