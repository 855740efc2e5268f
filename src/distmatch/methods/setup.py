"""What every method is built from, and what every method offers."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.divergences import Divergence
from distmatch.methods.config import DistillConfig
from distmatch.methods.consistency.config import ConsistencyConfig
from distmatch.methods.entries import PATH_START
from distmatch.methods.kernel.config import KernelConfig
from distmatch.methods.matching.config import MatchingConfig
from distmatch.methods.method import Method
from distmatch.methods.start import Draw
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.methods.transport.config import TransportConfig
from distmatch.nets.config import NetConfig
from distmatch.nets.optim import adam

Info = dict[str, Tensor]
"""What a step reports: scalars to average, lists to keep. Tensors, so that a step never waits."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A choice of teacher, method and settings that fit each other.

    Attributes:
        teacher: The frozen teacher, unguided.
        method: The method's entry in the table.
        divergence: For methods that take one; the others ignore it.
        config: Settings that several methods share.
        total_steps: Length of the run, for schedules.
        device: Where the networks live.
        bf16: Whether networks run under bfloat16 autocast.
        net: Network for student and critic when the teacher has none to copy; None chooses by shape.
        matching: Settings of the methods with a fake score.
        consistency: Settings of the consistency family.
        kernel: Settings of the kernel methods.
        transport: Settings of the transport methods.
    """

    teacher: Denoiser
    method: Method
    divergence: Divergence
    config: DistillConfig
    total_steps: int
    device: torch.device
    bf16: bool = False
    net: NetConfig | None = None
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)

    @property
    def first_level(self) -> float:
        """Where the student starts; a default that is above the levels of the teacher comes down to them.

        A default of a method of whole paths rises with the spread of wide data, which the noise must hide.
        """
        chosen, highest = self.config.student_sigma or self.teacher.sigma_max, self.teacher.sigma_max
        own = self.method.defaults.get("student_sigma", DistillConfig.student_sigma)
        if self.config.student_sigma != own:
            return chosen
        return min(chosen * max(1.0, self.teacher.sigma_data) if own == PATH_START else chosen, highest)

    def adam(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimiser of a network, with the shared settings."""
        cfg = self.config
        return adam(module.parameters(), lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that networks run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def parts(self, n: int) -> list[slice]:
        """The parts of a batch of ``n`` in which network passes are made, about equal."""
        count = max(1, min(self.config.accumulate, n))
        edges = [n * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


class Distiller(Protocol):
    """A method: ``state = init(...)``, then ``info = step(state, batch)``, in the end ``result(...)``."""

    @property
    def needs_data(self) -> bool:
        """Whether the batches must hold real samples."""
        ...

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step.

        Args:
            seed: Seed of the run.
            draw: Gives n clean real samples and their labels; needed only for a teacher without a network to
                copy, to which the first networks are fitted by regression. None on resuming.
        """
        ...

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One training step; changes ``state`` and returns what is worth logging (tensors, not synchronised).

        Args:
            state: From :meth:`init`.
            batch: Real samples and labels. The labels are also the student's.
        """
        ...

    def notes(self) -> dict[str, Any]:
        """What the log says once about this method: noise bins and the like."""
        ...

    def result(self, state: DistillState, info: dict[str, Any]) -> Student:
        """The student that the run ends with, on its averaged weights; ``info`` is saved with it."""
        ...


def averaged(state: DistillState, info: dict[str, Any]) -> Student:
    """The student on its averaged weights."""
    network: Any = state.average.module
    return state.student.around(network, state.student.levels, info)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the shape, dtype and device of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def noised(x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """``x + sigma eps`` for samples (B, ...) and levels (B,)."""
    return x + expand(sigma, x) * standard_normal(x, generator)


def part_of(values: Tensor | None, part: slice) -> Tensor | None:
    """A part of a batch that may be missing."""
    return None if values is None else values[part]
