"""Settings that several methods read, from which each method's own class is composed. Imports no torch.

A method's class inherits what it reads and has its own defaults as those of its fields, all of them in the
class itself: a dataclass takes the fields of each base whole, inherited ones too, so that what one of several
bases replaces can be lost. A class may have a method ``idle``, which names those of its settings that others
leave without effect; giving one of them is refused. The first line of a class is the title of its settings in
help texts. The defaults are for laptop-size problems; `docs/presets.md` lists published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError
from distmatch.base.rules import Count, CountOrNone, Decay, Finite, NotNegative, Positive, Share
from distmatch.nets.optimizer import OptimizerSettings

PATH_START = 14.0
"""First sigma of consistency-type students, in units of sigma_data: at 10 for toys and digits, whose spread
is 0.7 to 0.75. Higher levels are hardly in the training of EDM's teachers."""


@dataclass(frozen=True, kw_only=True)
class Settings(OptimizerSettings):
    """The student and its training."""

    num_steps: Count = 1
    """Steps of the student: 1, or more with backward simulation."""
    student_sigma: NotNegative = 5.0
    """Noise level at which the student starts, in units of sigma_data; 0: the teacher's sigma_max, the
    default for pipelines. A copied teacher is a better initialization at a noise level where its predictions
    still vary."""
    ema_half_life: NotNegative = 200.0
    """Half-life of the student's EMA, in student updates; 0: no EMA."""
    fit_steps: CountOrNone = 2000
    """Regression steps in which a new network (--net, or that of any student of an exact teacher) learns the
    teacher's predictions at first; 0: it starts from random weights."""


@dataclass(frozen=True, kw_only=True)
class RoleSettings:
    """Initialization of the networks (student, fake score, EMA, recorded teachers) from the teacher's."""

    train: Literal["full", "lora"] = "full"
    """full: each network is a fully trained copy. lora: all share the teacher's frozen weights, and each has
    low-rank adapters."""
    lora_rank: Count = 8
    """Rank of the adapters."""
    lora_alpha: NotNegative = 0.0
    """Adapters are scaled by alpha / rank; 0: alpha is the rank."""
    lora_targets: tuple[str, ...] = ("auto",)
    """Layers with adapters: regular expressions for full names, or for the part after a dot. auto: those in
    the repeated blocks of a network from elsewhere, and all of a built-in one, which is small."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the shared frozen weights; adapters, their EMA and optimizer are float32."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        names = ("lora_rank", "lora_alpha", "lora_targets", "base_dtype") if self.train == "full" else ()
        return dict.fromkeys(names, "--train full")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(RoleSettings, Settings):
    """The student and its training."""

    accumulate: Count = 1
    """Gradient accumulation: parts of a batch, to save memory. The update is that of the whole batch,
    including its ratio statistics."""
    checkpointing: bool = False
    """Activation checkpointing: the blocks of the networks keep their inputs alone for the backward pass,
    which computes the rest again. Saves memory and costs about a third more time."""
    offload: bool = False
    """Keep Adam's moments in the memory of the CPU but while their network is updated; for accelerators."""
    student_times: tuple[float, ...] = ()
    """Times of the student's steps on the teacher's noise path, decreasing: 1 0.75 0.5 0.25 of a flow, 999
    749 499 249 of a network of 1000 timesteps, noise levels of EDM's. Unset: --num-steps of them."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        return dict.fromkeys(("num_steps", "student_sigma") if self.student_times else (), "--student-times")


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(NetworkSettings):
    """The student and its training."""

    guidance: Finite = 1.0
    """Classifier-free guidance scale of the teacher; 1 is none."""
    guidance_interval: tuple[float, ...] = ()
    """LOW HIGH: guide only where low < sigma <= high, in units of sigma_data; unset: everywhere."""
    guidance_rescale: Share = 0.0
    """phi: the guided prediction gets back the standard deviation of the unguided one, by this share, against
    over-exposure (Lin et al. 2023)."""
    negative_prompt: str = ""
    """What guidance leads away from, for teachers with prompts; unset: the null condition."""
    guidance_range: tuple[float, ...] = ()
    """LOW HIGH: for networks that receive their guidance scale (Flux), each sample of training receives one
    from this range; unset: that of the conditioning."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        names = ("guidance_interval", "guidance_rescale", "negative_prompt") if self.guidance == 1 else ()
        return dict.fromkeys(names, "--guidance 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance_interval", "guidance_range"):
            ends = getattr(self, name)
            if ends and not (len(ends) == 2 and 0 <= ends[0] < ends[1]):
                raise UserError(
                    f"--{name.replace('_', '-')} takes two numbers, the lower one first",
                    got=" ".join(f"{end:g}" for end in ends),
                )


