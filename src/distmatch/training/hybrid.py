"""Sampling teacher and student in one, counting calls and time."""

from __future__ import annotations

import math
import time

from torch import nn

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.data.classes import checked_conditioning
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.solvers import find_solver
from distmatch.methods.hybrid import hybrid_sample
from distmatch.methods.hybrid_schedule import HybridSchedule, check_way, hybrid_schedule
from distmatch.methods.student import Student
from distmatch.training.devices import pick_device
from distmatch.training.known_data import check_same_classes
from distmatch.training.models import Model
from distmatch.training.sampling import HEUN, SampleResult, Sampling


def plan_hybrid(
    teacher: Model, student: Model, sampling: Sampling = HEUN, *, calls: int = 1, level: float | None = None
) -> HybridSchedule:
    """The steps of teacher and student; what does not fit is refused here, before anything is drawn.

    Args:
        teacher: What the user named as the teacher.
        student: What the user named as the student.
        sampling: Solver, grid and guidance of the teacher.
        calls: Steps of the student's way that the teacher takes.
        level: The level at which the student takes over, in place of ``calls``.

    Raises:
        UserError: The two are not teacher and student, or do not fit each other.
    """
    first, last = _pair(teacher, student)
    sampling.check(first)
    check_same_classes(first, last.denoiser, "teacher and student")
    before, after = teacher.scaling, student.scaling
    if before.kind == after.kind == "vector" and (before.center, before.half) != (after.center, after.half):
        raise UserError(
            "teacher and student were trained on data that were scaled differently",
            got=f"half ranges {list(before.half)[:4]} and {list(after.half)[:4]}",
            fix="use the teacher that the student was distilled from",
        )
    way = hybrid_schedule(sampling.around(first), last, sampling.levels(first), calls=calls, level=level)
    check_way(way, find_solver(sampling.solver), sampling.solver)
    return way


def draw_hybrid(
    teacher: Model,
    student: Model,
    n: int,
    conditioning: ConditioningLike,
    seed: int,
    sampling: Sampling = HEUN,
    *,
    calls: int = 1,
    level: float | None = None,
    batch: int = 1024,
    device: str = "auto",
    first: int = 0,
) -> SampleResult:
    """Samples that the teacher begins and the student ends; a guided call of the teacher counts as two.

    Args:
        teacher: The teacher.
        student: The student.
        n: Number of samples.
        conditioning: Their classes (n,), or None for a draw in the shares of the training data.
        seed: Seed of everything random.
        sampling: Solver, grid and guidance of the teacher.
        calls: Steps of the student's way that the teacher takes.
        level: The level at which the student takes over, in place of ``calls``.
        batch: Samples at a time.
        device: Where to compute.
        first: Number of the first sample.

    Raises:
        UserError: As :func:`plan_hybrid`.
    """
    way = plan_hybrid(teacher, student, sampling, calls=calls, level=level)
    before, last = _pair(teacher, student)
    where = pick_device(device)
    for module in (before, last, sampling.reference):
        if isinstance(module, nn.Module):
            module.to(where)
    asked = checked_conditioning(conditioning, n, last, seed, student.classes.counts, first=first)
    counter = CallCounter(sampling.around(before))
    with progress(n, desc="hybrid samples") as bar:
        began = time.perf_counter()
        x = hybrid_sample(
            counter,
            last,
            n,
            calls=calls,
            level=level,
            solver=sampling.solver,
            grid=sampling.levels(before),
            path=sampling.path_for(before),
            conditioning=asked,
            seed=seed,
            batch=batch,
            on_batch=bar.update,
            first=first,
        )
        seconds = time.perf_counter() - began
    of_teacher = round(counter.calls / math.ceil(n / batch))
    return SampleResult(x, asked, of_teacher + len(way.student_sigmas), 1000 * seconds / n)


def _pair(teacher: Model, student: Model) -> tuple[Denoiser, Student]:
    """The two as what they were named.

    Raises:
        UserError: One of them is the other.
    """
    if teacher.teacher is None:
        raise UserError(
            "--hybrid-teacher names a student", got=teacher.name, fix="name the teacher it was distilled from"
        )
    if student.student is None:
        raise UserError(
            "hybrid sampling needs a student to continue from the teacher",
            got=f"{student.name}, a teacher",
            fix="pass the student as MODEL, or omit --hybrid-teacher",
        )
    return teacher.teacher, student.student
