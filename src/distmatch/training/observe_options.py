"""The options of training from observations alone. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from distmatch.base.rules import Count, NotNegative, Rule

Kind = Literal["mask", "blur"]
_KINDS: tuple[Kind, ...] = ("mask", "blur")


def forward_model(text: str) -> tuple[Kind, float] | None:
    """Kind and number of a forward model, of ``"mask:0.5"`` or ``"blur:0.7"``; None for other texts."""
    name, _, rest = text.partition(":")
    kind = next((known for known in _KINDS if known == name), None)
    try:
        number = float(rest)
    except ValueError:
        return None
    if kind is None or not 0 < number < (1 if kind == "mask" else math.inf):
        return None
    return kind, number


ForwardModel = Annotated[
    str,
    Rule(
        "must be mask:SHARE, the share that is hidden, above 0 and below 1, or blur:WIDTH in pixels, above 0",
        lambda text: text == "" or forward_model(text) is not None,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ObserveSettings:
    """What is known of each sample."""

    observe: ForwardModel = ""
    """Learn the samples from observations of them alone (docs/observations.md). mask:0.5: each number or
    pixel is hidden with this probability, others in each sample; blur:0.7: images are blurred by a Gaussian
    of this width in pixels. Observations are made of the data once, and the data not used again."""
    observe_noise: NotNegative = 0.0
    """Standard deviation of the noise in the observations, in model units."""
    observe_given: bool = False
    """The data are observations already: make none. With mask, condition_seen of an .npz says what is
    seen."""
    observe_every: Count = 500
    """Steps after which the observations are completed anew, by the model as it is then."""