@dataclass(frozen=True, kw_only=True)
class FakeScoreSettings(GuidedSettings):
    """The fake score and the levels of the comparison."""

    fake_score_steps: Count = 5
    """K: update the student at every K-th step."""
    order: Literal["same-batch", "alternate"] = "same-batch"
    """same-batch: fake score every step, student every K-th on the same samples (DMD2).
    alternate: every K-th step is the student's, the others the fake score's (FastGen)."""
    warmup_steps: CountOrNone = 0
    """Steps in which only the fake score and the discriminator learn."""
    lr_fake_score: Positive = 1e-3
    """Learning rate of the fake score."""
    noise_low: Positive = 0.04
    """Smallest noise level at which student and teacher are compared, in units of sigma_data."""
    noise_high: NotNegative = 0.0
    """Largest noise level at which student and teacher are compared, in units of sigma_data; 0: sigma_max."""
    noise_rho: Positive = 7.0
    """Exponent rho of the Karras noise distribution."""
    scaling: Literal["dmd2", "score"] = "dmd2"
    """dmd2: per-sample gradient scaled by mean |x0 - D_teacher|. score: the plain score difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == "alternate" and self.fake_score_steps < 2:
            raise UserError(
                "with --order alternate a fake score step must lie between student steps",
                got=f"--fake-score-steps {self.fake_score_steps}",
                expected="2 or more",
            )


@dataclass(frozen=True, kw_only=True)
class NoiseDistributionSettings(FakeScoreSettings):
    """The fake score and the levels of the comparison."""

    noise_distribution: Literal["auto", "karras", "uniform", "log-normal"] = "auto"
    """Noise distribution of the score difference, between the two limits: uniform in sigma^(1/rho) (karras),
    uniform in the time of the teacher's sampler, or log-normal. auto: uniform for pipelines, else karras."""
    fake_score_distribution: Literal["same", "log-normal"] = "same"
    """Noise distribution for fake score and discriminator: that of the score difference, or log-normal over
    the teacher's whole range (SiD)."""
    noise_mean: Finite = -0.5069
    """Mean of log(sigma / sigma_data) of a log-normal distribution; this is EDM's -1.2 for data of 1/2."""
    noise_std: Positive = 1.2
    """Standard deviation of log(sigma / sigma_data) of a log-normal distribution."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        reason = f"--noise-distribution {self.noise_distribution}"
        idle = {"noise_rho": reason} if self.noise_distribution in ("uniform", "log-normal") else {}
        if self.noise_distribution != "log-normal" and self.fake_score_distribution == "same":
            reason += " and --fake-score-distribution same"
            idle |= dict.fromkeys(("noise_mean", "noise_std"), reason)
        return idle


@dataclass(frozen=True, kw_only=True)
class DiscriminatorSettings:
    """The discriminator and the density ratio."""

    lr_discriminator: Positive = 1e-3
    """Learning rate of the discriminator."""
    gan_weight: NotNegative = 1e-3
    """Weight of the adversarial term of the student; 0 omits it."""
    r1: NotNegative = 0.0
    """Weight of the approximate R1 penalty on the discriminator."""
    ratio_features: Literal["auto", "teacher", "fake", "own"] = "auto"
    """Input of the discriminator: features of the frozen teacher (only its head is trained), features of the
    fake score (which is then trained by it, as in DMD2), or noised samples, with a small separate network."""
    ratio_depths: tuple[float, ...] = ()
    """Shares of the blocks of a network from elsewhere whose outputs are its features; unset: 0.5 0.75 0.99
    for pipelines, for others the parts that were named."""

    def idle(self) -> dict[str, str]:
        """The settings of this class that have no effect, each with the others that are the reason."""
        return {"ratio_depths": "--ratio-features own"} if self.ratio_features == "own" else {}


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(DiscriminatorSettings):
    """The discriminator and the density ratio."""

    joint_weight: Positive = 1e-2
    """Weight of the discriminator's loss where it shares the fake score's network (--ratio-features fake);
    larger values harm the fake score."""


@dataclass(frozen=True, kw_only=True)
class RatioSettings(AdversarialSettings):
    """The discriminator and the density ratio."""

    ratio_bins: Count = 10
    """Noise bins of the ratio normalizer, of equal probability."""
    ratio_memory: Decay = 0.95
    """Share of the running sums of the ratio kept at each student step; larger for small batches.
    0 divides by the mean of the batch itself."""
    ratio_min_count: Positive = 64.0
    """Samples a noise bin needs before its own mean is used."""
    ratio_clip: Positive = 3.0
    """Bound on |log r| after normalization."""


@dataclass(frozen=True, kw_only=True)
class GammaSettings:
    """Few-step students that jump."""

    gamma: Share = 0.0
    """Fresh noise between the steps: 0 follows the trajectory, 1 is stochastic sampling."""
