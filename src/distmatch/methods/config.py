"""Settings that several methods share. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings that several methods share; a method may have other defaults: see `--method NAME --help`.

    The defaults are for laptop-size problems; `docs/presets.md` lists the published ones.
    """

    calls: int = 1
    """Network calls of the student: 1, or more with backward simulation."""
    student_sigma: float = 5.0
    """Noise level at which the student starts, in units of sigma_data; 0 takes the teacher's sigma_max. A
    copied teacher keeps more of what it knows at a level where its predictions still vary."""
    critic_steps: int = 5
    """K: the student moves at every K-th step."""
    order: Literal["same-batch", "alternate"] = "same-batch"
    """same-batch: critic every step, student every K-th on the same samples (DMD2).
    alternate: every K-th step is the student's, the others the critic's (FastGen)."""
    warmup_steps: int = 0
    """Steps in which only the critic and the discriminator learn."""
    lr: float = 5e-4
    """Learning rate of the student."""
    lr_critic: float = 1e-3
    """Learning rate of the fake score."""
    lr_ratio: float = 1e-3
    """Learning rate of the discriminator."""
    lr_decay: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run, after lr_rampup steps of linear warm-up."""
    lr_rampup: int = 100
    """Steps of linear learning-rate warm-up."""
    beta1: float = 0.9
    """First Adam moment decay of all optimisers."""
    beta2: float = 0.99
    """Second Adam moment decay of all optimisers."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm of each network; 0 leaves gradients alone."""
    ema_half_life: float = 200.0
    """Half-life of the student average, in student updates; 0 takes the last weights."""
    gan_weight: float = 1e-3
    """Weight of the adversarial term of the student; 0 leaves it out."""
    r1: float = 0.0
    """Weight of the approximate R1 penalty on the discriminator."""
    ratio_features: Literal["auto", "teacher", "fake", "own"] = "auto"
    """What the discriminator sees: features of the frozen teacher (only its head learns), features of the
    fake score (which then learns from it, as in DMD2), or a small network of its own on noised samples."""
    joint_weight: float = 1e-2
    """Weight of the discriminator's loss where it shares the fake score's network (--ratio-features fake);
    larger values spoil the fake score."""
    ratio_bins: int = 10
    """Noise bins of the ratio normaliser, of equal probability."""
    ratio_memory: float = 0.95
    """Share of the running sums of the ratio kept at each student step; more is kept at small batches.
    0 divides by the mean of the batch itself."""
    ratio_min_count: float = 64.0
    """Samples a noise bin needs before its own mean is used."""
    ratio_clip: float = 3.0
    """Bound on |log r| after normalisation."""
    noise_low: float = 0.04
    """Smallest noise level at which student and teacher are compared, in units of sigma_data."""
    noise_high: float = 0.0
    """Largest noise level of the comparison, in units of sigma_data; 0 takes the teacher's sigma_max."""
    noise_rho: float = 7.0
    """Curvature of the noise-level distribution (Karras)."""
    noise_law: Literal["karras", "log-normal"] = "karras"
    """Law of the levels of the comparison, between the two ends: even in sigma^(1/rho), or log-normal."""
    critic_law: Literal["same", "log-normal"] = "same"
    """Law of the levels at which fake score and discriminator learn: that of the comparison, or log-normal
    over all levels of the teacher (SiD)."""
    noise_mean: float = -0.5069
    """Mean of log(sigma / sigma_data) of a log-normal law; this is EDM's -1.2 for data of 1/2."""
    noise_std: float = 1.2
    """Spread of log(sigma / sigma_data) of a log-normal law."""
    scaling: Literal["dmd2", "score"] = "dmd2"
    """dmd2: per-sample gradient scaled by mean |x0 - D_teacher|. score: the plain score difference."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher; 1 is none."""
    fit_steps: int = 2000
    """Regression steps that start student and critic off a teacher without a network (exact teachers)."""
    accumulate: int = 1
    """Parts in which networks see a batch, to save memory. The update is that of the whole batch, its
    ratio statistics included."""

    def __post_init__(self) -> None:
        positive = (
            *("calls", "accumulate", "critic_steps", "lr", "lr_critic", "lr_ratio", "ratio_clip"),
            *("joint_weight", "noise_low", "noise_rho", "noise_std"),
        )
        not_negative = (
            *("student_sigma", "warmup_steps", "lr_rampup", "gan_weight", "r1", "grad_clip", "noise_high"),
            *("weight_decay", "fit_steps", "ema_half_life"),
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be positive", got=getattr(self, name))
        for name in not_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must not be negative", got=getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1)", got=getattr(self, name))
        for name in ("guidance", "noise_mean"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(
                    f"--{name.replace('_', '-')} must be a finite number", got=getattr(self, name)
                )
        if self.order == "alternate" and self.critic_steps < 2:
            raise UserError(
                "with --order alternate a critic step must lie between student steps",
                got=f"--critic-steps {self.critic_steps}",
                expected="2 or more",
            )
