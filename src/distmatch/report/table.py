"""The metric table and the sentence on top of the page: the loss of quality and its significance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import key_in, metric_of, published_name, space_of
from distmatch.report.run import MODELS, ModelMetrics

_TELLING = 2.0  # a difference of fewer standard errors is not called a difference


@dataclass(frozen=True)
class Metric:
    """How to read a metric.

    Attributes:
        key: Its name in `metrics.json`.
        title: Its name on the page.
        better: ``down``, ``up``, ``floor`` (best where real data are) or ``""`` (not known).
        meaning: One line for the reader.
    """

    key: str
    title: str
    better: str
    meaning: str

    @property
    def arrow(self) -> str:
        """A sign for the better direction."""
        return {"down": "↓", "up": "↑", "floor": "→"}.get(self.better, "")

    @property
    def arrow_text(self) -> str:
        """The same in words."""
        words = {
            "down": "lower is better",
            "up": "higher is better",
            "floor": "best at the value of real data",
        }
        return words.get(self.better, "no direction")


METRICS = (
    Metric("fd", "Fréchet distance", "down", "distance between Gaussians fitted to the features"),
    Metric("kid", "KID", "down", "kernel distance between features, unbiased: may fall below zero"),
    Metric("mmd", "MMD of directions", "down", "with the kernel of CMMD, unbiased: may fall below zero"),
    Metric("precision", "Precision", "up", "share of samples that lie among real data"),
    Metric("recall", "Recall", "up", "share of real data that lie among the samples"),
    Metric("density", "Density", "floor", "how densely real data surround the samples"),
    Metric("coverage", "Coverage", "up", "share of real data with a sample close by"),
    Metric("vendi", "Vendi score", "floor", "effective number of different samples"),
    Metric("class_distance", "Distance within classes", "floor", "between samples, over that of real data"),
    Metric("authentic", "Authentic", "floor", "share of samples that are no copies of real ones, by AuthPct"),
    Metric("memorized", "Memorized", "floor", "share of samples close to one real one and to no other"),
    Metric("frame_fd", "Fréchet distance, frames", "down", "between the pixels of single frames"),
    Metric("motion", "Motion", "floor", "mean change of a pixel between frames, as a share of its range"),
    Metric("label_accuracy", "Label accuracy", "up", "share of samples classified as the requested label"),
    Metric("prompt_energy", "Energy distance by prompt", "down", "over the reference's mean distance"),
    Metric(
        "prompt_diversity", "Diversity by prompt", "floor", "distance between samples, over the reference's"
    ),
    Metric("prompt_vendi", "Vendi score by prompt", "floor", "over the reference's"),
    Metric("modes", "Modes found", "up", "modes of the mixture that were hit"),
    Metric("kl", "KL(p‖q) of modes", "down", "large when modes are missing"),
    Metric("reverse_kl", "KL(q‖p) of modes", "down", "large when samples fall on rare modes"),
    Metric("js", "JS of modes", "down", "both, at most log 2"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        metric: How to read it.
        cells: The estimates of reference, teacher and student, in that order; None where there is none.
        ratio: Student over teacher, with its error, or None where it means nothing.
        verdict: ``better``, ``worse``, ``within error``, or what keeps us from saying.
        sigmas: Size of the difference in standard errors, NaN when not known.
    """

    metric: Metric
    cells: tuple[Estimate | None, ...]
    ratio: Estimate | None
    verdict: str
    sigmas: float

    @property
    def counts(self) -> str:
        """The sample numbers behind the cells; one number when all agree."""
        numbers = list(dict.fromkeys(c.n for c in self.cells if c is not None))
        return " / ".join(f"{n:,}" for n in numbers)


def digits(value: float, stderr: float) -> str:
    """``value`` to the second digit of its error, or to four digits when the error is not known."""
    if not math.isfinite(value):
        return "not finite"
    if math.isfinite(stderr) and stderr > 0:
        places = 1 - math.floor(math.log10(stderr))
        return f"{value:.{max(places, 0)}f}" if places <= 6 else f"{value:.3g}"
    return f"{value:.4g}"


