"""Carrying out a comparison: one run folder for each method and seed, and `compare.json` beside them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmatch.base.files import atomic_json, atomic_write, read_json
from distmatch.base.progress import tell
from distmatch.data import Dataset
from distmatch.diffusion.denoiser import Denoiser
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.compare_cost import PeakMemory
from distmatch.training.compare_evaluate import Bench, measured, open_bench
from distmatch.training.compare_options import CompareOptions, Entry, entry_options
from distmatch.training.compare_plan import Plan, check_options, plan_comparison, reason
from distmatch.training.compare_record import (
    RECORD,
    all_runs,
    check_same,
    method_of,
    new_record,
    progress_line,
)
from distmatch.training.compare_stats import Measured
from distmatch.training.compare_summary import summarize
from distmatch.training.config_format import config_text
from distmatch.training.devices import pick_device
from distmatch.training.environment import environment
from distmatch.training.prepare import prepare_distillation
from distmatch.training.runfolder import RunFolder, create, holds_something
from distmatch.training.runs import carry_out


@dataclass(frozen=True)
class Prepared:
    """A comparison that nothing speaks against, before its folder is touched.

    Attributes:
        options: What was asked for.
        entries: The methods by name.
        teacher: Used instead of the teacher that the options name.
        data: Used instead of the data that they name.
        bench: What measures the students.
        plan: Methods, costs and steps; None where a record of them is taken up.
    """

    options: CompareOptions
    entries: dict[str, Entry]
    teacher: Denoiser | None
    data: Dataset | None
    bench: Bench
    plan: Plan | None


def prepare_comparison(
    options: CompareOptions,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    *,
    resumed: Path | None = None,
) -> Prepared:
    """Tries every method for a few steps; writes nothing, so that what is refused leaves all as it was.

    Args:
        options: The options.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.
        resumed: The folder of a comparison that shall go on. With a record in it nothing is tried again.

    Raises:
        UserError: The options make no sense, or a method cannot be used here.
    """
    entries = {entry.name: entry for entry in check_options(options)}
    bench = open_bench(options, teacher, data)
    again = resumed is not None and (resumed / RECORD).exists()
    plan = None if again else plan_comparison(options, teacher, data)
    return Prepared(options, entries, teacher, data, bench, plan)


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
        KeyboardInterrupt: Ctrl-C; the run in hand has a checkpoint.
    """
    options = prepared.options
    check_same(options, folder)
    if prepared.plan is None:
        record = read_json(folder.path / RECORD)
    else:
        record = new_record(options, prepared.plan)
        record |= {"evaluation": prepared.bench.settings(), **prepared.bench.baseline(folder)}
    record["runs"] = all_runs(record, options)
    comparison = _Comparison(prepared, folder, record)
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
    """A comparison in hand: what it was told and measures with, its folder and its record."""

    told: Prepared
    folder: RunFolder
    record: dict[str, Any]

    def write(self) -> None:
        """Brings the summary up to date and writes the record."""
        finished: dict[str, dict[int, Measured]] = {}
        for run in self.record["runs"]:
            if run["status"] == "done":
                finished.setdefault(run["name"], {})[run["seed"]] = measured(run, self._place(run))
        self.record["summary"] = summarize(self.record, finished, self.told.options.baseline)
        atomic_json(self.folder.path / RECORD, self.record)

    def carry_out(self, run: dict[str, Any]) -> None:
        """Trains and measures one run; its entry says how that went."""
        tell(progress_line(self.record, run))
        try:
            found = self._train_and_measure(run)
        except Exception as error:  # one failed run does not stop the others
            run |= {"status": "failed", "message": reason(error)}
            tell(f"compare: {run['name']} with seed {run['seed']} failed. {run['message']}")
        else:
            run |= {"status": "done", **found}

    def _train_and_measure(self, run: dict[str, Any]) -> dict[str, Any]:
        steps = method_of(self.record, run)["steps"]
        entry = self.told.entries[run["name"]]
        options = entry_options(self.told.options.shared, entry, seed=run["seed"], steps=steps)
        place = self._place(run)
        started = bool(list_checkpoints(place.checkpoints))
        memory = PeakMemory(pick_device(options.run.device))
        job = prepare_distillation(options, self.told.teacher, self.told.data, fresh=not started)
        with create(place.path, resume=holds_something(place)) as own:
            began = time.perf_counter()
            student, _ = carry_out(job, own, resume="latest" if started else None)
            seconds, taken = time.perf_counter() - began, memory.bytes()
            del job
            others = {name: self.record[name] for name in ("reference", "teacher")}
            metrics = self.told.bench.student(student, own, others)
        # Of a resumed run only the last part was timed here.
        return {"seconds": None if started else seconds, "memory": taken, "metrics": metrics}

    def _place(self, run: dict[str, Any]) -> RunFolder:
        return RunFolder(self.folder.path / run["folder"])
