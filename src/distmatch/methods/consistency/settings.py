"""The settings of each method of the consistency family. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmatch.base.rules import Count, Decay, Finite, NotNegative, Positive, Share
from distmatch.methods.settings import (
    PATH_START,
    DiscriminatorSettings,
    GammaSettings,
    GuidedSettings,
    NoiseDistributionSettings,
)


@dataclass(frozen=True, kw_only=True)
class LevelSettings:
    """The noise levels of training."""

    level_distribution: Literal["auto", "karras", "uniform", "log-normal"] = "auto"
    """Noise distribution of training, up to the student's first sigma, which a log-normal rarely reaches.
    uniform: in the time of the teacher's sampler. auto: uniform for pipelines, else karras."""
    level_mean: Finite = -0.4
    """Mean of log(sigma / sigma_data) of the log-normal distribution."""
    level_std: Positive = 2.0
    """Standard deviation of log(sigma / sigma_data) of the log-normal distribution."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        unused = ("level_mean", "level_std") if self.level_distribution != "log-normal" else ()
        return dict.fromkeys(unused, f"--level-distribution {self.level_distribution}")


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The flow that the student follows."""

    consistency_from: Literal["teacher", "data"] = "teacher"
    """The flow that the student follows: the teacher's, or that of the data (consistency training)."""

    def idle(self) -> dict[str, str]:
        """The settings that have no effect, each with the reason: the data's flow has no teacher to guide."""
        return {"guidance": "--consistency-from data"} if self.consistency_from == "data" else {}


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Two points of a trajectory."""

    huber: NotNegative = 1e-3
    """c of the pseudo-Huber distance, in units of sigma_data sqrt(dimensions); 0 is the norm."""
    teacher_solver: Literal["euler", "heun"] = "heun"
    """Solver of the teacher between two noise levels."""
    solver_steps: Count = 1
    """Solver steps between two noise levels."""


@dataclass(frozen=True, kw_only=True)
class DerivativeSettings:
    """The derivative along the trajectory."""

    tangent: Literal["auto", "exact", "difference"] = "auto"
    """Derivatives of the student by forward mode, or by central differences in float64; auto uses the second
    for networks that do not support the first."""


@dataclass(frozen=True, kw_only=True)
class TangentSettings(DerivativeSettings):
    """The derivative along the trajectory."""

    tangent_warmup: Share = 0.25
    """Share of the run in which the tangent changes from the denoiser's to the consistency function's."""
    tangent_bound: Positive = 0.1
    """c of the normalization g / (|g| + c) of the tangent."""


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings(FlowSettings, LevelSettings, PairSettings, GuidedSettings):
    """Settings of consistency."""

    student_sigma: NotNegative = PATH_START
    stages: Count = 8
    """Times that the distance of a pair's noise levels is halved over the run."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        unused = ("teacher_solver", "solver_steps") if self.consistency_from == "data" else ()
        return dict.fromkeys(unused, "--consistency-from data")


@dataclass(frozen=True, kw_only=True)
class SCMSettings(FlowSettings, LevelSettings, TangentSettings, GuidedSettings):
    """Settings of scm."""

    student_sigma: NotNegative = PATH_START
    lr: Positive = 2e-4
    level_mean: Finite = -0.3
    level_std: Positive = 1.4


@dataclass(frozen=True, kw_only=True)
class CTMSettings(LevelSettings, PairSettings, GammaSettings, DiscriminatorSettings, GuidedSettings):
    """Settings of ctm."""

    student_sigma: NotNegative = PATH_START
    gan_weight: NotNegative = 1.0
    solver_steps: Count = 17
    """Largest number of solver steps between two noise levels, drawn at each training step; each covers one
    interval of a grid of 18 noise levels."""
    target_decay: Decay = 0.0
    """Decay of the EMA target network; 0 is the student itself. The paper's 0.999 is for runs of tens of
    thousands of steps."""
    dsm_weight: NotNegative = 1.0
    """Weight of the denoising term, relative to the size of the consistency gradient. The adversarial term's
    is --gan-weight."""
    gan_after: Share = 0.5
    """Share of the run before the adversarial term."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        return {"gan_after": "--gan-weight 0"} if self.gan_weight == 0 else {}


@dataclass(frozen=True, kw_only=True)
class MeanFlowSettings(FlowSettings, LevelSettings, DerivativeSettings, GammaSettings, GuidedSettings):
    """Settings of mean-flow."""

    # Derivatives in its time grow with sigma, so noise levels uniform in sigma^(1/7) make it too noisy. The
    # paper draws logit t from N(-0.6, 1.6), with unit noise and data of 1/2: log sigma is logit t, and
    # log(sigma / sigma_data) is larger by log 2. In the same way -4.0 of the lower level is -3.3069.
    student_sigma: NotNegative = PATH_START
    level_distribution: Literal["auto", "karras", "uniform", "log-normal"] = "log-normal"
    level_mean: Finite = 0.0931
    level_std: Positive = 1.6
    to_mean: Finite = -3.3069
    """Mean of log(sigma / sigma_data) of the target noise level."""
    to_std: Positive = 1.6
    """Standard deviation of log(sigma / sigma_data) of the target noise level."""
    jump_share: Share = 0.75
    """Share of the batch with a different target noise level; the rest learns the velocity at its own."""
    adaptive_power: NotNegative = 0.75
    """p of the weight 1 / (|error|^2 + 4e-3)^p, errors in units of sigma_data; 0 is none."""


@dataclass(frozen=True, kw_only=True)
class RCMSettings(LevelSettings, TangentSettings, NoiseDistributionSettings):
    """Settings of rcm."""

    student_sigma: NotNegative = PATH_START
    # With an update at every fifth step only, as in the paper, a short run has too few student updates.
    fake_score_steps: Count = 1
    lr: Positive = 2e-4
    level_mean: Finite = 0.7
    level_std: Positive = 1.6
    dmd_weight: NotNegative = 0.01
    """Weight of the score difference relative to the consistency loss."""
    dmd_after: Share = 0.0
    """Share of the run in which the score difference is computed but has no weight."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        return {"dmd_after": "--dmd-weight 0"} if self.dmd_weight == 0 else {}