def error_digits(stderr: float) -> str:
    """``stderr`` to two digits; empty when it is not known."""
    if not math.isfinite(stderr):
        return ""
    if stderr == 0:
        return "0"
    places = 1 - math.floor(math.log10(stderr))
    return f"{stderr:.{max(places, 0)}f}" if places <= 6 else f"{stderr:.1e}"


def ratio_of(student: Estimate | None, teacher: Estimate | None) -> Estimate | None:
    """Student over teacher with the error of first order, the two errors taken as independent.

    None where the teacher's value is within two errors of zero: the quotient would mean nothing.
    """
    if student is None or teacher is None or not math.isfinite(student.value):
        return None
    known = teacher.stderr if math.isfinite(teacher.stderr) else 0.0
    if not math.isfinite(teacher.value) or teacher.value <= _TELLING * known or teacher.value == 0:
        return None
    quotient = student.value / teacher.value
    stderr = math.hypot(student.stderr, quotient * teacher.stderr) / teacher.value
    return Estimate(quotient, stderr, min(student.n, teacher.n))


def compare(
    student: Estimate | None, teacher: Estimate | None, floor: Estimate | None, better: str
) -> tuple[str, float]:
    """States whether the student differs from its teacher by more than the errors, and in which direction.

    Where real data are best it is the distances to their value that are compared: beyond it on one side is no
    better than as far beyond it on the other, however large the difference.

    Args:
        student: Its estimate.
        teacher: The teacher's estimate.
        floor: That of real data; needed when ``better`` is ``floor``.
        better: As in :class:`Metric`.

    Returns:
        The verdict, and the difference (of the distances, where real data are best) in standard errors, NaN
        when not known.
    """
    if student is None or teacher is None:
        return "", math.nan
    gap = student.value - teacher.value
    error = math.hypot(student.stderr, teacher.stderr)
    to_floor = better == "floor" and floor is not None and math.isfinite(floor.value)
    if to_floor and floor is not None:
        beyond = [math.copysign(1.0, e.value - floor.value) for e in (student, teacher)]
        gap = abs(student.value - floor.value) - abs(teacher.value - floor.value)
        # The error of the floor is in both distances: on one side of it, it cancels.
        error = math.hypot(error, (beyond[1] - beyond[0]) * floor.stderr if beyond[0] != beyond[1] else 0.0)
    if not math.isfinite(gap) or not math.isfinite(error):
        return "error not known", math.nan
    sigmas = abs(gap) / error if error > 0 else (math.inf if gap else 0.0)
    if sigmas <= _TELLING:
        return "within error", sigmas
    if better in ("up", "down") or to_floor:
        gain = gap if better == "up" else -gap
    else:
        return "differs", sigmas
    return "better" if gain > 0 else "worse", sigmas


def table(metrics: dict[str, ModelMetrics]) -> list[Row]:
    """The rows of the metric table: known metrics in our order, then whatever else is there."""
    present = {key: found.features for block in metrics.values() for key, found in block.estimates.items()}
    rows = []
    for metric in present_metrics(present):
        key = metric.key
        cells = tuple(metrics[m].estimates.get(key) if m in metrics else None for m in MODELS)
        floor, teacher, student = cells
        verdict, sigmas = compare(student, teacher, floor, metric.better)
        rows.append(Row(metric, cells, ratio_of(student, teacher), verdict, sigmas))
    return rows


def present_metrics(present: Mapping[str, str]) -> list[Metric]:
    """The metrics of a page: known ones in our order, by feature space, then whatever else is there.

    Args:
        present: The features that each key was measured in, '' where none are known.
    """
    known = {m.key: m for m in METRICS}
    spaces = list(dict.fromkeys(["", *map(space_of, present)]))
    ordered = [key for space in spaces for name in known if (key := key_in(name, space)) in present]
    found = []
    for key in dict.fromkeys([*ordered, *present]):
        metric, used = known.get(metric_of(key), Metric(key, key, "", "")), present[key]
        title = published_name(key, used) or metric.title
        if len(spaces) > 1 and used:
            title = f"{title}, {used}"
        found.append(replace(metric, key=key, title=title))
    return found


def doubts(rows: list[Row]) -> list[tuple[str, str]]:
    """What estimates in the table say against themselves: whose they are, and the warning."""
    return [
        (f"{row.metric.title}, {model}", cell.warning)
        for row in rows
        for model, cell in zip(MODELS, row.cells, strict=True)
        if cell is not None and cell.warning is not None
    ]


