"""The settings of the transport to stored points. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distmatch.base.rules import Count, CountOrNone, Decay, NotNegative, Positive, Share, between
from distmatch.methods.settings import Settings


@dataclass(frozen=True, kw_only=True)
class DPMOTSettings(Settings):
    """Settings of dpm-ot."""

    num_steps: Count = 5
    student_sigma: NotNegative = 1.4
    lr: Positive = 0.02
    lr_decay: Literal["constant", "cosine"] = "cosine"
    lr_rampup: CountOrNone = 0
    beta2: Decay = 0.999
    bank: Count = 512
    """Latents of the teacher that noise is mapped to, per class, which limits the diversity."""
    bank_steps: Count = 18
    """Heun steps of the teacher from its sigma_max down to the bank's sigma, --student-sigma."""
    cell_draws: Count = 10
    """Draws of noise per latent and step, to estimate the sizes of the cells."""
    doublings: Annotated[int, between(0, 10)] = 3
    """Times that the number of draws doubles over the run, at even intervals."""
    blend: NotNegative = 0.0
    """Distance from a border, in standard deviations of the noise, within which the two nearest latents are
    mixed; 0 never mixes."""
    blend_angle: Share = 0.7
    """Pairs of latents with an angle above this share of the range of angles are never mixed."""
