"""The state of a distillation: exactly what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.files import load_into
from distmatch.methods.start import Network
from distmatch.methods.student import Student
from distmatch.nets.ema import EMA
from distmatch.ratio.normalizer import RatioNormalizer


@dataclass
class DistillState:
    """Everything a step reads and changes.

    Attributes:
        student: The generator being trained.
        average: Moving average of its network; what is sampled and saved.
        optimizers: ``student`` and, where there are such networks, ``fake``, ``ratio`` and some of ``extra``.
        generator: The random stream of the steps.
        ratio_generator: The stream of the discriminator's own noise. It is apart so that training a
            discriminator changes nothing else: reverse KL with one and without one are the same to the bit.
        fake: The fake score (critic), which tracks the student's distribution; None without one.
        discriminator: Gives log r; None when the method needs no ratio and no adversarial term.
        normalizer: Running means of the ratio by noise bin; None without a ratio.
        extra: Further networks of a method, by name: target averages, recorded teachers.
        memory: Further tensors of a method, by name; what a step replaces is kept here.
        step: Steps done.
        updates: Student updates done.
    """

    student: Student
    average: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    ratio_generator: torch.Generator
    fake: Network | None = None
    discriminator: nn.Module | None = None
    normalizer: RatioNormalizer | None = None
    extra: dict[str, nn.Module] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    updates: int = 0

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        named = {
            "student": self.student.denoiser,
            "average": self.average.module,
            "fake": self.fake,
            "ratio": self.discriminator,
            **self.extra,
        }
        return {name: module for name, module in named.items() if module is not None}

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "average_rest": self.average.rest_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "normalizer": self.normalizer.state_dict() if self.normalizer is not None else {},
            "memory": dict(self.memory),
            "generator": self.generator.get_state(),
            "ratio_generator": self.ratio_generator.get_state(),
            "step": self.step,
            "updates": self.updates,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restores a state of the same configuration.

        Raises:
            UserError: The networks are of another architecture.
        """
        for name, module in self.modules().items():
            load_into(module, tree["modules"].get(name, {}), f"network '{name}' of the checkpoint")
        self.average.load_rest(tree.get("average_rest", {}))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(tree["optimizers"][name])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(tree["normalizer"])
        device = self.generator.device
        self.memory = {name: tensor.to(device) for name, tensor in tree.get("memory", {}).items()}
        self.generator.set_state(tree["generator"].cpu())
        self.ratio_generator.set_state(tree["ratio_generator"].cpu())
        self.step, self.updates = tree["step"], tree["updates"]
