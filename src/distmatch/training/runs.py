"""Carrying out a prepared run: fresh or resumed, in a folder or in memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_json, check_model_folder
from distmatch.base.progress import tell
from distmatch.base.stack import caller_level
from distmatch.data import Dataset
from distmatch.nets.saved import MODEL_PARTS
from distmatch.nets.sizes import RoleSize, as_json, role_sizes
from distmatch.nets.training_state import TrainingState
from distmatch.training.environment import environment, peak_memory
from distmatch.training.log import EventLog
from distmatch.training.loop import restore, run_loop
from distmatch.training.options import RunOptions
from distmatch.training.parallel import share_out, shares_out
from distmatch.training.runfolder import RunFolder
from distmatch.training.segments import (
    Changes,
    changes_on_resume,
    check_inputs,
    write_config,
    write_segment,
)
from distmatch.training.trackers import tracking
from distmatch.training.watch import Watch


@dataclass
class Job:
    """A run that is ready to start.

    Attributes:
        verb: ``train``, ``distill``, or ``fit`` for a training of a program's own.
        options: The resolved options, with :class:`~distmatch.training.options.LoopOptions` as ``run``.
        state: State before the first step.
        step: One training step.
        batches: Batch of a step number.
        networks: Networks by name, for counting parameters.
        result: The averaged teacher, the student, or what else the training ends with.
        save: Writes it to a model folder, atomically; None writes nothing.
        notes: What the start event of the log says besides.
        warnings: Warnings before it starts.
        show: Logged values for the progress bar.
        advise: Warnings about logged values.
        remarks: Automatic choices, printed as the run starts.
        data: The real data, before any encoding; None where there are none.
        watch: Measures samples during training; None measures nothing.
        left_out: Seconds of what a dry run makes a part of, before the first step; after its steps.
    """

    verb: str
    options: Any
    state: TrainingState
    step: Callable[[Any, Any], dict[str, Tensor]]
    batches: Callable[[int], Any]
    networks: dict[str, nn.Module]
    result: Callable[[], Any]
    save: Callable[[Path, Any], None] | None
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    show: tuple[str, ...] = ("loss",)
    advise: Callable[[dict[str, Any]], list[str]] = lambda means: []
    remarks: Sequence[str] = ()
    data: Dataset | None = None
    watch: Watch | None = None
    left_out: Callable[[], float] = lambda: 0.0

    def parameters(self) -> dict[str, int]:
        """Parameter count of each network as it runs, with what it shares with others."""
        return {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks.items()}

    def sizes(self) -> dict[str, RoleSize]:
        """What each network owns, what is shared being the first one's."""
        return role_sizes(self.networks, self.state.optimizers.values(), self.state.ema)

    def share_out(self) -> Callable[[], None]:
        """Shares out the weights among the processes of the run; see :func:`~.parallel.share_out`."""
        run = self.options.run
        if not isinstance(run, RunOptions):
            return lambda: None
        if shares_out(run, self.state.ranks) and self.notes.get("tangent") == "difference":
            raise UserError(
                "derivatives by differences need all weights at once",
                got=f"--tangent difference with --parallel {run.parallel}",
                fix="use --parallel ddp",
            )
        return share_out(self.networks.values(), self.state, run, self.state.generator.device)


def carry_out(
    job: Job, folder: RunFolder | None = None, *, resume: str | int | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Runs a job to its end and saves the model.

    Args:
        job: From one of the ``prepare_`` functions.
        folder: The run folder; None keeps everything in memory.
        resume: ``latest``, a step, or a checkpoint's path; None starts a new run.

    Returns:
        The averaged teacher or the student, and the logged history.
    """
    run, watch, ranks = job.options.run, job.watch, job.state.ranks
    gather = job.share_out()
    if folder is not None:
        check_model_folder(folder.model, MODEL_PARTS)  # what stands in the way is found now, not at the end
        changes: Changes = {}
        if resume is not None:  # before anything is written: a checkpoint that does not fit changes nothing
            changes = changes_on_resume(job.options, folder.config)
            check_inputs(job.notes, folder.log)
            restore(job.state, folder, resume, watch)
        ranks.wait()  # all have read what is there before the first one writes
    if folder is not None and ranks.main:
        again = folder.log.exists()
        if resume is None or not folder.config.exists():
            write_config(job.options, job.verb, folder.config)
            atomic_json(folder.env, environment())
        else:
            write_segment(job.options, job.verb, folder.config, job.state.step, changes)
        with EventLog(folder.log) as log:
            if again or resume is not None:  # also where it begins anew: earlier steps are void
                log.write("resume", job.state.step, changed=changes, environment=environment())
            sizes = as_json(job.sizes())
            log.write(
                "start", job.state.step, kind=job.verb, parameters=job.parameters(), sizes=sizes, **job.notes
            )
            for message in job.warnings:
                log.write("warning", job.state.step, message=message)
    for message in job.warnings if ranks.main else ():
        warnings.warn(message, stacklevel=caller_level())
    for remark in job.remarks:
        tell(remark)
    began, first = time.perf_counter(), job.state.step
    if watch is not None:
        watch.begin(folder.watch if folder is not None else None)
    with tracking(folder, run.track) if folder is not None and ranks.main else nullcontext() as follow:
        history = run_loop(
            job.step,
            job.state,
            job.batches,
            run,
            folder=folder,
            desc=job.verb,
            show=job.show,
            advise=job.advise,
            watch=watch,
            follow=follow,
        )
    done = job.state.step
    if folder is not None and watch is not None and watch.options.result == "best":
        ranks.wait()
        _restore_best(job.state, folder, watch)
    gather()
    model = job.result()
    if folder is not None and ranks.main:
        if job.save is not None:
            job.save(folder.model, model)
        with EventLog(folder.log) as log:
            seconds = time.perf_counter() - began
            best = {} if job.state.step == done else {"result_of": job.state.step}
            log.write("end", done, seconds=seconds, steps=done - first, memory=peak_memory(), **best)
    ranks.wait()  # the folder is complete for all
    return model, history


def _restore_best(state: TrainingState, folder: RunFolder, watch: Watch) -> None:
    """Puts the best checkpoint back; one that cannot be read is a warning, as the run itself is complete."""
    try:
        if watch.best_step is None:
            raise UserError("no measurement was finite")
        restore(state, folder, watch.best_step)
    except UserError as error:
        message = f"the model is that of the last step, as there is no best checkpoint: {error}"
        warnings.warn(message, stacklevel=caller_level())
        if state.ranks.main:
            with EventLog(folder.log) as log:
                log.write("warning", state.step, message=message)
