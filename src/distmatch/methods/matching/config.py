"""Settings of the methods with a fake score. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """What single methods with a fake score have of their own."""

    sid_alpha: float = 1.2
    """SiD's alpha: 0.5 is the exact Fisher divergence, 1 leaves its biased half out, 1.2 goes beyond. Lower
    it (1, then 0.5) where training is unstable."""
    sim_distance: Literal["huber", "squared", "absolute"] = "huber"
    """SIM's distance between scores: pseudo-Huber, squared (SiD with alpha 1), or absolute by element."""
    sim_c: float = 0.3
    """Where SIM's distance turns from quadratic to linear, as a share of the typical denoising error."""
    ratio_gradient: Literal["discriminator", "scores", "none"] = "discriminator"
    """Where Uni-Instruct takes the gradient of log r from: the discriminator, the difference of the scores,
    which it is, or nowhere, which biases the spread of the student."""
    ratio_warmup: int = 200
    """Steps of the run before which Uni-Instruct does not use the ratio (plain SIM)."""
    backtrack: int = 0
    """Recorded copies of the teacher on its way to the untrained student, which serve as first targets in
    reverse order (DisBack); 0 records none."""
    backtrack_degrade_steps: int = 0
    """Critic steps from one recorded copy to the next; 0 takes 40, or a tenth of the run for all if less."""
    backtrack_interval: int = 0
    """Student updates towards each recorded copy; 0 takes 50, or a third of all updates together if less."""
    pairs: int = 4096
    """Pairs of noise and teacher sample that DMD's student regresses on, 35 network calls each."""
    pair_steps: int = 18
    """Steps of Heun's method for a pair."""
    pair_weight: float = 0.25
    """Weight of the regression on pairs beside the score difference (dmd)."""
    pair_loss: Literal["squared", "huber"] = "squared"
    """Distance to a pair's sample: mean square, or pseudo-Huber, in pixels (DMD takes LPIPS, a download)."""
    pair_c: float = 0.1
    """Where the pseudo-Huber loss of a pair turns from quadratic to linear, as a share of sigma_data."""

    def __post_init__(self) -> None:
        if not 0 <= self.sid_alpha < math.inf:
            raise UserError("--sid-alpha must not be negative", got=self.sid_alpha, expected="0.5 to 1.2")
        if not 0 < self.sim_c < math.inf:
            raise UserError("--sim-c must be positive", got=self.sim_c, expected="for example 0.3")
        for name in ("pairs", "pair_steps", "pair_weight", "pair_c"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be positive", got=getattr(self, name))
        for name in ("ratio_warmup", "backtrack", "backtrack_degrade_steps", "backtrack_interval"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative", got=getattr(self, name))
