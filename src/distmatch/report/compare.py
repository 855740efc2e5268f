"""The page of a comparison, from its `compare.json` and the samples in its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.files import atomic_write, read_json
from distmatch.base.inputs import read_limited
from distmatch.report.compare_figures import Point, front_panel
from distmatch.report.compare_words import (
    estimates,
    failures,
    lead,
    sentence,
    status,
    uncapitalised,
)
from distmatch.report.page import flat, page
from distmatch.report.run import Samples, read_samples
from distmatch.report.samples import TAUGHT, SamplesSection, side_by_side, titled
from distmatch.report.table import METRICS, Metric, present_metrics

_RECORD = "compare.json"
_NEEDED = ("methods", "runs", "reference", "teacher", "summary", "budget", "impossible", "evaluation")
_REAL = ("reference", "teacher")


def is_comparison(path: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return (path / _RECORD).is_file()


def build_comparison(path: Path, refresh: float = 0) -> Path:
    """Writes ``report.html`` into the folder of a comparison, replacing an earlier one.

    Args:
        path: The folder.
        refresh: Seconds after which a browser loads the page again; 0: it does not.

    Raises:
        UserError: `compare.json` or the samples are broken, or the page cannot be written.
    """
    target = path / "report.html"
    atomic_write(target, render_comparison(path, refresh))
    return target


@dataclass(frozen=True)
class Line:
    """A row of the metric table: real data, the teacher, or a method."""

    number: int | None
    name: str
    note: str
    cells: dict[str, Estimate]


def render_comparison(path: Path, refresh: float = 0) -> str:
    """The page as HTML text, which is loaded again after ``refresh`` seconds."""
    record = read_json(path / _RECORD)
    if not isinstance(record, dict) or any(key not in record for key in _NEEDED):
        raise UserError(
            f"{path / _RECORD} is broken",
            expected=f"an object with {', '.join(_NEEDED)}",
            fix="restore it from a copy, or compare again",
        )
    lines = table_lines(record)
    present = {key: found.features for line in lines for key, found in line.cells.items()}
    metrics = [m for m in present_metrics(present) if m.better]
    environment = read_json(path / "env.json") if (path / "env.json").exists() else {}
    config = path / "config.toml"
    return page(
        "compare.html.j2",
        refresh,
        name=path.resolve().name,
        lead=lead(record),
        status=status(record),
        sentence=sentence(record, metrics),
        metrics=metrics,
        lines=lines,
        best=_best(lines, metrics),
        baseline=record["summary"]["baseline"],
        differences=difference_rows(record, metrics),
        one_seed=max((len(_seeds(record, m["name"])) for m in record["methods"]), default=0) < 2,
        fronts=_fronts(record, lines),
        costs=[
            _cost(record, line, m) for m, line in zip(record["methods"], _method_lines(lines), strict=True)
        ],
        samples=_samples(path, record),
        failures=failures(record),
        protocol=flat(record["evaluation"]),
        seconds=sum(run.get("seconds") or 0.0 for run in record["runs"]),
        command=environment.get("command"),
        config=read_limited(config).decode(errors="replace") if config.exists() else None,
        environment=[item for item in flat(environment) if item[0] != "command"],
    )


def table_lines(record: dict[str, Any]) -> list[Line]:
    """The rows of the metric table: real data, the teacher, then the methods with their numbers."""
    means = record["summary"]["means"]
    of = record["reference"].get("of")
    real = (TAUGHT, str(of)) if of else ("Real data", "against other real data")
    lines = [
        Line(None, *real, estimates(record["reference"])),
        Line(
            None,
            "Teacher",
            f"{record['teacher'].get('nfe', '?')} network calls",
            estimates(record["teacher"]),
        ),
    ]
    for number, method in enumerate(record["methods"], 1):
        done, asked = len(_seeds(record, method["name"])), _asked(record, method["name"])
        seeds = f"{done} of {asked} seeds" if done < asked else f"{done} seed{'s' if done != 1 else ''}"
        lines.append(Line(number, method["name"], seeds, estimates(means.get(method["name"], {}))))
    return lines


@dataclass(frozen=True)
class Cell:
    """A difference from the baseline."""

    value: Estimate
    verdict: str
    note: str


@dataclass(frozen=True)
class DifferenceRow:
    """The differences of a method from the baseline, by metric; None where there is none."""

    name: str
    cells: list[Cell | None]


def difference_rows(record: dict[str, Any], metrics: list[Metric]) -> list[DifferenceRow]:
    """The table of differences, methods in their order."""
    found = {(d["name"], d["metric"]): d for d in record["summary"]["differences"]}
    rows = []
    for method in record["methods"]:
        own = [found.get((method["name"], metric.key)) for metric in metrics]
        if any(own):
            rows.append(DifferenceRow(method["name"], [None if d is None else _cell(d) for d in own]))
    return rows


def _cell(entry: dict[str, Any]) -> Cell:
    p = entry["p_adjusted"]
    note = f"{entry['seeds']} seed{'s' if entry['seeds'] != 1 else ''}"
    if p is not None:
        note += f", adjusted p {'below 0.001' if p < 0.001 else f'{p:.3f}'}"
    return Cell(Estimate.from_dict({**entry, "n": entry["seeds"]}), entry["verdict"], note)


def _fronts(record: dict[str, Any], lines: list[Line]) -> list[dict[str, Any]]:
    """The panels of quality against diversity."""
    titles = {m.key: m for m in METRICS}
    panels = []
    for front in record["summary"]["fronts"]:
        quality, diversity = front["quality"], front["diversity"]
        points = [
            Point(
                str(line.number) if line.number else line.name,
                line.cells[diversity],
                line.cells[quality],
                on_front=line.name in front["methods"],
                is_method=line.number is not None,
            )
            for line in lines
            if diversity in line.cells and quality in line.cells
        ]
        names = [titles[key].title for key in (quality, diversity)]
        alt = f"{names[0]} against {names[1].lower()}; on the Pareto front: {', '.join(front['methods'])}"
        lower = titles[quality].better == "down"
        svg = front_panel(points, names[1], names[0], alt, lower_is_better=lower)
        panels.append(
            {"title": f"{names[0]} against {uncapitalised(names[1])}", "svg": svg, "names": front["methods"]}
        )
    return panels


def _cost(record: dict[str, Any], line: Line, method: dict[str, Any]) -> dict[str, Any]:
    """A row of the cost table."""
    found = record["summary"]["costs"][method["name"]]
    passes = [
        (name, method["forward_per_step"][name], method["backward_per_step"][name])
        for name in method["parameters"]
        if method["forward_per_step"][name] or method["backward_per_step"][name]
    ]
    return {
        "number": line.number,
        "name": method["name"],
        "steps": method["steps"],
        "milliseconds": 1000 * (found["seconds_per_step"] or method["seconds_per_step"]),
        "seconds": found["seconds"],
        "passes": passes,
        "calls": method["calls_per_step"],
        "once": method["seconds_once"],
        "memory": found["memory"],
        "trained": sum(method["parameters"].values()),
        "nfe": found["nfe"],
        "seconds_per_1000": found["seconds_per_1000"],
    }


def _samples(path: Path, record: dict[str, Any]) -> SamplesSection:
    """Real data, the teacher and the first finished run of every method, from the same latents."""
    files = {name: path / "samples" / f"{name}.npz" for name in _REAL}
    for run in record["runs"]:
        if run["status"] == "done":
            files.setdefault(run["name"], path / run["folder"] / "samples" / "student.npz")
    found: dict[str, Samples] = {name: read_samples(file) for name, file in files.items() if file.exists()}
    return side_by_side(titled(found, str(record["reference"].get("of") or "")))


def _best(lines: list[Line], metrics: list[Metric]) -> dict[str, str]:
    """The name of the best method in each metric that has a direction."""
    found = {}
    for metric in metrics:
        values = {
            line.name: line.cells[metric.key].value
            for line in _method_lines(lines)
            if metric.key in line.cells
        }
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if values and metric.better in ("down", "up"):
            sign = 1.0 if metric.better == "down" else -1.0
            found[metric.key] = min(values, key=lambda name: sign * values[name])
    return found


def _method_lines(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.number is not None]


def _seeds(record: dict[str, Any], name: str) -> list[int]:
    return [run["seed"] for run in record["runs"] if run["name"] == name and run["status"] == "done"]


def _asked(record: dict[str, Any], name: str) -> int:
    return sum(run["name"] == name for run in record["runs"])
