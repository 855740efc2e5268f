"""From the options of a training to its watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE
from distmatch.data import Dataset
from distmatch.data.batches import ALL, Batch, BatchOf
from distmatch.data.classes import Classes
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.solvers import sample_teacher
from distmatch.interop import decoder_of
from distmatch.methods.context import Context
from distmatch.methods.method import Method
from distmatch.methods.settings import NetworkSettings, Settings
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.nets.training_state import TrainingState
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.sampling import Sampling
from distmatch.training.teacher import TeacherState
from distmatch.training.watch import Lagging, Watch, Watched
from distmatch.training.watch_data import AgainstData, Sampler, require_data, samples_against
from distmatch.training.watch_options import WatchOptions

QUICK = Sampling(steps=8)
"""How a teacher is sampled during its training: 15 network calls."""


def check_watchable(options: DistillOptions, method: Method) -> None:
    """Refuses a watch of a method that trains no network, whose samples are stored ones of the teacher.

    Raises:
        UserError: One is asked for.
    """
    if options.watch.watch_every and method.family == "transport":
        raise UserError(
            "there is nothing to watch in a method that trains no network",
            got=f"--watch-every {options.watch.watch_every} with --method {method.name}",
            fix="omit --watch-every",
        )


def watch_of(
    options: DistillOptions,
    context: Context[Settings],
    distiller: Any,
    *,
    student: Callable[[], Student],
    state: DistillState,
    batches: BatchOf,
    about: Mapping[str, Any],
    data: Dataset | None,
) -> Watch | None:
    """The watch of a distillation; None where its options ask for none.

    Args:
        options: Those of the run.
        context: Teacher, method and settings.
        distiller: The method.
        student: Makes the student that the run would end with now.
        state: The state of the training.
        batches: The batch of a step, of all ranks together.
        about: What the student keeps of its data.
        data: The real data, before any encoding; None where there are none.

    Raises:
        UserError: The best checkpoint is to be chosen by real data that are not there.
    """
    if not options.watch.watch_every:
        return None
    teacher, settings, run = context.teacher, context.settings, options.run

    def taken(step: int, rows: slice = ALL) -> Batch:
        alone = replace(state, step=step, ranks=ALONE)
        whole = context.taken(alone, batches(step))
        given = whole.pool

        def conditioning(numbers: Tensor) -> Conditioning:
            found = given.conditioning(numbers) if given is not None else UNCONDITIONAL
            asked = Batch(torch.zeros(len(numbers), *teacher.shape), found).on(context.device)
            return context.taken(alone, asked).conditioning

        pool = None if given is None else replace(given, conditioning=conditioning)
        return Batch(whole.x[rows], whole.conditioning.index(rows), texts=whole.texts[rows], pool=pool)

    def sampler() -> Sampler:
        made = student().eval()

        def draw(n: int, conditioning: Conditioning, seed: int, first: int = 0) -> Tensor:
            how: dict[str, Any] = {"batch": chunk, "decode": False, "first": first}
            return made.sample(n, seed=seed, conditioning=conditioning or None, **how)

        return draw

    accumulate = settings.accumulate if isinstance(settings, NetworkSettings) else 1
    chunk = max(1, run.batch // (accumulate * context.ranks.size))
    scaling = Scaling.known(about, (decoder_of(teacher) or teacher).shape)
    watched = Watched(
        what="student",
        model=teacher,
        sampler=sampler,
        guided=context.guided(),
        state=state,
        method=context.method,
        settings=settings,
        batches=taken,
        fake_score=distiller if isinstance(distiller, Lagging) else None,
        against=_against(
            options.watch, data, teacher, taken, scaling, state, run.seed, chunk, context.device
        ),
        scaling=scaling,
        class_names=Classes.from_dict(about, teacher.num_classes).names,
        rows=context.ranks.rows(run.batch),
        steps=run.steps,
        seed=run.seed,
        chunk=chunk,
        device=context.device,
    )
    return Watch(options.watch, watched)


def watch_of_teacher(
    options: TrainOptions, state: TeacherState, data: Dataset, batches: BatchOf, device: torch.device
) -> Watch | None:
    """The watch of a teacher's training; None where its options ask for none.

    Args:
        options: Those of the run.
        state: The state of the training.
        data: The clean data.
        batches: The batch of a step, of all ranks together.
        device: Where the network is.

    Raises:
        UserError: The best checkpoint is to be chosen by what a teacher does not have.
    """
    if not options.watch.watch_every:
        return None
    if options.watch.keep_best not in ("none", "fd"):
        raise UserError(
            "a teacher in training has no teacher to be compared with",
            got=f"--keep-best {options.watch.keep_best}",
            expected="--keep-best fd, which compares samples with the data",
        )
    run, model, ranks = options.run, state.denoiser, state.ranks
    chunk = max(1, run.batch // ranks.size)

    def taken(step: int, rows: slice = ALL) -> Batch:
        return batches(step, rows).taken_by(model)

    def sampler() -> Sampler:
        averaged: Any = state.ema.module

        def draw(n: int, conditioning: Conditioning, seed: int, first: int = 0) -> Tensor:
            how: dict[str, Any] = {"batch": chunk, "device": device, "first": first}
            grid = QUICK.levels(averaged)
            return sample_teacher(averaged, n, grid=grid, conditioning=conditioning or None, seed=seed, **how)

        return draw

    against = _against(options.watch, data, model, taken, data.scaling, state, run.seed, chunk, device)
    watched = Watched(
        what="teacher",
        model=model,
        sampler=sampler,
        guided=None,
        state=state,
        method=None,
        settings=options.teacher,
        batches=taken,
        fake_score=None,
        against=against,
        said={"solver": QUICK.solver, "solver_steps": QUICK.steps},
        scaling=data.scaling,
        class_names=data.class_names,
        rows=ranks.rows(run.batch),
        steps=run.steps,
        seed=run.seed,
        chunk=chunk,
        device=device,
    )
    return Watch(options.watch, watched)


def _against(
    options: WatchOptions,
    data: Dataset | None,
    model: Denoiser,
    batches: BatchOf,
    scaling: Scaling,
    state: TrainingState,
    seed: int,
    chunk: int,
    device: torch.device,
) -> AgainstData | None:
    """What is measured against real data; None where there are none that fit."""
    n = samples_against(data, model, options.watch_samples)
    against = None
    if data is not None and n:
        against = AgainstData(data, model, n, batches, scaling, state.ranks, seed, chunk, device)
    require_data(options.keep_best, against)
    return against
