"""Hybrid sampling: the teacher goes the first part of the way, the student the rest (arXiv 2503.10637).

A student of few calls decides the layout of a sample in its first one. Where the teacher makes that part, the
choice is the teacher's, and so is the variety. Nothing is trained; the state at the switch is y = x0 + sigma
eps at a sigma of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmatch.base.seeds import initial_noise
from distmatch.data.classes import checked_conditioning
from distmatch.diffusion.conditioning import Conditioning, ConditioningLike
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import NoisePath
from distmatch.diffusion.solvers import Solver, find_solver, solve
from distmatch.diffusion.solvers import grid as make_grid
from distmatch.interop import decode_samples
from distmatch.methods.hybrid_schedule import HybridSchedule, check_way, hybrid_schedule
from distmatch.methods.student import Student, device_of


@torch.no_grad()
def hybrid_sample(
    teacher: Denoiser,
    student: Student,
    n: int,
    *,
    calls: int = 1,
    level: float | None = None,
    steps: int = 18,
    solver: str | Solver = "heun",
    grid: Tensor | Sequence[float] | None = None,
    path: NoisePath | str | None = None,
    conditioning: ConditioningLike = None,
    seed: int = 0,
    batch: int = 1024,
    decode: bool = True,
    on_batch: Callable[[int], None] | None = None,
    first: int = 0,
) -> Tensor:
    """Draws samples that the teacher begins and the student ends.

    Latents, labels and all noise of sample i are those that the student alone and the teacher alone draw for
    it: with no call of the teacher the samples are the student's, with all of them the teacher's, to the bit.

    Args:
        teacher: The teacher; guided, if it shall be.
        student: The student. Its device is where everything is computed.
        n: Number of samples.
        calls: Steps of the student's way that the teacher takes, see :func:`hybrid_schedule`.
        level: The noise level at which the student takes over, in place of ``calls``.
        steps: Steps of the teacher's grid down to 0; it takes those above the level of the handover.
        solver: How the teacher is sampled.
        grid: Decreasing levels in place of the default ones.
        path: As for :func:`~distmatch.diffusion.solvers.solve`.
        conditioning: Classes (n,) int64, or a conditioning. Without it classes are drawn as the student draws
            them.
        seed: Seed of everything random.
        batch: Samples at a time.
        decode: Whether latents become images.
        on_batch: Called with the number of samples after each batch.
        first: Number of the first sample: a part of a larger set is drawn alone.

    Returns:
        (n, *shape) float32 on the CPU, in model space.

    Raises:
        UserError: What :func:`hybrid_schedule` refuses, and labels or a solver that do not fit.
    """
    levels = make_grid("karras", steps, teacher.sigma_min, teacher.sigma_max) if grid is None else grid
    way = hybrid_schedule(teacher, student, levels, calls=calls, level=level)
    chosen = find_solver(solver)
    check_way(way, chosen, solver)
    asked = checked_conditioning(conditioning, n, student, seed, student.classes.counts, first=first)
    device = device_of(student)
    if not way.teacher_levels:
        own: dict[str, Any] = {"decode": decode, "on_batch": on_batch, "first": first}
        return student.sample(n, seed=seed, conditioning=asked, batch=batch, **own)
    z = initial_noise(n, student.shape, seed, first=first)
    later = student_noise(student, way, n, seed, first)
    follower = follower_of(student, way)
    training = student.training
    student.eval()
    out = []
    for begin in range(0, n, batch):
        part = slice(begin, min(begin + batch, n))
        c = asked.index(part).to(device)
        noise = None
        if chosen.stochastic:
            noise = SampleNoise(
                seed, first + torch.arange(part.start, part.stop), tuple(student.shape), device
            )
        start = z[part].to(device) * way.teacher_levels[0]
        y = solve(teacher, start, way.teacher_levels, chosen, conditioning=c, noise=noise, path=path).y
        if way.student_sigmas:
            y = student_calls(follower, y, [e[part].to(device) for e in later], c)[-1]
        out.append(y.float().cpu())
        if on_batch is not None:
            on_batch(len(y))
    student.train(training)
    x = torch.cat(out) if out else torch.empty(0, *student.shape)
    return decode_samples(student.denoiser, x, device=device) if decode else x


def student_noise(student: Student, way: HybridSchedule, n: int, seed: int, first: int = 0) -> list[Tensor]:
    """The noise before each call of the student's part but the first: that of the student alone there.

    Args:
        student: The student.
        way: Who goes which part.
        n: Number of samples.
        seed: Seed of the samples.
        first: Number of the first one.
    """
    later = len(way.student_sigmas[1:])
    names = [f"latents/{student.nfe - later + i}" for i in range(later)]
    return [initial_noise(n, student.shape, seed, name, first=first) for name in names]


def follower_of(student: Student, way: HybridSchedule) -> Student:
    """The student that continues a teacher's trajectory from noised data."""
    follower = student.around(student.denoiser, way.student_sigmas)
    follower.from_noise = False
    return follower


def student_calls(
    follower: Student, y: Tensor, noise: list[Tensor], conditioning: Conditioning
) -> list[Tensor]:
    """All calls of a student from a given first input.

    Args:
        follower: The student.
        y: State at its first level, (B, *shape).
        noise: Unit normal noise before each call but the first.
        conditioning: What the samples are conditioned on.

    Returns:
        The clean samples after each call; with jumps, those of all but the last only lead to the next noise
        level.
    """
    found = [follower.call(y, 0, conditioning)]
    for index, fresh in enumerate(noise, 1):
        y = follower.advance(y, found[-1], fresh, index)
        found.append(follower.call(y, index, conditioning))
    return found
