"""What the finished runs of a comparison say together, in the form of `compare.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distmatch.base.estimate import Estimate
from distmatch.training.compare_stats import (
    FRONTS,
    HIGHER,
    LOWER,
    Measured,
    difference,
    front_names,
    holm,
    seed_mean,
    verdict,
)

Finished = Mapping[str, Mapping[int, Measured]]


def summarize(record: dict[str, Any], finished: Finished, baseline: str) -> dict[str, Any]:
    """Means, differences from the baseline, Pareto fronts and costs.

    Args:
        record: The content of `compare.json`.
        finished: The metrics of the finished runs by method and seed.
        baseline: The method that the others are compared with; '' or one without a finished run takes the
            best one.

    Returns:
        ``means`` by method and metric, ``baseline``, ``differences``, ``fronts`` and ``costs`` by method.
    """
    metrics = _common_metrics(finished)
    means = {
        name: {metric: seed_mean(metric, list(runs.values())) for metric in metrics}
        for name, runs in finished.items()
    }
    chosen = baseline if baseline in means else _best(means)
    return {
        "means": {name: {k: v.to_dict() for k, v in own.items()} for name, own in means.items()},
        "baseline": chosen,
        "differences": _differences(finished, metrics, chosen) if chosen else [],
        "fronts": [
            {"quality": q, "diversity": d, "methods": front_names((q, d), means)}
            for q, d in FRONTS
            if q in metrics and d in metrics
        ],
        "costs": {method["name"]: _cost(record, method) for method in record["methods"]},
    }


def _common_metrics(finished: Finished) -> list[str]:
    """The metrics that every finished run has, in the order of the first one."""
    all_runs = [run.estimates for runs in finished.values() for run in runs.values()]
    return [metric for metric in (all_runs[0] if all_runs else ()) if all(metric in run for run in all_runs)]


def _best(means: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The best method by the first metric that has a direction; '' without any."""
    present = next(iter(means.values()), {})
    metric = next((m for m in present if m in LOWER + HIGHER), None)
    if metric is None:
        return next(iter(means), "")
    sign = 1.0 if metric in LOWER else -1.0
    return min(means, key=lambda name: sign * means[name][metric].value)


def _differences(finished: Finished, metrics: list[str], baseline: str) -> list[dict[str, Any]]:
    """Each method against the baseline; the methods of one metric are one family of tests."""
    others = [name for name in finished if name != baseline]
    rows = []
    for metric in metrics:
        found = [difference(metric, finished[name], finished[baseline]) for name in others]
        adjusted = holm([d.p for d in found])
        for name, d, p in zip(others, found, adjusted, strict=True):
            rows.append(
                {
                    "metric": metric,
                    "name": name,
                    "value": _finite(d.value),
                    "stderr": _finite(d.stderr),
                    "z": _finite(d.z),
                    "p": _finite(d.p),
                    "p_adjusted": _finite(p),
                    "seeds": d.seeds,
                    "verdict": verdict(metric, d, p),
                }
            )
    return rows


def _cost(record: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """What the runs of a method took: means over those that were timed, the largest peak of memory."""
    runs = [r for r in record["runs"] if r["name"] == method["name"] and r["status"] == "done"]
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]
    memory = [r["memory"] for r in runs if r["memory"] is not None]
    mean = sum(seconds) / len(seconds) if seconds else None
    return {
        "runs": len(runs),
        "seconds": mean,
        "seconds_per_step": None
        if mean is None
        else max(0.0, mean - method["seconds_once"]) / method["steps"],
        "memory": max(memory, default=None),
        "nfe": runs[0]["metrics"]["nfe"] if runs else None,
        "seconds_per_1000": min((r["metrics"]["seconds_per_1000"] for r in runs), default=None),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
