"""How a network is optimized, as settings of everything that trains one. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmatch.base.rules import CountOrNone, Decay, NotNegative, Positive, check_rules


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer."""

    lr: Positive = 5e-4
    """Learning rate; of the student, where several networks learn."""
    lr_decay: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run, after lr_rampup steps of linear warm-up."""
    lr_rampup: CountOrNone = 100
    """Steps of linear learning-rate warm-up."""
    beta1: Decay = 0.9
    """First Adam moment decay."""
    beta2: Decay = 0.99
    """Second Adam moment decay."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    grad_clip: NotNegative = 1.0
    """Largest gradient norm of each network; 0 leaves gradients alone."""

    def __post_init__(self) -> None:
        check_rules(self)
