"""What a run folder holds, read once and checked; every part may be missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.files import read_json
from distmatch.base.inputs import parse_toml, read_limited
from distmatch.data.files import CONDITION, Archive
from distmatch.data.kinds import Kind, kind_of_array
from distmatch.report.log import LARGEST_VALUE, Event, read_log, watched_steps

MODELS = ("reference", "teacher", "student")
_SHOWN_STEPS = 5  # of a watch
_MARKS = ("config.toml", "log.jsonl", "metrics.json", "samples")


@dataclass(frozen=True)
class Samples:
    """Samples of one model.

    Attributes:
        x: Images (N, H, W) or (N, H, W, C) or video (N, T, H, W, C), uint8; or vectors (N, D) or sequences
            (N, L, D), float.
        labels: (N,), or None.
        class_names: Names of the classes, or ().
        conditions: Further conditions by name, each (N, ...).
        prompts: The text of each sample's condition, or ().
    """

    x: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] = ()
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What ``x`` holds."""
        return kind_of_array(self.x)


@dataclass(frozen=True)
class ModelMetrics:
    """One block of `metrics.json`.

    Attributes:
        nfe: Network calls for one sample, NaN when not given.
        seconds_per_1000: Seconds for a thousand samples, NaN when not given.
        estimates: Metric key to estimate; NaN represents null.
        of: What a reference is where it is no real data, else ''.
    """

    nfe: float
    seconds_per_1000: float
    estimates: dict[str, Estimate]
    of: str = ""


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; None or empty where a part is missing.

    ``watched`` has samples that were taken during training, of the teacher first, by their titles.
    """

    path: Path
    config_text: str | None
    config: dict[str, Any]
    environment: dict[str, Any]
    events: list[Event]
    metrics: dict[str, ModelMetrics]
    samples: dict[str, Samples]
    teacher: Run | None = field(default=None)
    watched: dict[str, Samples] = field(default_factory=dict)


def read_run(path: Path, *, inner: bool = True) -> Run:
    """Reads a run folder.

    Args:
        path: The folder.
        inner: Whether to read the teacher's run folder inside it as well.

    Raises:
        UserError: It is no run folder, or a file in it is broken.
    """
    if not path.is_dir() or not any((path / mark).exists() for mark in _MARKS):
        raise UserError(
            f"{path} is not a run folder",
            got="no such folder" if not path.is_dir() else "a folder without any of the files of a run",
            expected=f"a folder with at least one of {', '.join(_MARKS)}",
            fix="give the folder that was written with --out, for example runs/demo",
        )
    config_text = _read_text(path / "config.toml")
    teacher = path / "teacher"
    has_teacher = inner and teacher.is_dir() and any((teacher / mark).exists() for mark in _MARKS)
    metrics_file, log_file = path / "metrics.json", path / "log.jsonl"
    events = read_log(log_file) if log_file.exists() else []
    return Run(
        path=path,
        config_text=config_text,
        config=_parse_config(config_text),
        environment=_read_environment(path / "env.json"),
        events=events,
        metrics=read_metrics(metrics_file) if metrics_file.exists() else {},
        samples={m: read_samples(f) for m in MODELS if (f := path / "samples" / f"{m}.npz").exists()},
        teacher=read_run(teacher, inner=False) if has_teacher else None,
        watched=_read_watched(path / "watch", watched_steps(events)),
    )


def _read_watched(folder: Path, steps: list[int]) -> dict[str, Samples]:
    """The teacher's samples and the student's at some of the steps, from the first to the last."""
    files = {f"Step {step:,}": folder / f"step-{step:06d}.npz" for step in steps}
    kept = [(title, file) for title, file in files.items() if file.exists()]
    if len(kept) > _SHOWN_STEPS:
        kept = [kept[round(i * (len(kept) - 1) / (_SHOWN_STEPS - 1))] for i in range(_SHOWN_STEPS)]
    teacher = folder / "teacher.npz"
    named = [("teacher", teacher)] if kept and teacher.exists() else []
    return {title: read_samples(file) for title, file in [*named, *kept]}


def _read_text(path: Path) -> str | None:
    return read_limited(path).decode("utf-8", errors="replace") if path.exists() else None


def _parse_config(text: str | None) -> dict[str, Any]:
    """The options, or nothing when the text is no TOML: the page still shows the text itself."""
    try:
        return parse_toml(text or "")
    except UserError:
        return {}


def _read_environment(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _broken(path: Path, where: str, got: object, expected: str) -> UserError:
    fix = "remove the file and evaluate again"
    return UserError(f"{path}: {where} is broken", got=repr(got)[:80], expected=expected, fix=fix)


def _optional_number(path: Path, where: str, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _broken(path, where, value, "a number or null")
    return float(value) if abs(value) < LARGEST_VALUE else math.nan


def read_metrics(path: Path) -> dict[str, ModelMetrics]:
    """Reads `metrics.json`.

    Entries of a model that are not objects with a ``value`` (notes, settings) are omitted.

    Raises:
        UserError: It is no JSON, or a model or a number in it has another form than documented.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise _broken(path, "the file", content, "an object with reference, teacher, student")
    found: dict[str, ModelMetrics] = {}
    for model in MODELS:
        block = content.get(model)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise _broken(path, model, block, "an object of metrics")
        estimates: dict[str, Estimate] = {}
        for key, entry in block.items():
            if isinstance(entry, dict) and "value" in entry:
                numbers = [
                    _optional_number(path, f"{model}.{key}.{k}", entry.get(k))
                    for k in ("value", "stderr", "n")
                ]
                n = int(numbers[2]) if math.isfinite(numbers[2]) else 0
                warning = entry.get("warning")
                if warning is not None and not isinstance(warning, str):
                    raise _broken(path, f"{model}.{key}.warning", warning, "a sentence or null")
                features = str(entry.get("features") or "")
                estimates[key] = Estimate(numbers[0], numbers[1], n, warning, features=features)
        nfe, seconds = (
            _optional_number(path, f"{model}.{k}", block.get(k)) for k in ("nfe", "seconds_per_1000")
        )
        found[model] = ModelMetrics(nfe, seconds, estimates, str(block.get("of") or ""))
    return found


