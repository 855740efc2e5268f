"""The tables that verbs print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import key_in, metric_of, published_name, space_of

_BETTER = {
    "fd": "lower",
    "kid": "lower",
    "mmd": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "floor",
    "coverage": "higher",
    "vendi": "floor",
    "class_distance": "floor",
    "authentic": "floor",
    "memorized": "floor",
    "frame_fd": "lower",
    "motion": "floor",
    "label_accuracy": "higher",
    "prompt_energy": "lower",
    "prompt_diversity": "floor",
    "prompt_vendi": "floor",
    "modes": "higher",
    "kl": "lower",
    "reverse_kl": "lower",
    "js": "lower",
}


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a plain-text table, with a rule below its first row, the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def metric_table(metrics: dict[str, dict[str, Any]], features: str = "", notes: Sequence[str] = ()) -> str:
    """A plain-text table: a row for each metric, a column for each model, value ± standard error.

    Density, Vendi and motion are best at the floor: more means concentrated or noisy samples. Warnings stand
    below.

    Args:
        metrics: By model.
        features: The description of the space they were measured in.
        notes: Remarks on all of it.
    """
    models = list(metrics)
    of = metrics.get("reference", {}).get("of")
    titles = [f"floor ({'teacher' if of else 'real'})" if m == "reference" else m for m in models]
    keys = dict.fromkeys(key for block in metrics.values() for key in block)
    spaces = list(dict.fromkeys(["", *map(space_of, keys)]))
    several = ["features"] if len(spaces) > 1 else []
    rows = [["metric", *titles, "better", *several]]
    n = 0
    for key in (key_in(metric, space) for space in spaces for metric in _BETTER):
        cells = [metrics[m].get(key) for m in models]
        if measured := [c for c in cells if isinstance(c, Estimate)]:
            used, better = measured[0].features, _BETTER[metric_of(key)]
            name = published_name(key, used) or metric_of(key)
            rows.append([name, *(_cell(c) for c in cells), better, *([used] if several else [])])
            n = max([n, *(c.n for c in measured if key == "fd")])
    for key, title in (("nfe", "network calls"), ("seconds_per_1000", "seconds per 1000")):
        cells = [metrics[m].get(key) for m in models]
        if any(c for c in cells):
            rows.append([title, *(f"{c:.3g}" if c else "-" for c in cells), "lower", *[""] * len(several)])
    lines = in_columns(rows)
    whose = "samples of the teacher with others" if of else "real data with real data"
    lines.append(f"blocks of {n} samples; the floor compares {whose} at the same size")
    if features:
        lines.append(f"features: {features}")
    lines += [f"note: {note}" for note in notes]
    warned: dict[str, list[str]] = {}
    for model, block in metrics.items():
        for key, value in block.items():
            if isinstance(value, Estimate) and value.warning is not None:
                warned.setdefault(value.warning, []).append(f"{key} of {model}")
    lines += [f"warning: {', '.join(whose)}: {warning}" for warning, whose in warned.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value.value:.4g} ± {value.stderr:.2g}" if isinstance(value, Estimate) else "-"
