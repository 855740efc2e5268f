"""Carrying out a comparison: one run folder for each method and seed, and `compare.json`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_json, atomic_write, read_json
from distmatch.base.progress import in_words, tell
from distmatch.base.ranks import joined
from distmatch.data import Dataset
from distmatch.diffusion.denoiser import Denoiser
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.comparison.bench import Bench, measured, open_bench
from distmatch.training.comparison.cost import PeakMemory
from distmatch.training.comparison.options import CompareOptions, Entry, SharedOptions, entry_options
from distmatch.training.comparison.plan import Plan, check_options, plan_comparison, reason, same_for_all
from distmatch.training.comparison.stats import Measured, summarize
from distmatch.training.config_format import config_text, read_config
from distmatch.training.devices import pick_device
from distmatch.training.environment import environment
from distmatch.training.prepare import prepare_distillation
from distmatch.training.runfolder import RunFolder, create_together, holds_something
from distmatch.training.runs import carry_out
from distmatch.training.segments import PROMPTS, require_same_inputs
from distmatch.training.toml import with_values

RECORD = "compare.json"
"""Its name in the folder of a comparison."""
_MAY_CHANGE = ("seeds", "baseline", "retry_failed")


@dataclass(frozen=True)
class Prepared:
    """A comparison that nothing speaks against, before its folder is touched.

    Attributes:
        options: The requested options.
        entries: The methods by name.
        teacher: Used instead of the teacher that the options name.
        data: Used instead of the data that they name.
        texts: Prompts in place of those that the options name.
        bench: What measures the students.
        plan: Methods, costs and steps; None where a record of them is taken up.
    """

    options: CompareOptions
    entries: dict[str, Entry]
    teacher: Denoiser | None
    data: Dataset | None
    texts: Sequence[str] | None
    bench: Bench
    plan: Plan | None


def prepare_comparison(
    options: CompareOptions,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    texts: Sequence[str] | None = None,
    *,
    resumed: Path | None = None,
) -> Prepared:
    """Tries every method for a few steps; writes nothing, so that what is refused leaves all as it was.

    Args:
        options: The options.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.
        texts: Prompts in place of those that they name.
        resumed: The folder of a comparison to continue. With a record in it nothing is tried again.

    Raises:
        UserError: The options make no sense, or a method cannot be used here.
    """
    entries = {entry.name: entry for entry in check_options(options)}
    ranks = joined()
    ranks.require_same("options", config_text("compare", options))
    ranks.share(options.shared.run.batch)
    bench = open_bench(options, teacher, data, texts)
    again = resumed is not None and (resumed / RECORD).exists()
    plan = None if again else plan_comparison(options, teacher, data, texts)
    return Prepared(options, entries, teacher, data, texts, bench, plan)


def carry_out_comparison(prepared: Prepared, folder: RunFolder) -> dict[str, Any]:
    """Trains every method with every seed at the same budget and measures all on the same latents.

    What the folder holds already is kept: finished runs, failed ones (unless they are to be tried again), the
    steps that were decided from the measured times, the checkpoints of an interrupted run.

    Args:
        prepared: From :func:`prepare_comparison`.
        folder: The comparison's folder, locked.

    Returns:
        The content of `compare.json`.

    Raises:
        UserError: The folder holds a comparison with other options.
        KeyboardInterrupt: Ctrl-C; the current run has a checkpoint.
    """
    options = prepared.options
    check_same(options, folder)
    digest = prepared.bench.prompts
    if prepared.plan is None:
        record = read_json(folder.path / RECORD)
        require_same_inputs({PROMPTS: digest}, record)
    else:
        record = new_record(options, prepared.plan)
        record |= {PROMPTS: digest} if digest else {}
        record |= {"evaluation": prepared.bench.settings(), **prepared.bench.baseline(folder)}
    record["runs"] = all_runs(record, options)
    comparison = _Comparison(prepared, folder, record)
    joined().wait()  # all have read what is there before the first one writes
    if joined().main:
        atomic_write(folder.config, config_text("compare", options))
        atomic_json(folder.env, environment())
    comparison.write()
    for run in record["runs"]:
        if run["status"] == "pending":
            comparison.carry_out(run)
            comparison.write()
    return record


@dataclass(frozen=True)
class _Comparison:
    """A running comparison: its options, its evaluation, its folder and its record."""

    prepared: Prepared
    folder: RunFolder
    record: dict[str, Any]

    def write(self) -> None:
        """Brings the summary up to date and writes the record; the first process does."""
        if not joined().main:
            return
        finished: dict[str, dict[int, Measured]] = {}
        for run in self.record["runs"]:
            if run["status"] == "done":
                finished.setdefault(run["name"], {})[run["seed"]] = measured(run, self._place(run))
        self.record["summary"] = summarize(self.record, finished, self.prepared.options.baseline)
        atomic_json(self.folder.path / RECORD, self.record)

    def carry_out(self, run: dict[str, Any]) -> None:
        """Trains and measures one run; its entry says how that went."""
        tell(progress_line(self.record, run))
        try:
            found = self._train_and_measure(run)
        except Exception as error:  # one failed run does not stop the others
            if not same_for_all(error):
                raise
            run |= {"status": "failed", "message": reason(error)}
            tell(f"compare: {run['name']} with seed {run['seed']} failed. {run['message']}")
        else:
            run |= {"status": "done", **found}

    def _train_and_measure(self, run: dict[str, Any]) -> dict[str, Any]:
        steps = method_of(self.record, run)["steps"]
        entry = self.prepared.entries[run["name"]]
        options = entry_options(self.prepared.options.shared, entry, seed=run["seed"], steps=steps)
        place = self._place(run)
        started = bool(list_checkpoints(place.checkpoints))
        memory = PeakMemory(pick_device(options.run.device))
        ready = self.prepared
        job = prepare_distillation(options, ready.teacher, ready.data, texts=ready.texts, fresh=not started)
        with create_together(place.path, resume=holds_something(place)) as own:
            began = time.perf_counter()
            student, _ = carry_out(job, own, resume="latest" if started else None)
            seconds, taken = time.perf_counter() - began, memory.bytes()
            del job
            others = {name: self.record[name] for name in ("reference", "teacher")}
            metrics = self.prepared.bench.student(student, own, others)
        # Of a resumed run only the last part was timed here.
        return {"seconds": None if started else seconds, "memory": taken, "metrics": metrics}

    def _place(self, run: dict[str, Any]) -> RunFolder:
        return RunFolder(self.folder.path / run["folder"])


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
    """The message before a run: which of how many, and how long the rest will take."""
    cost = {m["name"]: m["seconds_once"] + m["steps"] * m["seconds_per_step"] for m in record["methods"]}
    runs, method = record["runs"], method_of(record, run)
    left = sum(cost[r["name"]] for r in runs if r["status"] == "pending")
    return (
        f"compare: run {1 + runs.index(run)} of {len(runs)}, {run['name']} with seed {run['seed']}: "
        f"{method['steps']} steps, about {in_words(cost[run['name']])}; all in about {in_words(left)}"
    )


def check_same(options: CompareOptions, folder: RunFolder) -> None:
    """Refuses to continue a comparison that was started with other options.

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
            f"the comparison in {folder.path} was started with other options",
            got=f"other {', '.join(changed)}" if changed else f"--seeds {options.seeds} after {begun.seeds}",
            expected="the same; only --baseline may change and --seeds may grow",
            fix="omit the options, since --resume reads them from the folder; or choose another --out",
        )
