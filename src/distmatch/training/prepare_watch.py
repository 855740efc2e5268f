"""From the options of a distillation to its watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE
from distmatch.data.batches import ALL, Batch, BatchOf
from distmatch.data.classes import Classes
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.interop import decoder_of
from distmatch.methods.context import Context
from distmatch.methods.method import Method
from distmatch.methods.settings import NetworkSettings, Settings
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.training.options import DistillOptions
from distmatch.training.watch import Lagging, Watch, Watched


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

    accumulate = settings.accumulate if isinstance(settings, NetworkSettings) else 1
    watched = Watched(
        teacher=teacher,
        guided=context.guided(),
        student=student,
        state=state,
        method=context.method,
        settings=settings,
        batches=taken,
        fake_score=distiller if isinstance(distiller, Lagging) else None,
        scaling=Scaling.known(about, (decoder_of(teacher) or teacher).shape),
        class_names=Classes.from_dict(about, teacher.num_classes).names,
        rows=context.ranks.rows(run.batch),
        steps=run.steps,
        seed=run.seed,
        chunk=max(1, run.batch // (accumulate * context.ranks.size)),
        device=context.device,
    )
    return Watch(options.watch, watched)
