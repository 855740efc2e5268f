"""The samples of the three models side by side: pictures of the same labels, or points in the same plane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from distmatch.report.figures import frame, plane, scatter_panel
from distmatch.report.grid import grid_png
from distmatch.report.run import MODELS, Samples

_CLASSES = 10  # rows of a grid
_COLUMNS = 8
_NAMES = {"reference": "Real", "teacher": "Teacher", "student": "Student"}


@dataclass(frozen=True)
class Panel:
    """The samples of one model: a PNG of ``width`` pixels with its ``row_names``, or an SVG drawing."""

    title: str
    alt: str
    png: bytes = b""
    row_names: tuple[str, ...] = ()
    svg: Markup | None = None


@dataclass(frozen=True)
class SamplesSection:
    """All panels and the sentence below them."""

    panels: list[Panel]
    note: str


def samples_section(samples: dict[str, Samples]) -> SamplesSection:
    """Builds the panels for the models that have samples; images and vectors are not mixed."""
    return side_by_side({m: samples[m] for m in MODELS if m in samples})


def side_by_side(present: dict[str, Samples]) -> SamplesSection:
    """The same for any models, in the order given; one of another name than those of a run keeps it."""
    images = {m: s for m, s in present.items() if s.are_images}
    if images:
        return _image_panels(images)
    first = next(iter(present.values()), None)
    if first is None:
        return SamplesSection([], "")
    return _vector_panels({m: s for m, s in present.items() if s.x.shape[1] == first.x.shape[1]})


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
        ones of each label are taken. Labels that a set lacks are left out; no label in common gives no rows.
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
    labels = [s.labels for s in images.values() if s.labels is not None]
    names: np.ndarray = np.zeros(0)
    if len(labels) == len(images):
        names, indices = pick_by_label(labels)
    if len(names):
        note = "Each row is one label, the same in every grid; the first samples of each label, not selected."
        text = f"one row for each label: {', '.join(str(n) for n in names)}"
    else:
        count = min([_CLASSES * _COLUMNS, *(len(s.x) for s in images.values())])
        indices = [np.arange(count).reshape(1, -1) for _ in images]
        note = "The first samples, not selected."
        text = "no labels in common"
    panels = [
        Panel(
            title=_title(model),
            alt=f"{at.size} samples, {_title(model).lower()}; {text}",
            png=grid_png(s.x[at.ravel()], at.shape[1] if len(names) else _COLUMNS),
            row_names=tuple(str(n) for n in names),
        )
        for (model, s), at in zip(images.items(), indices, strict=True)
    ]
    return SamplesSection(panels, note)


def _vector_panels(vectors: dict[str, Samples]) -> SamplesSection:
    base = next(iter(vectors.values())).x  # the reference where there is one: it comes first in MODELS
    origin, axes = plane(base)
    known = {m: s.x[np.isfinite(s.x).all(axis=1)].astype(np.float64) for m, s in vectors.items()}
    flat = {m: (x - origin) @ axes for m, x in known.items() if len(x)}
    if not flat:
        return SamplesSection([], "All samples hold values that are not finite.")
    low, high = frame(list(flat.values()))
    panels = []
    for model, points in flat.items():
        mean = ", ".join(f"{v:.3g}" for v in points.mean(axis=0))
        alt = f"{len(points)} samples, {_title(model).lower()}, with mean {mean}"
        outside = float(np.mean(((points < low) | (points > high)).any(axis=1)))
        alt += f", {outside:.1%} outside the frame" if outside > 0 else ""
        behind = flat.get("reference") if model != "reference" else None
        panels.append(Panel(_title(model), alt, svg=scatter_panel(points, behind, (low, high), alt)))
    note = "Real data are drawn pale behind the samples of the models; all panels share one frame."
    if base.shape[1] > 2:
        whose = "real data" if "reference" in vectors else "the first panel"
        note += f" The {base.shape[1]} dimensions are projected on the first two principal axes of {whose}."
    for model, samples in vectors.items():
        lost = len(samples.x) - len(known[model])
        note += f" {_title(model)}: {lost} samples hold values that are not finite." if lost else ""
    return SamplesSection(panels, note)
