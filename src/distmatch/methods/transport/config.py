"""Settings of the transport family. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """What the transport to stored points has of its own."""

    bank: int = 512
    """Latents of the teacher that noise is mapped to, for each class. No more different ones can come out."""
    bank_steps: int = 18
    """Heun steps of the teacher from its largest noise level down to the bank's, --student-sigma."""
    cell_draws: int = 10
    """Draws of noise for each latent and step, from which the sizes of the cells are estimated."""
    doublings: int = 3
    """Times that the number of draws doubles over the run, at even intervals."""
    blend: float = 0.0
    """Width of the seam, in standard deviations of the noise, in which the two nearest latents are mixed; 0
    never mixes."""
    blend_angle: float = 0.7
    """Pairs of latents whose angle is above this share of the range of angles are never mixed."""

    def __post_init__(self) -> None:
        for name in ("bank", "bank_steps", "cell_draws"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1", got=getattr(self, name))
        if not 0 <= self.doublings <= 10:
            raise UserError("--doublings is out of range", got=self.doublings, expected="0 to 10")
        if not 0 <= self.blend < math.inf:
            raise UserError("--blend must not be negative", got=self.blend)
        if not 0 <= self.blend_angle <= 1:
            raise UserError("--blend-angle must be in [0, 1]", got=self.blend_angle)
