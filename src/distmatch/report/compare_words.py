"""What the page of a comparison says in words, and the estimates in its record."""

from __future__ import annotations

from typing import Any

from distmatch.base.estimate import Estimate
from distmatch.report.table import Metric, plain


def estimates(block: dict[str, Any]) -> dict[str, Estimate]:
    """The estimates among the entries of a block of metrics."""
    return {k: Estimate.from_dict(v) for k, v in block.items() if isinstance(v, dict) and "value" in v}


def sentence(record: dict[str, Any], metrics: list[Metric]) -> str:
    """The result in words: the best by the first metric, and which others really are behind."""
    means, baseline = record["summary"]["means"], record["summary"]["baseline"]
    known: dict[str, Any] = next(iter(means.values()), {})
    first = next((m for m in metrics if m.key in known and m.better in ("down", "up")), None)
    if not baseline or first is None:
        return "No run has been finished and measured yet."
    sign = 1.0 if first.better == "down" else -1.0
    values = {name: Estimate.from_dict(own[first.key]) for name, own in means.items()}
    best = min(values, key=lambda name: sign * values[name].value)
    extreme = "lowest" if first.better == "down" else "highest"
    teacher = estimates(record["teacher"]).get(first.key)
    text = f"{best} has the {extreme} {uncapitalised(first.title)}, {plain(values[best])}"
    text += f"; the teacher has {plain(teacher)}." if teacher else "."
    compared = [d for d in record["summary"]["differences"] if d["metric"] == first.key]
    if not compared:
        return text
    counted = [d for d in compared if d["verdict"] in ("better", "worse")]
    if all(d["verdict"] == "not known" for d in compared):
        return text + " With one seed its significance is unknown."
    if not counted:
        return text + f" No difference from {baseline} exceeds the error."
    worse = sum(d["verdict"] == "worse" for d in counted)
    if worse == len(compared) > 1 and baseline == best:
        return text + f" All {worse} others are worse by more than the error."
    sides = ((worse, "worse"), (len(counted) - worse, "better"))
    parts = " and ".join(f"{n} {'is' if n == 1 else 'are'} {word}" for n, word in sides if n)
    return text + f" Of {len(compared)} compared with {baseline}, {parts} by more than the error."


def uncapitalised(title: str) -> str:
    """The title of a metric within a sentence."""
    return title if title.isupper() or "(" in title or title.startswith("Fréchet") else title.lower()


def failures(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What did not work, and why."""
    failed = [r for r in record["runs"] if r["status"] == "failed"]
    messages = [(f"{run['name']}, seed {run['seed']}", str(run["message"])) for run in failed]
    return messages + [(f"{entry['name']}, left out", str(entry["reason"])) for entry in record["impossible"]]


def lead(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What names a comparison."""
    seeds = sorted({run["seed"] for run in record["runs"]})
    shown = [
        ("teacher", record.get("teacher_name")),
        ("data", record.get("data")),
        ("budget", f"{record['budget']['text']} a run"),
        ("methods", len(record["methods"])),
        ("seeds", ", ".join(map(str, seeds)) if len(seeds) < 8 else f"{seeds[0]} to {seeds[-1]}"),
    ]
    return [(key, str(value)) for key, value in shown if value]


def status(record: dict[str, Any]) -> str:
    """How far it has come."""
    states = [run["status"] for run in record["runs"]]
    text = f"{states.count('done')} of {len(states)} finished"
    for state, word in (("failed", "failed"), ("pending", "not yet run")):
        text += f", {states.count(state)} {word}" if state in states else ""
    return text
