"""Settings of the consistency family. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """What the consistency methods have of their own."""

    consistency_from: Literal["teacher", "data"] = "teacher"
    """Whose flow the student follows: the teacher's, or that of the data alone (consistency training)."""
    level_law: Literal["karras", "log-normal"] = "karras"
    """Noise levels in training, up to where the student starts, which a log-normal hardly reaches."""
    level_mean: float = -0.4
    """Mean of log(sigma / sigma_data) of the log-normal law."""
    level_std: float = 2.0
    """Spread of log(sigma / sigma_data) of the log-normal law."""
    stages: int = 8
    """Times that the two levels of a pair come closer by half over the run (consistency)."""
    huber: float = 1e-3
    """c of the pseudo-Huber distance, in units of sigma_data sqrt(dimensions); 0 is the norm
    (consistency, ctm)."""
    teacher_solver: Literal["euler", "heun"] = "heun"
    """Solver of the teacher between two levels (consistency, ctm)."""
    solver_steps: int = 1
    """Solver steps between two levels (consistency); the most of them, their number being drawn at each step,
    and each crosses a cell of a grid of 18 levels (ctm)."""
    tangent: Literal["auto", "exact", "difference"] = "auto"
    """Derivatives of the student by forward mode, or by central differences in float64; auto takes the
    second for networks that the first does not get through (scm, mean-flow, rcm)."""
    tangent_warmup: float = 0.25
    """Share of the run in which the tangent turns from the denoiser's to the consistency function's
    (scm, rcm)."""
    tangent_bound: float = 0.1
    """c of the normalisation g / (|g| + c) of the tangent (scm, rcm)."""
    to_mean: float = -3.3069
    """Mean of log(sigma / sigma_data) of the level to go to (mean-flow)."""
    to_std: float = 1.6
    """Spread of log(sigma / sigma_data) of the level to go to (mean-flow)."""
    jump_share: float = 0.75
    """Share of the batch that goes to another level; the rest learns the velocity at its own (mean-flow)."""
    adaptive_power: float = 0.75
    """p of the weight 1 / (|error|^2 + 4e-3)^p, errors in units of sigma_data; 0 is none (mean-flow)."""
    target_decay: float = 0.0
    """Decay of the average network that makes targets; 0 is the student itself. The paper's 0.999 is for runs
    of tens of thousands of steps (ctm)."""
    dsm_weight: float = 1.0
    """Weight of the denoising term, relative to the size of the consistency gradient (ctm). The adversarial
    term's is --gan-weight."""
    gan_after: float = 0.5
    """Share of the run before the adversarial term (ctm)."""
    gamma: float = 0.0
    """Fresh noise between the calls of a student of several: 0 follows the path, 1 is fresh noise alone (ctm,
    mean-flow, imm)."""
    dmd_weight: float = 0.01
    """Weight of the score difference beside the consistency loss (rcm)."""
    dmd_after: float = 0.0
    """Share of the run in which the score difference is measured but does not count yet (rcm)."""

    def __post_init__(self) -> None:
        for name in ("level_std", "to_std", "tangent_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be positive", got=getattr(self, name))
        for name in ("huber", "adaptive_power", "dsm_weight", "dmd_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must not be negative", got=getattr(self, name))
        for name in ("tangent_warmup", "jump_share", "gan_after", "gamma", "dmd_after"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be in [0, 1]", got=getattr(self, name))
        for name in ("stages", "solver_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1", got=getattr(self, name))
        for name in ("level_mean", "to_mean"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(
                    f"--{name.replace('_', '-')} must be a finite number", got=getattr(self, name)
                )
        if not 0 <= self.target_decay < 1:
            raise UserError("--target-decay must be in [0, 1)", got=self.target_decay)
