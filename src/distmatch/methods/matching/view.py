"""What a student's objective may look at, and what it has to give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distmatch.data.batches import Batch
from distmatch.methods.setup import Info
from distmatch.methods.state import DistillState


@dataclass(frozen=True)
class View:
    """Samples of the student, noised, and what the networks say of them: a batch, or a part of one.

    All lengths, levels among them, are in a unit in which the data have a standard deviation of 1/2.

    Attributes:
        x0: Clean samples of the student, (B, *shape): a leaf that carries no history.
        noise: The standard normal noise on them, (B, *shape).
        sigma: Noise levels (B,).
        x: x0 + sigma noise.
        teacher: D_p(x), (B, *shape). It hangs on ``x0`` for objectives with ``through_inputs``.
        fake: D_q(x), likewise.
        logit: The discriminator's log ratio as it comes, (B,), hanging on ``x0`` where the objective
            differentiates; None without a discriminator.
        quantile: Where each level lies in the distribution of levels, (B,), in [0, 1].
        log_r: Normalised and clipped log p/q, (B,), detached; None for objectives without a ratio.
        weight_scale: The running mean of h(r), scalar: what weights are divided by; None like ``log_r``.
        labels: Classes (B,), or None.
    """

    x0: Tensor
    noise: Tensor
    sigma: Tensor
    x: Tensor
    teacher: Tensor
    fake: Tensor
    logit: Tensor | None
    quantile: Tensor
    log_r: Tensor | None
    weight_scale: Tensor | None
    labels: Tensor | None


class Objective(Protocol):
    """A gradient field at the student's samples, and the loss of the fake score.

    Attributes:
        needs_ratio: Whether it reads ``log_r``.
        through_inputs: Whether it differentiates teacher, fake score and discriminator by their input. If
            not, it is given detached tensors of the whole batch at once.
    """

    @property
    def needs_ratio(self) -> bool:
        """Whether ``log_r`` is wanted."""
        ...

    @property
    def through_inputs(self) -> bool:
        """Whether the view must hang on ``x0``."""
        ...

    def gradient(self, view: View, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of the loss of each sample by its ``x0``, (B, *shape), detached, float32 or better.

        The loop divides it by the number of elements of the whole batch.
        """
        ...

    def critic_loss(self, view: CriticView, prediction: Tensor, state: DistillState) -> Tensor:
        """The loss of the fake score for each sample, (B,)."""
        ...


@dataclass(frozen=True)
class CriticView:
    """What the fake score learns from.

    Attributes:
        x0: Clean samples of the student, (B, *shape).
        sigma: Noise levels (B,).
        x: The samples noised to these levels.
        labels: Classes (B,), or None.
    """

    x0: Tensor
    sigma: Tensor
    x: Tensor
    labels: Tensor | None


class StudentTerm(Protocol):
    """A further loss of the student, beside the objective.

    Attributes:
        needs_data: Whether it reads the real samples of a batch.
    """

    @property
    def needs_data(self) -> bool:
        """Whether ``batch.x`` is read."""
        ...

    def prepare(self, state: DistillState, seed: int) -> None:
        """Puts into a fresh state what the term needs."""
        ...

    def backward(self, state: DistillState, batch: Batch, labels: Tensor | None) -> Info:
        """Adds its gradient to those of the student's parameters; returns what to log."""
        ...
