"""The settings of each method with a fake score. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmatch.base.rules import Count, CountOrNone, NotNegative, Positive
from distmatch.methods.settings import (
    AdversarialSettings,
    FakeScoreSettings,
    NoiseDistributionSettings,
    RatioSettings,
)


@dataclass(frozen=True, kw_only=True)
class BacktrackSettings(NoiseDistributionSettings):
    """Recorded copies of the teacher as first targets (DisBack)."""

    backtrack: CountOrNone = 0
    """Recorded copies of the teacher on its way to the untrained student, which serve as first targets in
    reverse order (DisBack); 0 records none."""
    backtrack_degrade_steps: CountOrNone = 0
    """Critic steps from one recorded copy to the next; 0 takes 40, or a tenth of the run for all if less."""
    backtrack_interval: CountOrNone = 0
    """Student updates towards each recorded copy; 0 takes 50, or a third of all updates together if less."""


@dataclass(frozen=True, kw_only=True)
class FDistillSettings(RatioSettings, BacktrackSettings):
    """What f-distill has of its own."""


@dataclass(frozen=True, kw_only=True)
class DMD2Settings(AdversarialSettings, BacktrackSettings):
    """What dmd2 has of its own."""


@dataclass(frozen=True, kw_only=True)
class DisBackSettings(DMD2Settings):
    """What disback has of its own."""

    backtrack: CountOrNone = 5


@dataclass(frozen=True, kw_only=True)
class DiffInstructSettings(BacktrackSettings):
    """What diff-instruct has of its own."""


@dataclass(frozen=True, kw_only=True)
class DMDSettings(BacktrackSettings):
    """What dmd has of its own."""

    fake_score_steps: Count = 1
    pairs: Count = 4096
    """Pairs of noise and teacher sample that DMD's student regresses on, 35 network calls each."""
    pair_steps: Count = 18
    """Steps of Heun's method for a pair."""
    pair_weight: Positive = 0.25
    """Weight of the regression on pairs beside the score difference."""
    pair_loss: Literal["squared", "huber"] = "squared"
    """Distance to a pair's sample: mean square, or pseudo-Huber, in pixels (DMD takes LPIPS, a download)."""
    pair_c: Positive = 0.1
    """Where the pseudo-Huber loss of a pair turns from quadratic to linear, as a share of sigma_data."""


@dataclass(frozen=True, kw_only=True)
class SiDSettings(BacktrackSettings):
    """What sid has of its own."""

    sid_alpha: NotNegative = 1.2
    """SiD's alpha: 0.5 is the exact Fisher divergence, 1 leaves its biased half out, 1.2 goes beyond. Lower
    it (1, then 0.5) where training is unstable."""


@dataclass(frozen=True, kw_only=True)
class SiDASettings(AdversarialSettings, SiDSettings):
    """What sida has of its own."""

    sid_alpha: NotNegative = 1.0
    ratio_features: Literal["auto", "teacher", "fake", "own"] = "fake"


@dataclass(frozen=True, kw_only=True)
class SIMSettings(BacktrackSettings):
    """What sim has of its own."""

    sim_distance: Literal["huber", "squared", "absolute"] = "huber"
    """SIM's distance between scores: pseudo-Huber, squared (SiD with alpha 1), or absolute by element."""
    sim_c: Positive = 0.3
    """Where SIM's distance turns from quadratic to linear, as a share of the typical denoising error."""


@dataclass(frozen=True, kw_only=True)
class UniInstructSettings(RatioSettings, BacktrackSettings):
    """What uni-instruct has of its own."""

    ratio_gradient: Literal["discriminator", "scores", "none"] = "discriminator"
    """Where Uni-Instruct takes the gradient of log r from: the discriminator, the difference of the scores,
    which it is, or nowhere, which biases the spread of the student."""
    ratio_warmup: CountOrNone = 200
    """Steps of the run before which Uni-Instruct does not use the ratio (plain SIM)."""


@dataclass(frozen=True, kw_only=True)
class MomentMatchingSettings(FakeScoreSettings):
    """What moment-matching has of its own."""
