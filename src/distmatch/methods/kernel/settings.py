"""The settings of the methods that compare samples with samples. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distmatch.base.rules import Count, Finite, NotNegative, Positive, between
from distmatch.methods.settings import PATH_START, GammaSettings, NetworkSettings


@dataclass(frozen=True, kw_only=True)
class MMDSettings(NetworkSettings):
    """Settings of mmd."""

    mmd_kernel: Literal["auto", "cubic", "linear", "rbf", "energy"] = "auto"
    """Kernel of mmd. cubic (that of KID) compares three moments of the features, linear one; rbf and energy
    are characteristic. auto is cubic on features of a network and energy on plain samples."""
    mmd_features: Literal["auto", "samples", "teacher"] = "auto"
    """Features of mmd: the samples themselves, or activations of the frozen teacher. auto uses the teacher's
    for images, if it has them."""
    mmd_feature_sigma: Positive = 0.4
    """Noise level that the teacher receives for its activations on clean samples, in units of sigma_data."""
    mmd_bandwidth: Positive = 1.0
    """Width of the rbf kernel, in units of the standard deviation of the features times the square root of
    their number."""
    mmd_spacing: Literal["karras", "uniform", "quadratic"] = "karras"
    """Sigmas of the student's steps: uniform in Karras's parameter, in the time of the VP path, or in its
    square root."""
    mmd_checkpoint: bool = False
    """Recompute the steps in the backward pass instead of storing their activations."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        return {"mmd_spacing": "--student-times"} if self.student_times else {}


@dataclass(frozen=True, kw_only=True)
class IMMSettings(GammaSettings, NetworkSettings):
    """Settings of imm."""

    student_sigma: NotNegative = PATH_START
    imm_particles: Count = 4
    """M: samples that share their noise levels, between which imm computes its kernel."""
    imm_halvings: Annotated[int, between(0, 30)] = 12
    """imm compares jumps from t with jumps from a noise level that is (sigma_max - sigma_min) / 2^k below
    it."""
    imm_offset: Finite = 4.0
    """b: the log signal-to-noise ratio where the weight of imm starts to decrease."""
