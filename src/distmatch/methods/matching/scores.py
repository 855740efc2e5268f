"""The scores at a batch of noised samples, and what an objective makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.methods.context import Info
from distmatch.methods.state import DistillState


@dataclass(frozen=True)
class Scores:
    """Noised samples of the student and the predictions of all networks for them: a batch, or a part of one.

    All lengths, levels among them, are in a unit in which the data have a standard deviation of 1/2.

    Attributes:
        x0: Clean samples of the student, (B, *shape): a leaf of the graph.
        noise: The standard normal noise on them, (B, *shape).
        sigma: Noise levels (B,).
        x: x0 + sigma noise.
        teacher: D_p(x), (B, *shape); differentiable in ``x0`` for objectives with ``through_inputs``.
        fake: D_q(x), likewise.
        logit: The discriminator's raw log ratio, (B,), differentiable in ``x0`` for the adversarial term and
            for objectives with ``through_inputs``; None without a discriminator.
        quantile: Quantile of each noise level in the noise distribution, (B,), in [0, 1].
        log_r: Normalized and clipped log p/q, (B,), detached; None for objectives without a ratio.
        weight_scale: The running mean of h(r), scalar: what weights are divided by; None like ``log_r``.
        conditioning: What the samples are conditioned on.
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
    conditioning: Conditioning


@dataclass(frozen=True)
class NoisedSamples:
    """What the fake score learns from: noised samples of the student.

    Attributes:
        x0: Clean samples of the student, (B, *shape).
        sigma: Noise levels (B,).
        x: The samples noised to these levels.
        conditioning: What the samples are conditioned on.
    """

    x0: Tensor
    sigma: Tensor
    x: Tensor
    conditioning: Conditioning


class MatchingObjective(Protocol):
    """The gradient at the student's samples, and the loss of the fake score.

    Attributes:
        needs_ratio: Whether it reads ``log_r``.
        through_inputs: Whether it differentiates teacher, fake score and discriminator with respect to their
            input. If not, it receives detached tensors of the whole batch at once.
    """

    @property
    def needs_ratio(self) -> bool:
        """Whether ``log_r`` is wanted."""
        ...

    @property
    def through_inputs(self) -> bool:
        """Whether the scores must be differentiable in ``x0``."""
        ...

    def gradient(self, scores: Scores, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of each sample's loss with respect to its ``x0``, (B, *shape), detached.

        In float32 or better. The loop divides it by the number of elements of the whole batch.
        """
        ...

    def fake_score_loss(self, samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
        """The loss of the fake score for each sample, (B,)."""
        ...


class StudentTerm(Protocol):
    """A further loss of the student, in addition to the objective.

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

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds its gradient to those of the student's parameters; returns what to log."""
        ...
