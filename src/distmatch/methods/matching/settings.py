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
    """Recorded copies of the teacher while it is adapted to the untrained student, used as the first targets
    in reverse order (DisBack); 0 records none."""
    backtrack_degrade_steps: CountOrNone = 0
    """Fake score steps from one recorded copy to the next; 0: 40, or a tenth of the run in total if less."""
    backtrack_interval: CountOrNone = 0
    """Student updates per recorded copy; 0: 50, or a third of all updates in total if less."""


@dataclass(frozen=True, kw_only=True)
class FDistillSettings(RatioSettings, BacktrackSettings):
    """Settings of f-distill."""


@dataclass(frozen=True, kw_only=True)
class DMD2Settings(AdversarialSettings, BacktrackSettings):
    """Settings of dmd2."""


@dataclass(frozen=True, kw_only=True)
class DisBackSettings(DMD2Settings):
    """Settings of disback."""

    backtrack: CountOrNone = 5


@dataclass(frozen=True, kw_only=True)
class DiffInstructSettings(BacktrackSettings):
    """Settings of diff-instruct."""


@dataclass(frozen=True, kw_only=True)
class DMDSettings(BacktrackSettings):
    """Settings of dmd."""

    fake_score_steps: Count = 1
    pairs: Count = 4096
    """Pairs of noise and teacher sample for DMD's regression, 35 network calls each, 70 with guidance: the
    default is for small teachers. They are made before the first step."""
    pair_steps: Count = 18
    """Steps of Heun's method per pair."""
    pair_weight: Positive = 0.25
    """Weight of the regression on pairs relative to the score difference."""
    pair_loss: Literal["squared", "huber"] = "squared"
    """Distance to a pair's sample: mean square, or pseudo-Huber, in pixels (DMD uses LPIPS, a download)."""
    pair_c: Positive = 0.1
    """Where the pseudo-Huber loss of a pair changes from quadratic to linear, relative to sigma_data."""

    @property
    def pair_calls(self) -> int:
        """Network calls for all pairs: two for each step of Heun's but the last, each twice with guidance.

        With an interval of guidance they are fewer.
        """
        return self.pairs * (2 * self.pair_steps - 1) * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True, kw_only=True)
class SiDSettings(BacktrackSettings):
    """Settings of sid."""

    sid_alpha: NotNegative = 1.2
    """SiD's alpha: 0.5 is the exact Fisher divergence, 1 omits its biased half, 1.2 subtracts part of it.
    Lower it (1, then 0.5) where training is unstable."""


@dataclass(frozen=True, kw_only=True)
class SiDASettings(AdversarialSettings, SiDSettings):
    """Settings of sida."""

    sid_alpha: NotNegative = 1.0
    ratio_features: Literal["auto", "teacher", "fake", "own"] = "fake"


@dataclass(frozen=True, kw_only=True)
class SIMSettings(BacktrackSettings):
    """Settings of sim."""

    sim_distance: Literal["huber", "squared", "absolute"] = "huber"
    """SIM's distance between scores: pseudo-Huber, squared (SiD with alpha 1), or absolute by element."""
    sim_c: Positive = 0.3
    """Where SIM's distance changes from quadratic to linear, relative to the typical denoising error."""


@dataclass(frozen=True, kw_only=True)
class UniInstructSettings(RatioSettings, BacktrackSettings):
    """Settings of uni-instruct."""

    ratio_gradient: Literal["discriminator", "scores", "none"] = "discriminator"
    """Source of Uni-Instruct's gradient of log r: the discriminator, the difference of the scores (its exact
    value), or none, which biases the standard deviation of the student."""
    ratio_warmup: CountOrNone = 200
    """First steps of the run in which Uni-Instruct does not use the ratio (plain SIM)."""


@dataclass(frozen=True, kw_only=True)
class MomentMatchingSettings(FakeScoreSettings):
    """Settings of moment-matching."""