@dataclass(frozen=True)
class Tile:
    """A number of the headline: its name, itself, and where it comes from."""

    name: str
    number: str
    note: str


def plain(estimate: Estimate | None) -> str:
    """An estimate as text, ``0.331 ± 0.012``."""
    if estimate is None:
        return "–"
    error = error_digits(estimate.stderr)
    return digits(estimate.value, estimate.stderr) + (f" ± {error}" if error else "")


def speed_up(metrics: dict[str, ModelMetrics]) -> float:
    """How many times faster the student makes samples than its teacher; NaN when not known."""
    if "teacher" not in metrics or "student" not in metrics:
        return math.nan
    teacher, student = (metrics[m].seconds_per_1000 for m in ("teacher", "student"))
    return teacher / student if student > 0 and teacher > 0 else math.nan


def headline(metrics: dict[str, ModelMetrics], rows: list[Row]) -> tuple[str, list[Tile]]:
    """The sentence on top and up to three numbers for it."""
    by_key = {row.metric.key: row for row in rows}
    if "student" not in metrics or "teacher" not in metrics:
        return _lonely(metrics, by_key.get("fd")), []
    teacher, student = metrics["teacher"], metrics["student"]
    parts, tiles = [], []
    times = speed_up(metrics)
    calls = [f"{m.nfe:g} network call{'s' if m.nfe != 1 else ''}" for m in (student, teacher)]
    known_calls = math.isfinite(student.nfe) and math.isfinite(teacher.nfe)
    if math.isfinite(times):
        saved = f" ({calls[0]} instead of {teacher.nfe:g})" if known_calls else ""
        parts.append(f"The student generates samples {times:.3g} times as fast as its teacher{saved}.")
        note = (
            f"{student.seconds_per_1000:.3g} s instead of {teacher.seconds_per_1000:.3g} s for 1,000 samples"
        )
        tiles.append(Tile("Speed-up", f"{times:.3g}×", note))
    elif known_calls:
        parts.append(f"The student needs {calls[0]} instead of {teacher.nfe:g}.")
        tiles.append(Tile("Network calls", f"{student.nfe:g}", f"instead of {teacher.nfe:g}"))
    for key in ("fd", "recall"):
        if key in by_key and by_key[key].ratio is not None:
            clause, tile = _clause(by_key[key])
            parts.append(clause)
            tiles.append(tile)
    return " ".join(parts) or "The student has been evaluated.", tiles


def _lonely(metrics: dict[str, ModelMetrics], fd: Row | None) -> str:
    """The sentence where there are no two models to compare."""
    if "student" not in metrics and "teacher" not in metrics:
        return "No model has been evaluated in this folder yet."
    model, other = ("student", "teacher") if "student" in metrics else ("teacher", "student")
    floor, *rest = fd.cells if fd else (None, None, None)
    own = rest[MODELS.index(model) - 1]
    if own is None:
        return f"The {model} has been evaluated, no {other} has: there is nothing to compare it with."
    real = f" Real data reach {plain(floor)}." if floor else ""
    return f"The {model} has a Fréchet distance of {plain(own)}.{real} No {other} has been evaluated."


def _clause(row: Row) -> tuple[str, Tile]:
    """One sentence and one tile on a metric whose ratio is known."""
    floor, teacher, student = row.cells
    clause = f"{row.metric.title} is {plain(row.ratio)} times the teacher’s"
    if row.verdict == "within error":
        clause += ": the difference is within the errors."
    elif row.verdict in ("better", "worse"):
        clause += f": {row.verdict} by {show_sigmas(row.sigmas)}."
    else:
        clause += "."
    note = f"{plain(student)} against {plain(teacher)}" + (f"; real data {plain(floor)}" if floor else "")
    quotient = row.ratio.value if row.ratio else math.nan
    return clause, Tile(f"{row.metric.title} ratio", f"{quotient:.3g}×", note)


def show_sigmas(sigmas: float) -> str:
    """A difference in standard errors as text."""
    if not math.isfinite(sigmas):
        return ""
    return f"{sigmas:.1f} σ" if sigmas < 9.95 else f"{sigmas:.0f} σ"
