"""Carrying out a comparison: one run folder for each method and seed, and `compare.json` beside them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from distmatch.base.files import atomic_json, atomic_write, read_json
from distmatch.data import Dataset
from distmatch.diffusion.denoiser import Denoiser
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.compare_cost import PeakMemory
from distmatch.training.compare_evaluate import Bench, measured, open_bench
from distmatch.training.compare_options import CompareOptions, Entry, entry_options
from distmatch.training.compare_plan import check_options, plan_comparison, reason
from distmatch.training.compare_record import (
    RECORD,
    all_runs,
    check_same,
    method_of,
    new_record,
    progress_line,
)
from distmatch.training.compare_stats import Measured
from distmatch.training.compare_summary import summarise
from distmatch.training.devices import pick_device
from distmatch.training.environment import environment
from distmatch.training.prepare import prepare_distillation
from distmatch.training.runfolder import RunFolder, create
from distmatch.training.runs import carry_out
from distmatch.training.toml import dataclass_to_dict, to_toml


def carry_out_comparison(
    options: CompareOptions,
    folder: RunFolder,
    *,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains every method with every seed at the same budget and measures all on the same latents.

    What the folder holds already is kept: finished runs, failed ones (unless they are to be tried again), the
    steps that were decided from the measured times, the checkpoints of an interrupted run.

    Args:
        options: The options.
        folder: The comparison's folder, locked.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.
        quiet: Whether to say nothing on stderr.

    Returns:
        The content of `compare.json`.

    Raises:
        UserError: The options make no sense, a method cannot be used here, or the folder holds a comparison
            with other options.
        KeyboardInterrupt: Ctrl-C; the run in hand has a checkpoint.
    """
    entries = {entry.name: entry for entry in check_options(options)}
    check_same(options, folder)
    bench = open_bench(options, teacher, data)
    if (folder.path / RECORD).exists():
        record = read_json(folder.path / RECORD)
    else:
        plan = plan_comparison(options, teacher, data, quiet=quiet)
        record = new_record(options, plan)
        record |= {"evaluation": bench.settings(), **bench.baseline(folder, quiet)}
    record["runs"] = all_runs(record, options)
    comparison = _Comparison(options, entries, folder, record, bench, teacher, data, quiet)
    atomic_write(folder.config, to_toml({"verb": "compare", **dataclass_to_dict(options)}))
    atomic_json(folder.env, environment())
    comparison.write()
    for run in record["runs"]:
        if run["status"] == "pending":
            comparison.carry_out(run)
            comparison.write()
    return record


@dataclass(frozen=True)
class _Comparison:
    """A comparison in hand: what it was told, its folder and its record, what it measures with."""

    options: CompareOptions
    entries: dict[str, Entry]
    folder: RunFolder
    record: dict[str, Any]
    bench: Bench
    teacher: Denoiser | None
    data: Dataset | None
    quiet: bool

    def write(self) -> None:
        """Brings the summary up to date and writes the record."""
        finished: dict[str, dict[int, Measured]] = {}
        for run in self.record["runs"]:
            if run["status"] == "done":
                finished.setdefault(run["name"], {})[run["seed"]] = measured(run, self._place(run))
        self.record["summary"] = summarise(self.record, finished, self.options.baseline)
        atomic_json(self.folder.path / RECORD, self.record)

    def carry_out(self, run: dict[str, Any]) -> None:
        """Trains and measures one run; its entry says how that went."""
        self._say(progress_line(self.record, run))
        try:
            found = self._train_and_measure(run)
        except Exception as error:  # one failed run does not stop the others
            run |= {"status": "failed", "message": reason(error)}
            self._say(f"compare: {run['name']} with seed {run['seed']} failed. {run['message']}")
        else:
            run |= {"status": "done", **found}

    def _train_and_measure(self, run: dict[str, Any]) -> dict[str, Any]:
        steps = method_of(self.record, run)["steps"]
        options = entry_options(self.options.shared, self.entries[run["name"]], seed=run["seed"], steps=steps)
        place = self._place(run)
        started = bool(list_checkpoints(place.checkpoints))
        memory = PeakMemory(pick_device(options.run.device))
        job = prepare_distillation(options, self.teacher, self.data, fresh=not started)
        with create(place.path, resume=_holds_something(place)) as own:
            began = time.perf_counter()
            student, _ = carry_out(job, own, resume="latest" if started else None, quiet=self.quiet)
            seconds, taken = time.perf_counter() - began, memory.bytes()
            del job
            others = {name: self.record[name] for name in ("reference", "teacher")}
            metrics = self.bench.student(student, own, others, self.quiet)
        # Of a resumed run only the last part was timed here.
        return {"seconds": None if started else seconds, "memory": taken, "metrics": metrics}

    def _place(self, run: dict[str, Any]) -> RunFolder:
        return RunFolder(self.folder.path / run["folder"])

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr)


def _holds_something(place: RunFolder) -> bool:
    """Whether a run was begun in a folder; the lock alone is no beginning."""
    return place.path.is_dir() and any(entry.name != ".lock" for entry in place.path.iterdir())
