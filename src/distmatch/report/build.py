"""Builds `report.html`: one page, no outside address, from the files of a run folder alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmatch.base.files import atomic_write
from distmatch.report.compare import build_comparison, is_comparison
from distmatch.report.log import Event, scalar_keys, wall_seconds
from distmatch.report.page import flat, page
from distmatch.report.run import MODELS, ModelMetrics, Run, read_run
from distmatch.report.samples import TAUGHT, samples_section, side_by_side
from distmatch.report.table import doubts, headline, speed_up, table
from distmatch.report.training import curve_charts, noise_charts, watch_charts

_PROTOCOL = {
    "features": "{} features",
    "n": "blocks of {} samples",
    "groups": "standard errors from {} jackknife groups",
    "k_precision": "{} nearest neighbors for precision and recall",
    "k_coverage": "{} nearest neighbors for density and coverage",
    "solver": "the teacher sampled with {}",
    "steps": "{} solver steps",
    "grid": "grid of noise levels: {}",
    "path": "on the noise path {}",
    "guidance": "guidance scale {}",
    "interval": "guided only at noise levels {}",
    "reference": "guided by a weaker model",
}
"""What an ``evaluate`` event says, in words for a reader."""
_LEAD_OPTIONS = ("divergence", "method", "data", "steps", "seed")


@dataclass(frozen=True)
class Speed:
    """A line of the speed table; ``share``, the bar's length, is its speed in percent of the fastest."""

    name: str
    nfe: float
    seconds: float
    share: float


def build_report(run_folder: str | os.PathLike[str], *, refresh: float = 0) -> Path:
    """Writes ``report.html`` into a run folder, or the folder of a comparison, replacing an earlier one.

    Whatever the folder does not hold yet (metrics, samples, a log) is named on the page as missing.

    Args:
        run_folder: A folder as described in `docs/architecture.md`.
        refresh: Seconds after which a browser loads the page again; 0: it does not.

    Returns:
        The path of the page.

    Raises:
        UserError: It is no run folder, a file in it is broken, or the page cannot be written.
    """
    path = Path(run_folder)
    if is_comparison(path):
        return build_comparison(path, refresh)
    target = path / "report.html"
    atomic_write(target, render(read_run(path), refresh))
    return target


def render(run: Run, refresh: float = 0) -> str:
    """The page of a run as HTML text, which is loaded again after ``refresh`` seconds."""
    rows = table(run.metrics)
    sentence, tiles = headline(run.metrics, rows)
    of = run.metrics["reference"].of if "reference" in run.metrics else ""
    teacher_events = run.teacher.events if run.teacher else []
    return page(
        "template.html.j2",
        refresh,
        name=run.path.resolve().name,
        lead=lead_options(run.config, run.events),
        status=status(run.events),
        sentence=sentence,
        tiles=tiles,
        missing=missing(run),
        samples=samples_section(run.samples, of),
        of=of,
        reference_title=TAUGHT if of else "Real",
        rows=rows,
        doubts=doubts(rows),
        protocol=protocol(run.events),
        shown_models=[m for m in MODELS if m in run.metrics],
        charts=curve_charts(run.events),
        watch_charts=watch_charts(run.events),
        watched=side_by_side(run.watched),
        teacher_charts=curve_charts(teacher_events),
        noise=noise_charts(run.events),
        speeds=speeds(run.metrics),
        speed_up=speed_up(run.metrics),
        seconds=wall_seconds(run.events),
        teacher_seconds=wall_seconds(teacher_events),
        warnings=warnings(run.events, "") + warnings(teacher_events, "teacher, "),
        has_log=bool(run.events),
        command=run.environment.get("command"),
        configs=[
            (title, part.config_text)
            for title, part in (("config.toml", run), ("teacher/config.toml", run.teacher))
            if part is not None and part.config_text is not None
        ],
        environment=[item for item in flat(run.environment) if item[0] != "command"],
    )


