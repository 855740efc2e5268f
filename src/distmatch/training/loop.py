"""The one training loop: steps, log lines, checkpoints, interruption, and stopping at non-finite values."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import DivergedError, Terminated, UserError
from distmatch.base.progress import progress
from distmatch.base.ranks import ALONE, Ranks
from distmatch.base.stack import caller_level
from distmatch.nets.shared import local
from distmatch.nets.training_state import TrainingState
from distmatch.training.checkpoint import list_checkpoints, load_checkpoint
from distmatch.training.log import EventLog
from distmatch.training.options import LoopOptions
from distmatch.training.parallel import layout_of
from distmatch.training.runfolder import RunFolder
from distmatch.training.saving import Saver
from distmatch.training.watch import Watch


@dataclass
class Averages:
    """Sums of what the steps report, kept as tensors so that a step never waits for the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, info: dict[str, Tensor]) -> None:
        """Takes in one step. Values with several elements are not summed: the last one counts."""
        for key, value in info.items():
            known = key in self.sums and value.ndim == 0
            self.sums[key] = self.sums[key] + value if known else value
            self.counts[key] = self.counts.get(key, 0) + 1 if value.ndim == 0 else 1

    def means(self, step: int, last: Callable[[], str], ranks: Ranks = ALONE) -> dict[str, Any]:
        """Means since the last :meth:`clear`, over steps and processes, as numbers and lists.

        Raises:
            DivergedError: One of them is not finite.
        """
        means = {key: total / self.counts[key] for key, total in self.sums.items()}
        if means and ranks.size > 1:
            flat = ranks.mean(torch.cat([value.double().reshape(-1) for value in means.values()]))
            parts = flat.split([value.numel() for value in means.values()])
            means = {k: part.reshape(v.shape) for (k, v), part in zip(means.items(), parts, strict=True)}
        values = {key: value.tolist() for key, value in means.items()}
        bad = [key for key, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            raise DivergedError(
                f"training went wrong: {', '.join(bad)} became {values[bad[0]]} by step {step}",
                expected="finite numbers",
                fix=f"lower the learning rate and continue with --resume; {last()}",
            )
        return values

    def clear(self) -> None:
        """Starts a new interval."""
        self.sums.clear()
        self.counts.clear()


def restore(state: TrainingState, folder: RunFolder, which: str | int, watch: Watch | None = None) -> int:
    """Puts a checkpoint back into a state.

    Args:
        state: A fresh state of the same options.
        folder: The run folder.
        which: ``latest``, a step, or the folder of a checkpoint.
        watch: Gets its record back, too.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it is of another run.
    """
    step, tree = load_checkpoint(folder.checkpoints, which, layout_of(state))
    try:
        state.load_state_dict(tree)
        if watch is not None:
            watch.load_state_dict(tree.get("watch", {}), list_checkpoints(folder.checkpoints))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint of step {step} belongs to a run of another kind",
            got=f"{type(error).__name__}: {error}",
            expected="a checkpoint written by the same verb with the same options",
            fix="resume with the options that wrote it: see the config.toml of its run",
        ) from error
    return int(step)


def _not_finite(tree: Any, ranks: Ranks) -> str | None:
    """Path of the first tensor in a tree that holds NaN or infinity on any of the ranks, or None."""

    def first(node: Any, path: str) -> str | None:
        if isinstance(node, Tensor):
            return None if bool(torch.isfinite(local(node)).all()) else path
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return next((bad for key, value in items if (bad := first(value, f"{path}/{key}".lstrip("/")))), None)

    found = first(tree, "")
    return (found or "a weight") if ranks.largest(int(found is not None)) else None


