"""What is known of a method before it runs: needs, limits, defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Need = Literal["no", "optional", "needed"]

CRITIC_SETTINGS = (
    *("critic_steps", "order", "warmup_steps", "lr_critic"),
    *("noise_low", "noise_high", "noise_rho", "scaling"),
    *("noise_law", "critic_law", "noise_mean", "noise_std"),
)
"""Settings of DistillConfig that only methods with a fake score read."""
RATIO_SETTINGS = (
    *("lr_ratio", "gan_weight", "r1", "ratio_features", "joint_weight"),
    *("ratio_bins", "ratio_memory", "ratio_min_count", "ratio_clip"),
)
"""Settings of DistillConfig that only methods with a discriminator read."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named method.

    Attributes:
        name: What the user types.
        family: ``matching``, ``consistency``, ``kernel`` or ``transport``: the code that carries it out.
        summary: One line for help texts.
        citation: Authors, year and arXiv number.
        limits: What it cannot do, in a sentence.
        data: Whether it needs real data.
        critic: Whether a fake score is trained beside the student.
        weighted: Whether a density ratio weights its gradient.
        adversarial: Whether an adversarial term is part of it.
        teacher_gradient: Whether gradients flow through the teacher's input: more memory and time.
        forward_mode: Whether it needs forward-mode derivatives of the student.
        divergences: ``any``; a name; or '' for a method that minimises no f-divergence.
        default_divergence: Of those with ``any``.
        uses: Further settings of other groups that it reads, beyond those of its family and its flags; and
            those of its family that only methods read which name them here.
        ignores: Further settings that all methods share and that it does not read.
        defaults: Its own default values of settings, by field name.
    """

    name: str
    family: Literal["matching", "consistency", "kernel", "transport"]
    summary: str
    citation: str
    limits: str = ""
    data: Need = "needed"
    critic: bool = True
    weighted: bool = False
    adversarial: bool = False
    teacher_gradient: bool = False
    forward_mode: bool = False
    divergences: str = ""
    default_divergence: str = "js"
    uses: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """What it needs, for tables."""
        names = ("data", "critic", "weighted", "adversarial", "teacher_gradient", "forward_mode")
        return {name: getattr(self, name) for name in names}
