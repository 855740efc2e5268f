"""The settings of the methods that compare samples with samples. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distmatch.base.rules import Count, Finite, NotNegative, Positive, between
from distmatch.methods.settings import PATH_START, GammaSettings, NetworkSettings


@dataclass(frozen=True, kw_only=True)
class MMDSettings(NetworkSettings):
    """What mmd has of its own."""

    mmd_kernel: Literal["auto", "cubic", "linear", "rbf", "energy"] = "auto"
    """Kernel of mmd. cubic (that of KID) sees three moments of the features, linear one; rbf and energy see
    everything. auto is cubic on features of a network and energy on plain samples."""
    mmd_features: Literal["auto", "samples", "teacher"] = "auto"
    """What mmd compares: the samples themselves, or the inner activations of the frozen teacher. auto takes
    the teacher's for images, where it lends them."""
    mmd_feature_sigma: Positive = 0.4
    """Noise level that the teacher is told when it lends its activations on clean samples, in units of
    sigma_data."""
    mmd_bandwidth: Positive = 1.0
    """Width of the rbf kernel, in units of the spread of the features times the root of their number."""
    mmd_spacing: Literal["karras", "uniform", "quadratic"] = "karras"
    """Levels of the chain of mmd: even in Karras's parameter, in the time of the VP path, or in its root."""
    mmd_checkpoint: bool = False
    """Compute the calls of the chain again in the backward pass instead of keeping their activations."""


@dataclass(frozen=True, kw_only=True)
class IMMSettings(GammaSettings, NetworkSettings):
    """What imm has of its own."""

    student_sigma: NotNegative = PATH_START
    imm_particles: Count = 4
    """M: samples that share their noise levels, among which imm takes its kernel."""
    imm_halvings: Annotated[int, between(0, 30)] = 12
    """imm compares jumps from t with jumps from a level that is (sigma_max - sigma_min) / 2^k below it."""
    imm_offset: Finite = 4.0
    """b: the log signal-to-noise ratio where the weight of imm begins to fall."""
