"""What `train` and `distill` have in common: dry runs, folders, the closing lines."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.progress import in_words
from distmatch.cli.answer import print_json
from distmatch.cli.found import check_grid, describe_found, found_lines, write_grid
from distmatch.cli.memory import as_dict, lines, memory_error
from distmatch.cli.parse import Place, TrainingPlace, checkpoint_choice, given
from distmatch.cli.seen import watch_cost, watch_line
from distmatch.cli.student_steps import steps_line, steps_of, without_effect
from distmatch.cli.surroundings import launched_as
from distmatch.methods.matching.pairs import about_pairs
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.table import find_method
from distmatch.nets.sizes import as_json
from distmatch.report.log import read_log
from distmatch.training.auto import CHOICES, Choice, O, choose
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.comparison.cost import PeakMemory, step_times
from distmatch.training.config_format import config_text
from distmatch.training.devices import pick_device
from distmatch.training.loop import restore
from distmatch.training.memory import predicted
from distmatch.training.options import DistillOptions, NetOptions, TrainOptions
from distmatch.training.presets import describe
from distmatch.training.runfolder import RunFolder, check_usable, create_together, holds_something
from distmatch.training.runs import Job, carry_out
from distmatch.training.segments import changes_on_resume, check_inputs
from distmatch.training.toml import dataclass_to_dict

_LONG, _SMALL_BATCH = 7200.0, 64  # seconds from which on a dry run proposes a batch that makes a run shorter


def open_folder(place: Place, inputs: tuple[str, ...] = ()) -> RunFolder:
    """The run folder of `--out`, locked.

    Raises:
        UserError: No `--out`, or a folder that cannot be used.
    """
    return create_together(
        _out(place),
        resume=place.resume is not None,
        overwrite=place.overwrite,
        inputs=[path for path in inputs if path],
    )


def check_place(place: Place, inputs: tuple[str, ...] = ()) -> None:
    """Raises immediately the errors of :func:`open_folder`; a dry run needs a place to resume in alone.

    Raises:
        UserError: No `--out`, a folder that cannot be used, or a `--grid` that cannot be written.
    """
    check_grid(place.grid, dry_run=place.dry_run, overwrite=place.overwrite)
    if not place.dry_run or place.resume is not None:
        check_usable(
            _out(place),
            resume=place.resume is not None,
            overwrite=place.overwrite,
            inputs=[path for path in inputs if path],
        )


def _out(place: Place) -> Path:
    if place.out is None:
        raise UserError(
            "no folder was given for the run", expected="--out FOLDER, for example --out runs/one"
        )
    return place.out


@contextmanager
def going_on(verb: str, place: Place, options: Sequence[str] | None = None) -> Iterator[None]:
    """A context in which an interruption prints how to continue, if the folder contains a run.

    Args:
        verb: The verb.
        place: Where the run is.
        options: Those that have to be given again; None: `--out` alone, the others are in the run's config.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        folder = RunFolder(_out(place))
        if holds_something(folder):
            saved = list_checkpoints(folder.checkpoints)
            given = ["--out", str(place.out)] if options is None else options
            command = f"{launched_as(os.environ)} {shlex.join([verb, '--resume', *given])}"
            stop.args = (f"continue{f' from step {max(saved)}' if saved else ''} with: {command}",)
        raise


def starts_afresh(place: Place) -> bool:
    """Whether training begins at step 0: not resumed, or killed before its first checkpoint."""
    if place.resume is None or place.out is None:
        return True
    return place.resume == "latest" and not list_checkpoints(place.out / "checkpoints")


def tuned(
    options: O, place: TrainingPlace, argv: Sequence[str], build: Callable[[O], Job]
) -> tuple[O, list[Choice]]:
    """The options with what `--auto` chooses; as they are without it, and for a run that has its choices.

    Args:
        options: The options.
        place: Where the run goes.
        argv: The arguments after the verb.
        build: Prepares a run that is measured and thrown away.
    """
    if not (place.auto or place.auto_batch) or place.resume is not None:
        return options, []
    fixed = given(argv, place.config, CHOICES)
    return choose(options, build, fixed=fixed, batch=place.auto_batch)