def lead_options(config: dict[str, Any], events: list[Event]) -> list[tuple[str, str]]:
    """What names a run: as its log says it was resolved, else as the config has it, in whatever table."""
    found: dict[str, str] = {}
    started = next((e for e in reversed(events) if e["event"] == "start"), {})
    for key, value in flat(started) + flat(config):
        found.setdefault(key.split(".")[-1], value)
    return [(key, found[key]) for key in _LEAD_OPTIONS if key in found]


def protocol(events: list[Event]) -> list[tuple[str, str]]:
    """How the metrics were measured: what the last ``evaluate`` event says, each by its name and in words."""
    last = next((e for e in reversed(events) if e["event"] == "evaluate"), {})
    found = flat({k: v for k, v in last.items() if k not in ("event", "step", "time")})
    usual = {"guidance": ("1", "1.0"), "reference": ("False",)}
    shown = [(key, value) for key, value in found if value not in usual.get(key, ())]
    return [(key, _PROTOCOL.get(key, f"{key} {{}}").replace("{}", value)) for key, value in shown]


def status(events: list[Event]) -> str:
    """How far the run has come, from its last events."""
    if not events:
        return "not started, or its log is missing"
    done = [e for e in events if e["event"] in ("train", "end") and isinstance(e.get("step"), int)]
    step = done[-1]["step"] if done else None
    at = "" if step is None else f" at step {step:,}"
    resumes = sum(e["event"] == "resume" for e in events)
    again = f", resumed {resumes} time{'s' if resumes != 1 else ''}" if resumes else ""
    last = [e["event"] for e in events if e["event"] in ("start", "resume", "train", "end")]
    if last and last[-1] == "end":
        best = next(e for e in reversed(events) if e["event"] == "end").get("result_of")
        of = f", with the model of step {best:,}" if isinstance(best, int) else ""
        return f"finished{at}{again}{of}"
    return f"not finished{at}{again}: still running, or interrupted"


def missing(run: Run) -> list[str]:
    """What a complete run folder would also hold, in words."""
    parts = [
        ("config.toml, the resolved options", run.config_text is None),
        ("env.json, the command and the machine", not run.environment),
        ("log.jsonl, the training curves", not run.events),
        ("metrics.json, the evaluation", not run.metrics),
    ]
    # A run that trains a teacher logs `loss`; it has no student to miss.
    models = [m for m in MODELS if m != "student" or "loss" not in scalar_keys(run.events)]
    parts += [(f"the metrics of the {m}", bool(run.metrics) and m not in run.metrics) for m in models]
    parts += [(f"samples/{m}.npz", m not in run.samples) for m in models]
    return [text for text, absent in parts if absent]


def speeds(metrics: dict[str, ModelMetrics]) -> list[Speed]:
    """The lines of the speed table: teacher and student, where a time or a number of calls is known."""
    found = [(m, metrics[m]) for m in ("teacher", "student") if m in metrics]
    times = [
        b.seconds_per_1000 for _, b in found if math.isfinite(b.seconds_per_1000) and b.seconds_per_1000 > 0
    ]
    least = min(times, default=math.nan)
    return [
        Speed(
            name,
            b.nfe,
            b.seconds_per_1000,
            100 * least / b.seconds_per_1000 if b.seconds_per_1000 > 0 else math.nan,
        )
        for name, b in found
        if math.isfinite(b.nfe) or math.isfinite(b.seconds_per_1000)
    ]


def warnings(events: list[Event], prefix: str) -> list[tuple[str, str, int]]:
    """The warnings of a log: where first, what, how often."""
    raised = [e for e in events if e["event"] == "warning"]
    often = Counter(str(e.get("message", "")) for e in raised)
    first = {str(e.get("message", "")): e.get("step") for e in reversed(raised)}
    return [
        (
            f"{prefix}step {first[message]:,}" if isinstance(first[message], int) else f"{prefix}start",
            message,
            count,
        )
        for message, count in often.items()
    ]
