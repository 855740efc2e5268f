"""The state of a distillation: exactly what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.methods.initialization import Network
from distmatch.methods.student import Student
from distmatch.nets.shared import adapted_of, fingerprint
from distmatch.nets.training_state import TrainingState, current
from distmatch.ratio.normalizer import RatioNormalizer


@dataclass(kw_only=True)
class DistillState(TrainingState):
    """Everything a step reads and changes. The average is that of the student's network.

    The optimizers are ``student`` and, where there are such networks, ``fake``, ``ratio`` and some of
    ``extra``.

    Attributes:
        student: The generator being trained.
        ratio_generator: The stream of the discriminator's own noise. It is apart so that training a
            discriminator changes nothing else: reverse KL with one and without one are the same to the bit.
        fake_score: The fake score, which tracks the student's distribution; None without one.
        discriminator: Gives log r; None when the method needs no ratio and no adversarial term.
        normalizer: Running means of the ratio by noise bin; None without a ratio.
        extra: Further networks of a method, by name: target averages, recorded teachers.
        updates: Student updates done.
    """

    student: Student
    ratio_generator: torch.Generator
    fake_score: Network | None = None
    discriminator: nn.Module | None = None
    normalizer: RatioNormalizer | None = None
    extra: dict[str, nn.Module] = field(default_factory=dict)
    updates: int = 0

    @cached_property
    def base(self) -> str:
        """The sha256 of the weights that its networks share and that no checkpoint holds; '' without any."""
        network = self.student.denoiser
        return fingerprint(network) if adapted_of(network) is not None else ""

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        named = {
            "student": self.student.denoiser,
            **super().modules(),
            "fake": self.fake_score,
            "ratio": self.discriminator,
            **self.extra,
        }
        return {name: module for name, module in named.items() if module is not None}

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            **super().state_dict(),
            **({"base": self.base} if self.base else {}),
            "normalizer": self.normalizer.state_dict() if self.normalizer is not None else {},
            "ratio_generator": self.ratio_generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restores a state of the same configuration.

        Raises:
            UserError: The networks are others, of another architecture, or on another base.
        """
        tree = current(tree)
        if (saved := tree.get("base", "")) != self.base:
            raise UserError(
                "the checkpoint is of adapters on another base, or of networks without one",
                got=f"a base of sha256 {saved}" if saved else "networks that were trained in full",
                expected=f"a base of sha256 {self.base}" if self.base else "networks trained in full",
                fix="resume with the teacher and the --train that the run started with",
            )
        super().load_state_dict(tree)
        if self.normalizer is not None:
            self.normalizer.load_state_dict(tree["normalizer"])
        self.ratio_generator.set_state(tree["ratio_generator"].cpu())
        self.updates = tree["updates"]
