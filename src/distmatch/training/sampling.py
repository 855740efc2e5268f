"""How a teacher is sampled (solver, grid, guidance), and samples of any model with their cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.conditioning import Conditioning, ConditioningLike, as_conditioning
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.guidance import CallCounter, guided, require_null_class
from distmatch.diffusion.paths import NoisePath, noise_path
from distmatch.diffusion.paths.specs import parse_path
from distmatch.diffusion.solvers import default_grid, find_solver, grid, sample_teacher, snap_grid
from distmatch.interop import decode_samples
from distmatch.methods.student import Student
from distmatch.training.known_data import check_same_classes

MOST_STEPS = 100_000
"""More steps than this are a slip of the keyboard, and their coefficients alone would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a teacher's sampling; those of EDM by default.

    Attributes:
        solver: Name of a solver, with options after colons.
        steps: Steps of the grid.
        grid: Kind of grid; auto is that of the teacher's own sampler, ``karras`` for most.
        path: Name of the noise path for solvers and grids that work in its time, with options after a colon;
            '' takes the teacher's own, or that of DEIS, ``vp``, for a teacher without one.
        guidance: Guidance scale; 1 is none.
        interval: Guide where low < sigma <= high only; None guides everywhere.
        reference: A weaker teacher to guide by, instead of the teacher without its class.
        negative: What to lead away from, one row; None is no condition.
        rescale: As for :class:`~distmatch.diffusion.guidance.Guided`.
    """

    solver: str = "heun"
    steps: int = 18
    grid: str = "auto"
    path: str = ""
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    reference: Denoiser | None = None
    negative: Conditioning | None = None
    rescale: float = 0.0

    def path_for(self, teacher: Denoiser) -> NoisePath:
        """The path for what works in a path's time.

        Raises:
            UserError: An unknown name or option.
        """
        if self.path:
            ends = {"sigma_min": teacher.sigma_min, "sigma_max": teacher.sigma_max}
            return parse_path(self.path, sigma_data=teacher.sigma_data, **ends)
        return noise_path(getattr(teacher, "path", None) or "vp")

    def levels(self, teacher: Denoiser) -> Tensor:
        """The noise levels for a teacher, (steps + 1,) or fewer, float64, from its ``sigma_max`` to 0.

        For a teacher with rounded timesteps they are rounded to its training grid.

        Raises:
            UserError: Unknown names, or fewer steps than the solver needs.
        """
        path = self.path_for(teacher)
        if self.grid == "auto":
            levels = default_grid(teacher, self.steps)
        else:
            levels = grid(self.grid, self.steps, teacher.sigma_min, teacher.sigma_max, path=path)
        if isinstance(teacher, PredictionDenoiser) and teacher.levels == "snap":
            levels = snap_grid(levels, teacher.path)
        return levels

    def around(self, teacher: Denoiser) -> Denoiser:
        """The teacher with the requested guidance.

        Raises:
            UserError: A guidance that the teacher cannot have.
        """
        return guided(
            teacher,
            self.guidance,
            interval=self.interval,
            reference=self.reference,
            negative=self.negative,
            rescale=self.rescale,
        )

    def to_dict(self) -> dict[str, Any]:
        """The requested options, as JSON, for logs."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        del said["negative"]
        if not self.rescale:
            del said["rescale"]
        return {**said, "reference": self.reference is not None}

    def check(self, teacher: Denoiser) -> None:
        """Raises the errors of sampling immediately.

        Raises:
            UserError: Settings that do not go together, or not with this teacher.
        """
        if self.steps > MOST_STEPS:
            raise UserError("too many steps", got=self.steps, expected=f"at most {MOST_STEPS}")
        if self.reference is not None:
            check_same_classes(teacher, self.reference, "the teacher and the one that it is guided by")
        chosen, levels = find_solver(self.solver), self.levels(teacher)
        self.around(teacher)
        if self.guidance != 1 and self.reference is None and self.negative is None:
            require_null_class(teacher)
        if chosen.stochastic:
            require_score(teacher, f"the solver {self.solver}, which adds Gaussian noise,")
        if self.path and not chosen.needs_path and self.grid not in ("time", "power"):
            raise UserError(
                "a noise path does nothing for a solver and a grid that do not work in its time",
                got=f"--path {self.path} with --solver {self.solver} and --grid {self.grid}",
                fix="omit --path, or use --solver tab, or --grid time or power",
            )
        if len(levels) - 1 < chosen.least_steps:
            raise UserError(
                f"the solver {self.solver} needs at least {chosen.least_steps} steps",
                got=len(levels) - 1,
                fix=f"give --steps {chosen.least_steps} or more, or use --solver heun",
            )


HEUN = Sampling()


@dataclass(frozen=True)
class SampleResult:
    """Samples of one model and what they cost.

    Attributes:
        x: (n, *shape) float32 on the CPU, in model space.
        conditioning: What they were conditioned on.
        nfe: Network calls for each sample, counted.
        seconds_per_1000: Wall-clock seconds for 1000 samples.
        prompts: The text of each sample's condition, or ().
    """

    x: Tensor
    conditioning: Conditioning
    nfe: int
    seconds_per_1000: float
    prompts: tuple[str, ...] = ()


class _CountingStudent:
    """Counts the calls of a student's network while it samples."""

    def __init__(self, student: Student) -> None:
        self.calls = 0
        self._handle = student.denoiser.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def done(self) -> int:
        self._handle.remove()
        return self.calls


def draw_student(
    student: Student, n: int, conditioning: ConditioningLike, seed: int, batch: int = 1024, first: int = 0
) -> SampleResult:
    """Samples a student, counting calls and time; ``first`` is the number of the first sample."""
    counter = _CountingStudent(student)
    with progress(n, desc="student samples") as bar:
        began = time.perf_counter()
        how: dict[str, Any] = {"batch": batch, "on_batch": bar.update, "first": first}
        x = student.sample(n, seed=seed, conditioning=conditioning, **how)
        seconds = time.perf_counter() - began
    batches = math.ceil(n / batch)
    return SampleResult(x, as_conditioning(conditioning), counter.done() // batches, 1000 * seconds / n)


def draw_teacher(
    teacher: Denoiser,
    n: int,
    conditioning: ConditioningLike,
    seed: int,
    sampling: Sampling = HEUN,
    *,
    batch: int = 1024,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> SampleResult:
    """Samples a teacher, by default with Heun's method, counting calls and time.

    Args:
        teacher: The teacher; the samples of one that works on latents are decoded.
        n: Number of samples.
        conditioning: What they are conditioned on: classes (n,), a conditioning, or None.
        seed: Seed of all noise.
        sampling: Solver, grid and guidance.
        batch: Samples at a time.
        device: Where to compute.
        first: Number of the first sample.

    Raises:
        UserError: Settings that do not go together, or not with this teacher.
    """
    sampling.check(teacher)
    counter = CallCounter(sampling.around(teacher))
    with progress(n, desc="teacher samples") as bar:
        began = time.perf_counter()
        z = sample_teacher(
            counter,
            n,
            solver=sampling.solver,
            grid=sampling.levels(teacher),
            path=sampling.path_for(teacher),
            conditioning=conditioning,
            seed=seed,
            batch=batch,
            device=device,
            on_batch=bar.update,
            first=first,
        )
        with torch.no_grad():
            x = decode_samples(teacher, z, device=device)
        seconds = time.perf_counter() - began
    # A solver that chooses its own steps may take more of them for one batch than for another.
    calls = round(counter.calls / math.ceil(n / batch))
    return SampleResult(x, as_conditioning(conditioning), calls, 1000 * seconds / n)
