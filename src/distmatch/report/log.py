"""Reads `log.jsonl`: one event a line, appended by a run that may have been killed and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.inputs import parse_json, read_limited

Event = dict[str, Any]
_LARGEST = 2**28  # bytes; a million lines of a training with every value there is
_LONGEST_LINE = 2**20
LARGEST_VALUE = 1e200
"""Beyond it a value is none: no picture or mean of such numbers has a meaning."""


def _number(value: object) -> float | None:
    """``value`` as a float, NaN for null and beyond 1e200; None where it is no number at all."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < LARGEST_VALUE else math.nan
    return None


def read_log(path: str | os.PathLike[str]) -> list[Event]:
    """Reads the events of a run in the order they were written.

    A line that a crash cut short is skipped. A ``resume`` event at step s makes the earlier ``train`` and
    ``watch`` events beyond s void (those steps are run again), so they are dropped.

    Args:
        path: The `log.jsonl` of a run folder.

    Returns:
        One dict an event, each with the key ``event``.

    Raises:
        UserError: The file is no regular file, cannot be read or is larger than 256 MiB.
    """
    text = read_limited(path, _LARGEST, "the log.jsonl of a run folder").decode("utf-8", errors="replace")
    events: list[Event] = []
    for line in text.split("\n"):
        try:
            event = parse_json(line) if len(line) <= _LONGEST_LINE else None
        except UserError:
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        if event["event"] == "resume":
            step = _number(event.get("step"))
            if step is not None and math.isfinite(step):
                events = [e for e in events if not _is_void(e, step)]
        events.append(event)
    return events


def _is_void(event: Event, resumed_at: float) -> bool:
    step = _number(event.get("step"))
    return event["event"] in ("train", "watch") and step is not None and step > resumed_at


def curves(events: Sequence[Event], key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The values of one key over the events of a kind.

    Args:
        events: What :func:`read_log` returned.
        key: A scalar (``loss_student``) or a list over noise bins (``ratio_mean``).
        kind: ``train`` or ``watch``.

    Returns:
        Steps of shape (T,) and values of shape (T,), or (T, bins) for lists; both float64, NaN for null.
        Events without the key are omitted, and so are lists of another length than the last one.
    """
    steps: list[float] = []
    values: list[list[float]] = []
    is_list = False
    for event in events:
        step = _number(event.get("step"))
        if event["event"] != kind or key not in event or step is None or not math.isfinite(step):
            continue
        is_list = isinstance(event[key], list)
        row = [_number(v) for v in (event[key] if is_list else [event[key]])]
        if row and all(v is not None for v in row):
            steps.append(step)
            values.append([v for v in row if v is not None])
    width = len(values[-1]) if values else 1
    keep = [i for i, row in enumerate(values) if len(row) == width]
    table = np.array([values[i] for i in keep], dtype=np.float64).reshape(len(keep), width)
    at = np.array([steps[i] for i in keep], dtype=np.float64)
    return at, table if is_list else table[:, 0]


def scalar_keys(events: Sequence[Event], kind: str = "train") -> list[str]:
    """The keys of the events of a kind that hold numbers, in order of first appearance."""
    found: dict[str, None] = {}
    for event in events:
        if event["event"] == kind:
            for key, value in event.items():
                if key not in ("event", "step", "time") and value is not None and _number(value) is not None:
                    found[key] = None
    return list(found)


def watched_steps(events: Sequence[Event]) -> list[int]:
    """The steps at which the student was measured, ascending."""
    return sorted({e["step"] for e in events if e["event"] == "watch" and type(e.get("step")) is int})


def _moment(event: Event) -> float:
    """The ``time`` of an event in seconds, NaN where it has none; ISO 8601 text is read as well."""
    value = event.get("time")
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return math.nan
    number = _number(value)
    return math.nan if number is None else number


def wall_seconds(events: Sequence[Event]) -> float:
    """Seconds that training took: without the pauses before it was resumed, and without evaluations."""
    total = 0.0
    for earlier, later in pairwise(events):
        gap = _moment(later) - _moment(earlier)
        if (
            later["event"] in ("train", "watch", "warning", "checkpoint", "end")
            and math.isfinite(gap)
            and gap > 0
        ):
            total += gap
    return total