def read_samples(path: Path) -> Samples:
    """Reads one file of `samples/`; pickled content is refused.

    Raises:
        UserError: It is no npz file, or ``x`` is neither images nor vectors.
    """
    archive = Archive(path)
    if "x" not in archive:
        raise UserError(
            f"cannot read the samples {path}",
            got=f"arrays {', '.join(archive)[:80]}",
            expected="an npz file with x and, optionally, labels",
            fix="remove the file and sample again",
        )
    x, labels = archive["x"], archive.get("labels")
    pixels = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim in (4, 5) and x.shape[-1] in (1, 3, 4)))
    columns = np.issubdtype(x.dtype, np.floating) and x.ndim in (2, 3)
    if not (pixels or columns) or 0 in x.shape:
        raise UserError(
            f"{path} holds no samples that can be shown",
            got=f"x of shape {x.shape}, {x.dtype}",
            expected="uint8 images (N, H, W) or (N, H, W, C) or video (N, T, H, W, C), or float vectors "
            "(N, D) or sequences (N, L, D)",
        )
    if labels is not None and labels.shape != x.shape[:1]:
        raise UserError(f"{path}: labels do not match x", got=labels.shape, expected=x.shape[:1])
    if labels is not None and np.issubdtype(labels.dtype, np.number) and (labels < 0).all():
        labels = None  # -1 stands for "no label"
    names = archive.get("class_names")
    conditions = {k.removeprefix(CONDITION): archive[k] for k in archive if k.startswith(CONDITION)}
    for name, values in conditions.items():
        if values.shape[:1] != x.shape[:1] or values.dtype.kind not in "fiub":
            raise UserError(
                f"{path}: {CONDITION}{name} does not match x",
                got=f"{values.shape}, {values.dtype}",
                expected=f"numbers of shape ({len(x)}, ...)",
                fix="remove the file and evaluate again",
            )
    class_names = () if names is None else tuple(str(name) for name in names.ravel())
    prompts = archive.get("prompts")
    texts = () if prompts is None or prompts.shape != x.shape[:1] else tuple(map(str, prompts))
    return Samples(x, labels, class_names, conditions, texts)