@contextmanager
def deferred_interrupt(ranks: Ranks = ALONE) -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Holds back the first Ctrl-C or SIGTERM, so that a step is never cut in half; a second one interrupts.

    What it gives is called between steps and returns the exception to raise, or None: the same on all ranks,
    whichever of them got the signal.
    """
    asked: type[KeyboardInterrupt] | None = None
    kinds = (None, KeyboardInterrupt, Terminated)

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        again, asked = asked, Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if again:
            raise asked

    def pending() -> type[KeyboardInterrupt] | None:
        return kinds[ranks.largest(kinds.index(asked))]

    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_loop(
    step: Callable[[Any, Any], dict[str, Tensor]],
    state: TrainingState,
    batches: Callable[[int], Any],
    options: LoopOptions,
    *,
    folder: RunFolder | None = None,
    desc: str = "train",
    show: tuple[str, ...] = ("loss",),
    advise: Callable[[dict[str, Any]], list[str]] = lambda means: [],
    watch: Watch | None = None,
    follow: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs ``step`` until ``state.step`` reaches ``options.steps``.

    Args:
        step: One training step; changes the state, returns tensors to log.
        state: The checkpoint to continue from.
        batches: Batch of a step number.
        options: Steps, intervals, checkpoints kept.
        folder: Where log and checkpoints go; None keeps nothing.
        desc: Title of the progress bar.
        show: Logged values that the progress bar shows.
        advise: Checks the logged means and returns warnings; each message is given once.
        watch: Measures the model in training, once it has begun.
        follow: Gets the events that the log gets.

    Returns:
        The logged events, ``{"step": ..., **means}``.

    Raises:
        DivergedError: A logged value is not finite; the last checkpoint is good.
        KeyboardInterrupt: Ctrl-C, or SIGTERM as :class:`~distmatch.base.errors.Terminated`; a checkpoint of
            the last complete step was written first.
    """
    history: list[dict[str, Any]] = []
    averages = Averages()
    ranks = state.ranks
    log = EventLog(folder.log, follow) if folder and ranks.main else None
    saver = Saver(folder.checkpoints, ranks, options.keep) if folder else None
    saved, writing = state.step, None
    warned: set[str] = set()
    shown: dict[str, Any] = {}

    def checkpoint() -> None:
        nonlocal writing
        if saver is None or state.step in (saved, writing):
            return
        wait()
        averages.means(state.step, last_good, ranks)
        tree = state.state_dict()
        # A finite loss does not vouch for the weights: it was taken before the step that changed them.
        if bad := _not_finite(tree, ranks):
            raise DivergedError(
                f"training went wrong: {bad} is not finite after step {state.step}",
                expected="finite numbers",
                fix=f"lower the learning rate and continue with --resume; {last_good()}",
            )
        best = None if watch is None else watch.best_step
        tree |= {} if watch is None else {"watch": watch.state_dict()}
        saver.save(state.step, tree, best)
        writing = state.step
        if log is not None:
            log.write("checkpoint", state.step)

    def wait() -> None:
        """For the checkpoint that is being written."""
        nonlocal saved, writing
        if saver is None or writing is None:
            return
        saver.finish()
        saved, writing = writing, None

    def warn(message: str) -> None:
        if message not in warned and ranks.main:
            warned.add(message)
            warnings.warn(message, stacklevel=caller_level())
            if log:
                log.write("warning", state.step, message=message)

    def look() -> dict[str, Any]:
        """Measures the model; returns what the progress bar shows."""
        if watch is None or not watch.due(state.step):
            return {}
        values, messages = watch.look(last_good())
        if log:
            log.write("watch", state.step, **values)
        for message in messages:
            warn(message)
        if ranks.from_main(watch.best_step == state.step):
            checkpoint()
        return watch.shown(values)

    def last_good() -> str:
        wait()
        if folder is None:
            return "no run folder was given, so nothing was saved"
        return f"the last good checkpoint is step {saved}" if saved else "no checkpoint was written yet"

    with (
        log or nullcontext(),
        saver or nullcontext(),
        deferred_interrupt(ranks) as interrupted,
        progress(options.steps, initial=state.step, desc=desc) as bar,
    ):
        seen = look() if state.step == 0 else {}
        while state.step < options.steps:
            info = step(state, batches(state.step))
            averages.add(info)
            if watch is not None:
                watch.observe(info)
            done = state.step
            if done % options.log_every == 0 or done == options.steps:
                means = averages.means(done, last_good, ranks)
                history.append({"step": done, **means})
                if log:
                    log.write("train", done, **means)
                for message in advise(means):
                    warn(message)
                averages.clear()
                shown = {key: means[key] for key in show if key in means}
            seen = look() or seen
            if done % options.checkpoint_every == 0 or done == options.steps:
                checkpoint()
            bar.update(1, **shown, **seen)
            if stop := interrupted():
                checkpoint()
                wait()
                raise stop
        wait()
    return history
