"""The switch from a teacher to a student: who goes which part of the way, and what cannot be followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.solvers import Solver
from distmatch.diffusion.solvers.grids import checked_levels
from distmatch.interop import decoder_of
from distmatch.methods.student import Student
from distmatch.methods.table import METHODS

MOST_SIGNAL = 1.0
"""Largest sigma_data / sigma at which a first call that was trained on pure noise may be given noised data;
docs/hybrid.md has what happens beyond."""
_SAME = 1e-6  # relative difference below which two levels are one


@dataclass(frozen=True)
class HybridSchedule:
    """Who goes which part of the way.

    Attributes:
        teacher_levels: Noise levels of the teacher's solve, from its ``sigma_max`` down to where it stops;
            () when the student goes all the way.
        student_sigmas: Levels of the student's calls; () when the teacher goes all the way.
    """

    teacher_levels: tuple[float, ...]
    student_sigmas: tuple[float, ...]


def stations(teacher: Denoiser, student: Student) -> tuple[float, ...]:
    """Where the teacher can stop: the levels of the student below the teacher's start, and 0.

    Args:
        teacher: The teacher.
        student: The student.
    """
    below = tuple(level for level in student.sigmas if level < teacher.sigma_max * (1 - _SAME))
    return (*below, 0.0)


def hybrid_schedule(
    teacher: Denoiser,
    student: Student,
    grid: Tensor | Sequence[float],
    *,
    calls: int = 1,
    level: float | None = None,
) -> HybridSchedule:
    """Divides the way between teacher and student, and refuses what the student cannot follow.

    Args:
        teacher: The teacher, guided or not.
        student: The student.
        grid: The levels of the teacher's own sampling, decreasing to 0; cut where the student takes over.
        calls: How many steps of the student's way the teacher takes: 0 is the student alone, 1 stops at the
            first of :func:`stations`, as many as there are is the teacher alone.
        level: The level to stop at, in place of ``calls``. A student of the consistency family can take over
            anywhere; any other only at its own levels.

    Raises:
        UserError: Models that do not share shape, classes or frame; calls or a level beyond those of the
            student; a level at which the student was trained on something else than noised data.
    """
    _check_pair(teacher, student)
    where = stations(teacher, student)
    if level is None:
        if not 0 <= calls <= len(where):
            named = ", ".join(f"{k} down to {v:g}" for k, v in enumerate(where, 1))
            raise UserError(
                "the teacher cannot take that many of this student's steps",
                got=f"{calls}",
                expected=f"0 (the student alone) to {len(where)} (the teacher alone): {named}",
            )
        if calls == 0:
            return HybridSchedule((), student.sigmas)
        stop = where[calls - 1]
    else:
        stop = _checked_level(level, student, where)
    if stop == 0:
        return HybridSchedule(checked_levels(grid, stochastic=True), ())
    _check_first(stop, teacher, student)
    full = checked_levels(grid, stochastic=True)
    above = tuple(v for v in full if v > stop * (1 + _SAME))
    if not above:
        raise UserError(
            "the teacher's grid has no noise level above the switch to the student",
            got=f"it starts at {full[0]:g}, the student at {stop:g}",
        )
    rest = tuple(v for v in student.sigmas if v < stop * (1 - _SAME))
    return HybridSchedule((*above, stop), (stop, *rest))


def _check_pair(teacher: Denoiser, student: Student) -> None:
    """Refuses models that do not speak of the same samples."""
    require_score(teacher, "hybrid sampling, which starts both models from the same Gaussian noise,")
    for what, theirs, ours in (
        ("shape", tuple(teacher.shape), tuple(student.shape)),
        ("number of classes", teacher.num_classes, student.num_classes),
        ("kind of sample", _kind(teacher), _kind(student.denoiser)),
    ):
        if theirs != ours:
            raise UserError(
                f"the student cannot take over from a teacher with another {what}",
                got=f"{theirs} of the teacher, {ours} of the student",
                fix="use the teacher that the student was distilled from",
            )


def _kind(denoiser: Denoiser) -> str:
    return "samples" if decoder_of(denoiser) is None else "latents"


def _checked_level(level: float, student: Student, where: tuple[float, ...]) -> float:
    """The level to stop at: one of the student's, or any that a consistency function covers."""
    for own in where:
        if abs(level - own) <= 1e-4 * own or level == own:  # levels are given as they are printed
            return own
    first, low = student.sigmas[0], student.denoiser.sigma_min
    if _follows_any_level(student) and low <= level <= first:
        return level
    listed = ", ".join(f"{v:g}" for v in where)
    if _follows_any_level(student):
        listed = f"{low:g} to {first:g}, or 0"
    raise UserError(
        "the student was not trained to take over at this noise level",
        got=f"{level:g}",
        expected=listed,
        fix=f"choose one of these, or distil with --student-sigma {level / student.denoiser.sigma_data:.4g}",
    )


def _follows_any_level(student: Student) -> bool:
    """Whether it was trained to jump to the end from noised data of every level."""
    method = METHODS.get(str(student.info.get("method", "")))
    jumps = getattr(student.denoiser, "jumps", False)
    return jumps or (method is not None and method.family == "consistency")


def _check_first(stop: float, teacher: Denoiser, student: Student) -> None:
    """Refuses noised data for a first call that was trained on pure noise, where the two differ much."""
    if stop < student.sigmas[0] * (1 - _SAME) or not student.from_noise or _follows_any_level(student):
        return  # later calls are trained on noised samples, consistency functions on noised data
    signal = teacher.sigma_data / stop
    if signal > MOST_SIGNAL:
        raise UserError(
            "the student cannot take over: its first step was trained on pure noise, which differs from "
            "noised data at this noise level",
            got=f"sigma {stop:g} at a sigma_data of {teacher.sigma_data:.3g}",
            expected=f"sigma_data / sigma at most {MOST_SIGNAL:g}",
            fix=f"distil with --student-sigma {1 / MOST_SIGNAL:.3g} or more, or with a consistency method",
        )


def check_way(way: HybridSchedule, chosen: Solver, asked: str | Solver) -> None:
    """Refuses a solver that needs more steps than the teacher's part has.

    Raises:
        UserError: It does.
    """
    steps = len(way.teacher_levels) - 1
    if 0 < steps < chosen.least_steps:
        raise UserError(
            f"the solver {asked} needs at least {chosen.least_steps} steps",
            got=f"{steps} of the teacher before the student takes over at {way.teacher_levels[-1]:g}",
            fix="raise --steps, or use --solver heun",
        )
