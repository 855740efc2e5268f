"""How a teacher is sampled: solver, grid of levels, guidance."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.guidance import guided, require_null_class
from distmatch.diffusion.paths import NoisePath, noise_path
from distmatch.diffusion.paths.specs import parse_path
from distmatch.diffusion.solvers import find_solver, grid, snap_grid
from distmatch.training.known_data import check_same_classes

MOST_STEPS = 100_000
"""More steps than this are a slip of the keyboard, and their coefficients alone would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a teacher's sampling; those of EDM by default.

    Attributes:
        solver: Name of a solver, with options after colons.
        steps: Steps of the grid.
        grid: Kind of grid.
        path: Name of the noise path for solvers and grids that work in its time, with options after a colon;
            '' takes the teacher's own, or that of DEIS, ``vp``, for a teacher without one.
        guidance: Guidance scale; 1 is none.
        interval: Guide where low < sigma <= high only; None guides everywhere.
        reference: A weaker teacher to guide by, instead of the teacher without its class.
    """

    solver: str = "heun"
    steps: int = 18
    grid: str = "karras"
    path: str = ""
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    reference: Denoiser | None = None

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
        levels = grid(self.grid, self.steps, teacher.sigma_min, teacher.sigma_max, path=path)
        if isinstance(teacher, PredictionDenoiser) and teacher.levels == "snap":
            levels = snap_grid(levels, teacher.path)
        return levels

    def around(self, teacher: Denoiser) -> Denoiser:
        """The teacher with the requested guidance.

        Raises:
            UserError: A guidance that the teacher cannot have.
        """
        return guided(teacher, self.guidance, interval=self.interval, reference=self.reference)

    def to_dict(self) -> dict[str, Any]:
        """The requested options, as JSON, for logs."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reference"}
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
        if self.guidance != 1 and self.reference is None:
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