def dry_run(job: Job, place: Place) -> None:
    """Shows what a run would do, from a few real steps of it; writes nothing except the requested grid.

    Args:
        job: The run.
        place: Where it would go.

    Raises:
        UserError: A grid is requested, and there are no data; or the run to resume began with others.
    """
    if place.grid is not None and job.data is None:
        raise UserError("there are no data to show", got=f"--grid {place.grid}", fix="leave it out")
    found = describe_found(job.data) if job.data is not None else None
    parameters = job.parameters()
    run = job.options.run
    device = pick_device(run.device)
    job.share_out()
    done = _steps_done(job, place)
    peak = PeakMemory(device)
    once, seconds = step_times(job, device)
    once += job.left_out()
    used = peak.bytes()
    memory_ahead = predicted(job.options, job.networks)
    sizes = job.sizes()
    weights = sum(size.weights for size in sizes.values())
    memory = round(sum(size.bytes for size in sizes.values()) / 2**20, 1)
    most = None if used is None else round((weights + used) / 2**20, 1)
    watched = watch_cost(job, done)
    whole = once + seconds * (run.steps - done) + (watched["seconds"] if watched else 0.0)
    if place.grid is not None and job.data is not None:
        write_grid(place.grid, job.data, run.seed, place.overwrite)
    timing = f"{in_words(whole)} ({1000 * seconds:.1f} ms a step, {run.steps - done} steps)"
    options, teacher = job.options, job.networks.get("teacher")
    steps = steps_of(teacher, job.notes["levels"]) if isinstance(options, DistillOptions) else {}
    larger = job.notes.get("larger_net")
    if larger:
        larger = {**larger, "estimated_seconds": round(larger["times_the_work"] * whole, 1)}
    shown = {
        "verb": job.verb,
        "options": dataclass_to_dict(replace(job.options)),
        "device": str(device),
        **({"continues_from": done} if done else {}),
        "parameters": parameters,
        "sizes": as_json(sizes),
        "memory_mib": memory,
        "peak_memory_mib": most,
        **({"predicted": as_dict(memory_ahead)} if memory_ahead else {}),
        "seconds_per_step": round(seconds, 4),
        "seconds_once": round(once, 4),
        "estimated_seconds": round(whole, 1),
        **({"watch": watched} if watched else {}),
        **job.notes,
        **steps,
        **({"larger_net": larger} if larger else {}),
        **({"found": found} if found else {}),
        **({"warnings": job.warnings} if job.warnings else {}),
    }
    if place.json:
        print_json(shown)
        return
    copied = isinstance(options, DistillOptions) and options.net == NetOptions()
    idle = without_effect(options.settings, teacher) if isinstance(options, DistillOptions) else set()
    print(config_text(job.verb, options, without=idle | ({"net"} if copied else set())))
    print("# not written: this is a dry run")
    if done:
        print(f"# continues   from step {done} of {run.steps}, on the data that the run began with")
    if isinstance(options, DistillOptions):
        divergence = job.notes.get("divergence")
        print(f"# method      {job.notes['method']}{f', divergence {divergence}' if divergence else ''}")
        print(f"# preset      {describe(options.preset)}")
        print(f"# {steps_line(steps)}")
    if "prompts" in job.notes:
        print(f"# prompts     {job.notes['prompts']:,}")
    for line in found_lines(found) if found else ():
        print(f"# {line}")
    for choice in job.notes.get("auto", ()):
        print(f"# auto        {Choice(**choice).line}")
    if place.grid is not None:
        print(f"# grid        {place.grid}")
    print(f"# device      {shown['device']}")
    if copied:
        adapted = getattr(options.settings, "train", "full") == "lora"
        print(f"# network     {'adapters on the network of' if adapted else 'copied from'} the teacher")
    for name, size in sizes.items():
        shared = parameters[name] - size.parameters
        print(f"# parameters  {name}: {size.parameters:,}{f', and {shared:,} shared' if shared else ''}")
    measured = "activations on top" if most is None else f"with activations {most:.0f} MiB at most, measured"
    print(f"# memory      about {memory} MiB for weights, gradients and Adam, {measured}")
    for line in lines(memory_ahead) if memory_ahead else ():
        print(f"# {line}")
    print(f"# time        about {timing}")
    if watched:
        print(f"# watch       {watch_line(watched)}")
    if isinstance(options, DistillOptions) and isinstance(options.settings, DMDSettings):
        print(f"# pairs       {about_pairs(options.settings)}")
    if once >= 1:
        print(f"# of these    about {in_words(once)} for what is made once, before the first step")
    if larger:
        print(
            f"# network     {job.options.net.net} is the default on a CPU; --net {larger['net']}, with "
            f"{larger['parameters']:,} parameters, would take about {in_words(larger['estimated_seconds'])}"
        )
    if whole > _LONG and run.batch > _SMALL_BATCH and _steps_grow_with_batch(job):
        shorter = in_words(once + (whole - once) * _SMALL_BATCH / run.batch)
        print(f"# shorter     with --batch {_SMALL_BATCH} about {shorter}, and noisier steps")
    for message in job.warnings:
        print(f"# warning     {message}")


