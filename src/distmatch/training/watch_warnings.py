"""What the measurements of a watch mean, and what helps. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distmatch.methods.method import Method

LOW_DIVERSITY = 0.5
"""Diversity over the teacher's, below which a falling one is a warning."""
NO_DIVERSITY = 0.1
"""The same, below which it is one in the second half of a run, falling or not."""
FEW_SAMPLES = 0.5
"""Vendi score over the teacher's, below which a falling one is a warning."""
SATURATED = 0.2
"""Share of values at the ends of the range, beyond the teacher's share."""
SOLID_IMAGES = 0.25
"""Share of images of one color, beyond the teacher's share."""
STATIC = 0.25
"""Change between frames over the teacher's."""
LAGGING = 2.0
"""Loss of the fake score on fresh samples over its training loss."""
FAR = 1.0
"""Energy distance to the teacher, in units of the teacher's spread."""
WORSE = 0.1
"""Part by which a value must be worse than the best one so far, to have become worse."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """When a measurement is a warning.

    Attributes:
        kind: The measurement.
        better: The better one of two values.
        crossed: Whether it is beyond its bound: a warning where it has become worse.
        message: What is wrong, in words.
        changes: What helps: the setting that a method must have, and the words.
        severe: Whether it is a warning in the second half of a run even where it has not become worse; by
            default where it is crossed.
    """

    kind: str
    better: Callable[[float, float], float]
    crossed: Callable[[Values], bool]
    message: Callable[[Values], str]
    changes: tuple[tuple[str, str], ...]
    severe: Callable[[Values], bool] | None = None

    def best(self, value: float, before: float) -> float:
        """The better one, where both are numbers."""
        return self.better(value, before) if math.isfinite(value) else before

    def warns(self, values: Values, best: Values, late: bool) -> bool:
        """Whether it is a warning now."""
        value = values[self.kind]
        before = best.get(self.kind, value)
        worse = self.better(value, before) != value
        worse &= abs(value - before) > WORSE * max(abs(value), abs(before))
        return (worse and self.crossed(values)) or (late and (self.severe or self.crossed)(values))


_LR = ("lr", "lower --lr")
_MORE_FAKE = ("fake_score_steps", "raise --fake-score-steps")
_FAKE_LR = ("lr_fake_score", "raise --lr-fake-score")
_GUIDANCE = ("guidance", "lower --guidance")
_DIVERGENCE = ("divergence", "use --divergence js or kl, which keep more modes than reverse_kl")
_GAN = ("gan_weight", "raise --gan-weight")

BOUNDS = (
    Bound(
        "diversity",
        max,
        lambda v: v["diversity"] < LOW_DIVERSITY,
        lambda v: (
            f"samples of one condition differ only {v['diversity']:.2f} times as much as the teacher's: "
            "the student gives nearly the same sample for every seed"
        ),
        (_LR, _MORE_FAKE, _DIVERGENCE, _GUIDANCE, _GAN),
        lambda v: v["diversity"] < NO_DIVERSITY,
    ),
    Bound(
        "vendi",
        max,
        lambda v: v["vendi"] < FEW_SAMPLES,
        lambda v: (
            f"the Vendi score of samples of one condition is only {v['vendi']:.2f} times the teacher's: "
            "the student gives few different samples"
        ),
        (_LR, _MORE_FAKE, _DIVERGENCE, _GUIDANCE, _GAN),
        lambda v: False,
    ),
    Bound(
        "energy",
        min,
        lambda v: v["energy"] > FAR,
        lambda v: (
            f"the energy distance between the student's samples and the teacher's is {v['energy']:.1f} "
            "times the mean distance between the teacher's: the student leads away from its teacher"
        ),
        (_LR, _MORE_FAKE, _GAN),
        lambda v: False,
    ),
    Bound(
        "solid",
        min,
        lambda v: v["solid"] > v["teacher_solid"] + SOLID_IMAGES,
        lambda v: (
            f"{v['solid']:.0%} of the student's images are one color, of the teacher's "
            f"{v['teacher_solid']:.0%}"
        ),
        (_LR, _MORE_FAKE, _GAN),
    ),
    Bound(
        "saturation",
        min,
        lambda v: v["saturation"] > v["teacher_saturation"] + SATURATED,
        lambda v: (
            f"{v['saturation']:.0%} of the student's values are at the ends of their range, of the "
            f"teacher's {v['teacher_saturation']:.0%}: its samples are over-saturated"
        ),
        (_GUIDANCE, _LR, _MORE_FAKE),
    ),
    Bound(
        "motion",
        max,
        lambda v: v["motion"] < STATIC,
        lambda v: (
            f"the student's videos change only {v['motion']:.2f} times as much from frame to frame as "
            "the teacher's: they are static"
        ),
        (_LR, _MORE_FAKE, _GUIDANCE, _GAN),
    ),
    Bound(
        "fake_score_lag",
        min,
        lambda v: v["fake_score_lag"] > LAGGING,
        lambda v: (
            f"the loss of the fake score on new samples of the student is {v['fake_score_lag']:.1f} "
            "times its training loss: it does not keep up with the student"
        ),
        (_MORE_FAKE, _FAKE_LR, _LR),
    ),
)
"""The measurements that can be warnings."""


def watch_warnings(
    values: Values, best: Values, method: Method, settings: Any, *, late: bool, kept: bool = False
) -> Iterator[tuple[str, str]]:
    """The kinds and texts of the warnings that measurements give.

    A student begins far from its teacher, so a value counts only if it is worse than the best one before it,
    or in the second half of a run. A training passes through states that look so: a watch reports what two
    measurements in succession find.

    Args:
        values: The measurements.
        best: The best values so far, by measurement.
        method: The method; only what it has is advised.
        settings: Its settings.
        late: Whether the second half of the run has begun.
        kept: Whether the best checkpoint is kept.
    """
    has = {name for name in vars(settings) if name != "guidance" or settings.guidance > 1}
    has |= {"divergence"} if method.divergences == "any" else set()
    for bound in BOUNDS:
        if bound.kind in values and bound.warns(values, best, late):
            helps = [text for name, text in bound.changes if name in has]
            helps += [] if kept else ["keep the best checkpoint with --keep-best energy"]
            yield bound.kind, f"{bound.message(values)}. What helps: {'; '.join(helps)}."
