"""`compare.json`: what a comparison has come to so far, written after every run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.progress import in_words
from distmatch.training.compare_options import CompareOptions, SharedOptions
from distmatch.training.compare_plan import Plan
from distmatch.training.config_format import read_config
from distmatch.training.runfolder import RunFolder
from distmatch.training.toml import with_values

RECORD = "compare.json"
"""Its name in the folder of a comparison."""
_MAY_CHANGE = ("seeds", "baseline", "retry_failed")


def new_record(options: CompareOptions, plan: Plan) -> dict[str, Any]:
    """What is known before anything is trained."""
    return {
        "verb": "compare",
        "teacher_name": options.shared.teacher,
        "data": options.shared.data,
        "budget": {"text": options.budget, "amount": plan.budget.amount, "unit": plan.budget.unit},
        "methods": [planned.to_dict() for planned in plan.methods],
        "impossible": [{"name": name, "reason": why} for name, why in plan.impossible],
        "runs": [],
    }


def all_runs(record: dict[str, Any], options: CompareOptions) -> list[dict[str, Any]]:
    """The runs, one seed of every method before the next seed; what is known of each is kept."""
    known = {(run["name"], run["seed"]): run for run in record["runs"]}
    runs = []
    first = options.shared.run.seed
    for seed in range(first, first + options.seeds):
        for method in record["methods"]:
            place = f"runs/{method['folder']}-seed{seed}"
            fresh = {"name": method["name"], "seed": seed, "folder": place, "status": "pending"}
            run = known.get((method["name"], seed), fresh)
            again = run["status"] == "failed" and options.retry_failed
            runs.append(fresh if again else run)
    return runs


def method_of(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The entry of a run's method."""
    found: dict[str, Any] = next(m for m in record["methods"] if m["name"] == run["name"])
    return found


def progress_line(record: dict[str, Any], run: dict[str, Any]) -> str:
    """What is said before a run: which of how many, and how long the rest will take."""
    cost = {m["name"]: m["seconds_once"] + m["steps"] * m["seconds_per_step"] for m in record["methods"]}
    runs, method = record["runs"], method_of(record, run)
    left = sum(cost[r["name"]] for r in runs if r["status"] == "pending")
    return (
        f"compare: run {1 + runs.index(run)} of {len(runs)}, {run['name']} with seed {run['seed']}: "
        f"{method['steps']} steps, about {in_words(cost[run['name']])}; all in about {in_words(left)}"
    )


def check_same(options: CompareOptions, folder: RunFolder) -> None:
    """Refuses to go on with a comparison that was begun with other options.

    Raises:
        UserError: The folder holds one.
    """
    if not folder.config.exists():
        return
    values = read_config(folder.config)
    values.pop("verb", None)
    begun = with_values(CompareOptions(), values, where=str(folder.config))
    names = [f.name for f in fields(options) if f.name not in (*_MAY_CHANGE, "shared")]
    changed = [name for name in names if getattr(begun, name) != getattr(options, name)]
    parts = [f.name for f in fields(SharedOptions)]
    changed += [name for name in parts if getattr(begun.shared, name) != getattr(options.shared, name)]
    if changed or options.seeds < begun.seeds:
        raise UserError(
            f"the comparison in {folder.path} was begun with other options",
            got=f"other {', '.join(changed)}" if changed else f"--seeds {options.seeds} after {begun.seeds}",
            expected="the same; only --baseline and a larger --seeds may be new",
            fix="leave the options out, as --resume takes them from the folder; or choose another --out",
        )
