"""What a dry run says of the watch of a training."""

from __future__ import annotations

from typing import Any

from distmatch.base.progress import in_words
from distmatch.training.runs import Job
from distmatch.training.watch_time import number_of_looks, watch_seconds


def watch_cost(job: Job, done: int) -> dict[str, Any]:
    """What the measurements of a run cost; empty where it has none.

    Args:
        job: The run.
        done: The step from which it continues.
    """
    if job.watch is None:
        return {}
    once, each = watch_seconds(job.watch)
    looks, against = number_of_looks(job.watch, done), job.watch.watched.against
    return {
        "measurements": looks,
        "seconds_once": round(once, 4),
        "seconds_each": round(each, 4),
        "seconds": round(once + looks * each, 1),
        "samples_against_data": 0 if against is None else against.n,
        **job.watch.watched.said,
    }


def watch_line(cost: dict[str, Any]) -> str:
    """The same in words."""
    n = cost["samples_against_data"]
    what = f"{n} samples against the data" if n else "nothing against real data"
    if "solver_steps" in cost:
        what += f", drawn with {cost['solver_steps']} {cost['solver'].capitalize()} steps"
    looks = cost["measurements"]
    return (
        f"about {in_words(cost['seconds'])} of these for {looks} measurement{'s' if looks != 1 else ''} "
        f"({1000 * cost['seconds_each']:.0f} ms each; {what})"
        + ("; a feature network for the data is trained once, if it is not in the cache" if n else "")
    )