def _steps_done(job: Job, place: Place) -> int:
    """The step from which a dry run's run would continue, once it is certain that it may; 0 for a new one."""
    if starts_afresh(place):
        return 0
    folder = RunFolder(_out(place))
    changes_on_resume(job.options, folder.config)
    check_inputs(job.notes, folder.log)
    return restore(job.state, folder, checkpoint_choice(place.resume) or "latest", job.watch)


def _steps_grow_with_batch(job: Job) -> bool:
    """Whether a smaller batch makes for shorter steps; those of the transport methods do not look at it."""
    return isinstance(job.options, TrainOptions) or find_method(job.options.method).family != "transport"


def execute(job: Job, folder: RunFolder, place: Place) -> dict[str, Any]:
    """Runs a job in its folder; returns what its verb prints.

    A run that was complete already takes no step; its last values are then those of its log.
    """
    began = time.perf_counter()
    resume = None if starts_afresh(place) else checkpoint_choice(place.resume)
    try:
        _, history = carry_out(job, folder, resume=resume)
    except Exception as error:
        if memory := memory_error(error, job.options, job.networks):
            raise memory from error
        raise
    logged = [event for event in read_log(folder.log) if event["event"] == "train"] if not history else []
    last: dict[str, Any] = next(reversed([*logged, *history]), {})
    return {
        "run": str(folder.path),
        "model": str(folder.model),
        "steps": job.state.step,
        **({} if history else {"complete_before": True}),
        "seconds": round(time.perf_counter() - began, 1),
        "last": {k: v for k, v in last.items() if isinstance(v, (int, float)) and k != "time"},
    }


def result_line(result: dict[str, Any], what: str) -> str:
    """Where the result of :func:`execute` is, in words."""
    was = "was complete already" if "complete_before" in result else ""
    return " ".join(filter(None, [what, "in", result["model"], was, "after", f"{result['steps']} steps"]))


def run_or_resume(prepare: Callable[[bool], Job], place: Place, folder: RunFolder | None = None) -> None:
    """One stage of a larger job: carried out, or taken up where it was left.

    Args:
        prepare: Builds the job; its argument is whether it starts at step 0.
        place: The stage's folder. With ``resume``, a stage that was not started is started.
        folder: The open run folder, when the caller holds it already.
    """
    if place.resume is not None and place.out is not None and not (place.out / "config.toml").exists():
        place = replace(place, resume=None)
    job = prepare(starts_afresh(place))
    if folder is not None:
        execute(job, folder, place)
        return
    with open_folder(place) as own:
        execute(job, own, place)
