"""Choices for the machine at hand: what `--auto` measures, and what it decides by it.

Each choice is an ordinary option of the run. All but the precision leave its numbers as they are, except for
rounding: the global batch and everything that is drawn stay the same. A choice is made by a few steps of a
run that is thrown away; memory that runs out is an answer.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from distmatch.base.errors import UserError, cause
from distmatch.base.memory import binary_size, free_memory, out_of_memory
from distmatch.base.progress import in_words
from distmatch.base.ranks import Ranks, alone, joined, lost_process
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.settings import NetworkSettings
from distmatch.training.comparison.cost import PeakMemory, step_times
from distmatch.training.devices import pick_device
from distmatch.training.memory import predicted
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.parallel import SHARED
from distmatch.training.processes import start_together
from distmatch.training.runs import Job

O = TypeVar("O", TrainOptions, DistillOptions)  # noqa: E741

CHOICES = ("batch", "accumulate", "checkpointing", "precision", "compile")
"""The options that may be chosen."""
_FASTER = 0.9  # share of the time from which on something else is chosen: less may be chance
_FULL = 0.9  # share of the free memory that a run may take
_COMPILE_FROM = 300.0  # seconds of a run, below which compiling it is not tried
_BATCHES = (16, 4096)
_REPEATS = 3


@dataclass(frozen=True)
class Choice:
    """One option, its value, and the measurements that decided it."""

    option: str
    value: Any
    why: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.option} {self.value}: {self.why}"


@dataclass(frozen=True)
class _Trial:
    """What a few steps took on the slowest process, or why they cannot be made."""

    seconds: float = 0.0
    once: float = 0.0
    memory: int | None = None
    failed: str = ""

    def __str__(self) -> str:
        if self.failed:
            return self.failed
        memory = f", {binary_size(self.memory)} at most" if self.memory is not None else ""
        return f"{1000 * self.seconds:.1f} ms a step{memory}"


def choose(
    options: O, build: Callable[[O], Job], *, fixed: Collection[str] = (), batch: bool = False
) -> tuple[O, list[Choice]]:
    """Options with the choices for this machine, from short probes; nothing is written.

    All processes of a launch choose the same.

    Args:
        options: The options.
        build: Prepares a run that is thrown away.
        fixed: Names of :data:`CHOICES` that keep their value.
        batch: Whether the batch is chosen too, which changes what is trained.

    Returns:
        The options, and a list of the choices.

    Raises:
        UserError: The run cannot be prepared, or does not fit into memory whatever is chosen.
    """
    if batch and "batch" in fixed:
        raise UserError("the batch is given, and is to be chosen", fix="omit --batch or --auto-batch")
    start_together("train" if isinstance(options, TrainOptions) else "distill", options)
    tuner = _Tuner(build, joined(), pick_device(options.run.device))
    try:
        return _chosen(tuner, options, fixed, batch)
    finally:
        if tuner.compiled:
            torch.compiler.reset()
        gc.collect()
        PeakMemory(tuner.device)  # the peak that the run logs is its own


def note(job: Job, choices: list[Choice]) -> None:
    """Adds the choices to what a run says as it starts, and to its log."""
    if choices:
        job.notes["auto"] = [asdict(choice) for choice in choices]
        job.remarks = [*job.remarks, *(f"auto: {choice.line}" for choice in choices)]


def _chosen(tuner: _Tuner, options: O, fixed: Collection[str], batch: bool) -> tuple[O, list[Choice]]:
    choices: list[Choice] = []
    parts = isinstance(options, DistillOptions) and isinstance(options.settings, NetworkSettings)
    free = {name for name in CHOICES if name not in fixed and (parts or name in ("precision", "compile"))}
    if options.run.compile_mode != "default":  # a mode of what must then stay as it is
        free -= {"compile"}
    plain = {"accumulate": 1, "checkpointing": False, "compile": False}
    options = _with(options, **{name: value for name, value in plain.items() if name in free})
    if batch:
        options, trial, why = _largest_batch(tuner, options)
        choices.append(Choice("batch", options.run.batch, why))
    else:
        trial = tuner.measure(options, first=True)
    if free & {"accumulate", "checkpointing"} or trial.failed:
        options, trial, found = _fitted(tuner, options, trial, free)
        choices += found
    else:
        choices.append(Choice("batch", options.run.batch, f"fits: {trial}{tuner.room}"))
    if "precision" in free and options.run.precision == "fp32":
        other = _with(options, precision="bf16")
        short = tuner.measure(other)
        why = f"{trial} in fp32, in bf16 {short}"
        if not short.failed and short.seconds < _FASTER * trial.seconds:
            options, trial = other, short
        choices.append(Choice("precision", options.run.precision, why))
    if "compile" in free and not (options.run.parallel in SHARED and tuner.ranks.size > 1):
        options, why = _compiled(tuner, options, trial)
        choices.append(Choice("compile", options.run.compile, why))
    return options, choices


def _fitted(tuner: _Tuner, options: O, whole: _Trial, free: set[str]) -> tuple[O, _Trial, list[Choice]]:
    """The options with the fewest parts of a batch that fit, with checkpointing where that is faster."""
    tried = [(options, whole)]
    rows = options.run.batch // tuner.ranks.size
    for checkpointing in (False, True) if whole.failed else ():
        for parts in (2**k for k in range(rows.bit_length())):
            wanted = {"accumulate": parts, "checkpointing": checkpointing}
            other = _with(options, **{name: value for name, value in wanted.items() if name in free})
            if any(other == seen for seen, _ in tried):
                continue
            tried.append((other, tuner.measure(other)))
            if not tried[-1][1].failed:
                break
    fitting = [(other, trial) for other, trial in tried if not trial.failed]
    if not fitting:
        raise UserError(
            "this does not fit into memory",
            got=whole.failed,
            fix="lower the size of the network, or --batch"
            + (", or omit --accumulate" if hasattr(options, "settings") and "accumulate" not in free else ""),
        )
    best, trial = min(fitting, key=lambda pair: pair[1].seconds)
    others = "".join(f"; {_parts_of(other)} {seen}" for other, seen in tried if other != best)
    why = f"{trial}{tuner.room}{others}"
    chosen: Any = best
    reasons = {"accumulate": why, "checkpointing": "as measured for --accumulate"}
    if not whole.failed:
        reasons["checkpointing"] = "not needed, as the activations fit"
    found = [Choice(n, getattr(chosen.settings, n), why) for n, why in reasons.items() if n in free]
    return best, trial, found


def _parts_of(options: Any) -> str:
    settings = options.settings
    return f"{settings.accumulate}{' with checkpointing' if settings.checkpointing else ''}:"


def _largest_batch(tuner: _Tuner, options: O) -> tuple[O, _Trial, str]:
    """The batch from which on twice as many samples a step are less than a tenth more a second."""
    tried: list[tuple[O, _Trial]] = []
    number, most = _BATCHES
    number += -number % tuner.ranks.size
    while number <= most:
        other = _with(options, batch=number)
        trial = tuner.measure(other, first=not tried)
        if trial.failed and tried:
            break
        if tried and trial.seconds > 2 * _FASTER * tried[-1][1].seconds:
            break
        tried.append((other, trial))
        if trial.failed:
            break
        number *= 2
    best, trial = tried[-1]
    rates = ", ".join(f"{o.run.batch / t.seconds:.0f} with {o.run.batch}" for o, t in tried if t.seconds)
    return best, trial, f"samples a second: {rates}"


def _compiled(tuner: _Tuner, options: O, trial: _Trial) -> tuple[O, str]:
    """The options compiled, where that makes the run as a whole shorter."""
    steps = options.run.steps
    plain = trial.once + steps * trial.seconds
    if plain < _COMPILE_FROM:
        return options, f"not tried, as the run takes about {in_words(plain)}"
    other = _with(options, compile=True)
    found = tuner.measure(other)
    if found.failed:
        return options, found.failed
    whole = found.once + steps * found.seconds
    why = f"{trial}, compiled {found}; the run about {in_words(plain)}, compiled {in_words(whole)}"
    return (other if whole < _FASTER * plain else options), why


def _with(options: O, **changes: Any) -> O:
    """Options with other values for some of :data:`CHOICES`."""
    run = {name: value for name, value in changes.items() if hasattr(options.run, name)}
    own = {name: value for name, value in changes.items() if name not in run}
    options = replace(options, run=replace(options.run, **run))
    if own and isinstance(options, DistillOptions):
        options = replace(options, settings=replace(options.settings, **own))
    return options


class _Tuner:
    """Measures candidates, each on a run of its own.

    Processes that hold whole networks measure their rows alone, all at once: a process that runs out of
    memory does not leave others waiting, and what they send each other is the same for every candidate.
    Those that share out weights measure together.
    """

    def __init__(self, build: Callable[[Any], Job], ranks: Ranks, device: torch.device) -> None:
        self.build, self.ranks, self.device = build, ranks, device
        self.compiled = False
        self.available = self._available()

    @property
    def room(self) -> str:
        """The available memory, as a part of a sentence."""
        return f" of {binary_size(self.available)} available" if self.available is not None else ""

    def measure(self, options: Any, *, first: bool = False) -> _Trial:
        """The slowest process's figures.

        Args:
            options: Those of the candidate.
            first: Whether only memory may be the reason that it fails: other errors are those of the run.
        """
        self.ranks.wait()
        self.compiled |= options.run.compile
        try:
            trial = self._steps(options)
        except (UserError, RuntimeError, MemoryError) as error:
            memory = out_of_memory(error)
            if lost_process(error) or (first and memory is None):
                raise
            trial = _Trial(failed="does not fit" if memory else f"cannot be used here ({cause(error)})")
        gc.collect()
        if self.ranks.size == 1:
            return trial
        if self.ranks.largest(int(bool(trial.failed))):
            return _Trial(failed=trial.failed or "does not work in another process")
        seconds, once, memory_used = (
            self.ranks.largest(int(1e6 * x)) for x in (trial.seconds, trial.once, (trial.memory or 0) / 1e6)
        )
        return _Trial(seconds / 1e6, once / 1e6, memory_used if trial.memory is not None else None)

    def _steps(self, options: Any) -> _Trial:
        apart = self.ranks.size > 1 and options.run.parallel not in SHARED
        if apart:
            options = _with(options, batch=self.ranks.share(options.run.batch))
        settings = getattr(options, "settings", None)
        if isinstance(settings, DMDSettings):  # pairs are made once, and their number is no part of a step
            few = replace(settings, pairs=min(settings.pairs, options.run.batch), pair_steps=1)
            options = replace(options, settings=few)
        peak = PeakMemory(self.device)
        with alone() if apart else nullcontext(), _unnoticed(self.device):
            job = self.build(options)
            ahead = predicted(options, job.networks)
            if ahead is not None and self.available is not None and ahead.peak > _FULL * self.available:
                return _Trial(failed=f"would take {binary_size(ahead.peak)}{self.room}")
            job.share_out()
            once, seconds = step_times(job, self.device, repeats=_REPEATS)
        return _Trial(seconds, once, peak.bytes())

    def _available(self) -> int | None:
        """The least free memory of a process, in bytes; None where one does not know it."""
        if self.device.type == "cuda":
            free: int | None = torch.cuda.mem_get_info(self.device)[0]
        elif self.device.type == "cpu" and (found := free_memory()) is not None:
            free = found // int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.size))
        else:
            free = None
        return -self.ranks.largest(-(free or 0)) or None  # all take part, also one that does not know its own


@contextmanager
def _unnoticed(device: torch.device) -> Iterator[None]:
    """Leaves the global random stream as it was, and warnings to the run itself."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
