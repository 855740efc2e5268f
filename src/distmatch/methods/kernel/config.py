"""Settings of the kernel family. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What the methods by samples have of their own."""

    mmd_kernel: Literal["auto", "cubic", "linear", "rbf", "energy"] = "auto"
    """Kernel of mmd. cubic (that of KID) sees three moments of the features, linear one; rbf and energy see
    everything. auto is cubic on features of a network and energy on plain samples."""
    mmd_features: Literal["auto", "samples", "teacher"] = "auto"
    """What mmd compares: the samples themselves, or the inner activations of the frozen teacher. auto takes
    the teacher's for images, where it lends them."""
    mmd_feature_sigma: float = 0.4
    """Noise level that the teacher is told when it lends its activations on clean samples, in units of
    sigma_data."""
    mmd_bandwidth: float = 1.0
    """Width of the rbf kernel, in units of the spread of the features times the root of their number."""
    mmd_spacing: Literal["karras", "uniform", "quadratic"] = "karras"
    """Levels of the chain of mmd: even in Karras's parameter, in the time of the VP path, or in its root."""
    mmd_checkpoint: bool = False
    """Compute the calls of the chain again in the backward pass instead of keeping their activations."""
    imm_particles: int = 4
    """M: samples that share their noise levels, among which imm takes its kernel."""
    imm_halvings: int = 12
    """imm compares jumps from t with jumps from a level that is (sigma_max - sigma_min) / 2^k below it."""
    imm_offset: float = 4.0
    """b: the log signal-to-noise ratio where the weight of imm begins to fall."""

    def __post_init__(self) -> None:
        for name in ("mmd_feature_sigma", "mmd_bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be positive", got=getattr(self, name))
        if self.imm_particles < 1:
            raise UserError("--imm-particles must be at least 1", got=self.imm_particles)
        if not 0 <= self.imm_halvings <= 30:
            raise UserError(
                "--imm-halvings is out of range", got=self.imm_halvings, expected="a number from 0 to 30"
            )
        if not math.isfinite(self.imm_offset):
            raise UserError("--imm-offset must be a finite number", got=self.imm_offset)
