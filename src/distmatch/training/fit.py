"""Carrying out any training as the verbs do: progress, log, checkpoints, interruption, resuming."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distmatch.base.progress import quietly
from distmatch.nets.training_state import TrainingState
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.options import LoopOptions, OwnOptions
from distmatch.training.runfolder import create_together
from distmatch.training.runs import Job, carry_out
from distmatch.training.trackers import check_trackers


class Training(Protocol):
    """The interface of a training: of tokens, of :func:`distmatch.methods.build`, or your own."""

    def init(self, seed: int) -> Any:
        """The :class:`~distmatch.nets.training_state.TrainingState` before the first step."""
        ...

    def step(self, state: Any, batch: Any) -> dict[str, Tensor]:
        """One step, which changes the state and adds 1 to ``state.step``; returns what to log."""
        ...

    def result(self, state: Any) -> Any:
        """What the training ends with."""
        ...


def fit(
    training: Training,
    batches: Callable[[int], Any],
    *,
    steps: int,
    seed: int = 0,
    state: TrainingState | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save: Callable[[Path, Any], None] | None = None,
    quiet: bool = False,
    keep: int = LoopOptions.keep,
    checkpoint_every: int = LoopOptions.checkpoint_every,
    log_every: int = LoopOptions.log_every,
    track: str = "",
) -> Any:
    """Runs a training and returns its result.

    A run folder has ``log.jsonl``, ``checkpoints/`` and ``env.json``. A run that was interrupted, or ended at
    numbers that are not finite, continues with ``resume`` from its last checkpoint; to the bit, where
    ``batches`` depends on nothing but the step::

        model = dm.fit(ConditionalTraining(net, 800), batches, steps=800, out="runs/text", save=save_discrete)

    Args:
        training: What is trained, with ``init``, ``step`` and ``result``; the same as before with ``resume``.
        batches: The batch of a step number, from 0.
        steps: Training steps.
        seed: Given to ``training.init``.
        state: Where to begin instead: what ``init`` gave with more than a seed, such as ``draw``.
        out: A run folder to write; None keeps everything in memory.
        resume: Continue the run in ``out``.
        save: Writes the result to a folder, ``model/`` in ``out``; None writes none.
        quiet: Whether to hide the progress.
        keep: Checkpoints kept.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between log lines.
        track: Trackers that follow the run in ``out``, as ``--track`` names them (docs/trackers.md).

    Raises:
        UserError: ``out`` cannot be used, or holds a run that is not this one.
        DivergedError: A logged value or a weight is not finite.
    """
    run = LoopOptions(
        steps=steps,
        seed=seed,
        keep=keep,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        track=track,
    )
    check_trackers(track)
    with quietly(quiet), nullcontext() if out is None else create_together(out, resume=resume) as folder:
        begun: TrainingState = training.init(seed) if state is None else state
        job = Job(
            verb="fit",
            options=OwnOptions(run=run),
            state=begun,
            step=training.step,
            batches=batches,
            networks=begun.modules(),
            result=lambda: training.result(begun),
            save=save,
        )
        saved = folder is not None and resume and bool(list_checkpoints(folder.checkpoints))
        model, _ = carry_out(job, folder, resume="latest" if saved else None)
    return model
