"""Objectives of the Fisher family: SiD, SIM and Uni-Instruct, as the loop of the matching methods takes them.

All three differentiate teacher and fake score by their input, which costs a backward pass through both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distmatch.divergences import Divergence
from distmatch.losses import difference_weight, log_ratio_slope, sid_loss, sim_loss, uni_instruct_loss
from distmatch.losses.fisher import Distance
from distmatch.losses.matching import Scaling
from distmatch.methods.context import Info
from distmatch.methods.matching.score import fake_score_denoising, require_weight
from distmatch.methods.matching.scores import NoisedSamples, Scores
from distmatch.methods.state import DistillState

RatioGradient = Literal["discriminator", "scores", "none"]


class _ThroughInputs:
    """What the family shares: how a loss becomes a gradient, and the loss of the fake score."""

    through_inputs = True
    scaling: Scaling

    def loss(self, scores: Scores, state: DistillState) -> Tensor:
        """The loss of each sample, (B,), as a function of the tensors in a scores."""
        raise NotImplementedError

    def gradient(self, scores: Scores, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of the loss by the samples, through all networks, and what to log of it.

        The loss itself measures no progress: its mean is zero for SIM and forward KL and negative for SiD
        with alpha > 1. ``score_gap``, the weighted |D_p - D_q|^2 of an element, does.
        """
        leaves = _leaves(scores)
        loss = self.loss(leaves, state)
        loss.sum().backward()
        gap = (leaves.teacher - leaves.fake).detach().float().square().flatten(1).mean(1)
        gap = difference_weight(leaves.teacher, leaves.x0, leaves.sigma, self.scaling) * gap
        info = {"loss_student": loss.detach().sum() / leaves.x0.numel(), "score_gap": gap.mean()}
        return _through_networks(scores, leaves), info

    def fake_score_loss(self, samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
        """Denoising of the student's samples."""
        return fake_score_denoising(samples, prediction, state)


@dataclass(frozen=True)
class SiD(_ThroughInputs):
    """Score identity distillation (arXiv 2404.04057).

    Attributes:
        alpha: 1/2 is the exact Fisher divergence; at 1 its biased term vanishes; the authors use 1.2.
        scaling: As for :func:`~distmatch.losses.difference_weight`.
    """

    alpha: float = 1.2
    scaling: Scaling = "dmd2"
    needs_ratio = False

    def loss(self, scores: Scores, state: DistillState) -> Tensor:
        """As :func:`~distmatch.losses.sid_loss`."""
        p, q, x0, sigma = scores.teacher, scores.fake, scores.x0, scores.sigma
        return sid_loss(p, q, x0, sigma, alpha=self.alpha, scaling=self.scaling)


@dataclass(frozen=True)
class SIM(_ThroughInputs):
    """Score implicit matching (arXiv 2410.16794).

    Attributes:
        distance: As for :func:`~distmatch.losses.fisher.distance_slope`.
        c: Where the distance turns from quadratic to linear.
        scaling: As for :func:`~distmatch.losses.sim_loss`.
    """

    distance: Distance = "huber"
    c: float = 0.3
    scaling: Scaling = "dmd2"
    needs_ratio = False

    def loss(self, scores: Scores, state: DistillState) -> Tensor:
        """As :func:`~distmatch.losses.sim_loss`."""
        p, q, x0, sigma = scores.teacher, scores.fake, scores.x0, scores.sigma
        return sim_loss(p, q, x0, sigma, distance=self.distance, c=self.c, scaling=self.scaling)


@dataclass(frozen=True)
class UniInstruct(_ThroughInputs):
    """The gradient of any f-divergence by its expansion over noise levels (arXiv 2505.20755).

    The weights of all three terms are divided by the running mean of h, as in f-distill.

    Attributes:
        divergence: Whose h weights the terms.
        ratio_gradient: Where the gradient of log r in h(r) comes from. ``discriminator``: from its logit.
            ``scores``: it is s_p - s_q, which the two networks already give. ``none``: a biased gradient.
        warmup: Steps of the run before which it is SIM with the squared distance, while the discriminator
            learns.
        scaling: As for :func:`~distmatch.losses.difference_weight`.
    """

    divergence: Divergence
    ratio_gradient: RatioGradient = "discriminator"
    warmup: int = 0
    scaling: Scaling = "dmd2"
    needs_ratio = True

    def __post_init__(self) -> None:
        require_weight(self.divergence)

    def loss(self, scores: Scores, state: DistillState) -> Tensor:
        """As :func:`~distmatch.losses.uni_instruct_loss`, or of SIM while it warms up."""
        p, q, x0, sigma = scores.teacher, scores.fake, scores.x0, scores.sigma
        if state.step < self.warmup:
            return sim_loss(p, q, x0, sigma, distance="squared", scaling=self.scaling)
        log_r = self._log_r(scores, state)
        loss = uni_instruct_loss(p, q, x0, scores.x, sigma, log_r, self.divergence, scaling=self.scaling)
        if scores.weight_scale is None:
            raise RuntimeError("Uni-Instruct received no ratio")
        return loss / scores.weight_scale.to(loss.dtype)

    def _log_r(self, scores: Scores, state: DistillState) -> Tensor:
        """The normalized log ratio with the requested gradient; zero where it is clipped."""
        log_r, logit, normalizer = scores.log_r, scores.logit, state.normalizer
        if log_r is None or logit is None or normalizer is None:
            raise RuntimeError("Uni-Instruct received no ratio")
        if self.ratio_gradient == "none":
            return log_r
        free = (log_r.abs() < normalizer.config.clip) & (logit.detach().abs() < normalizer.RAW_LIMIT)
        if self.ratio_gradient == "discriminator":
            slope = logit - logit.detach()
        else:
            slope = log_ratio_slope(scores.teacher, scores.fake, scores.x, scores.sigma)
        return log_r + torch.where(free, slope.to(log_r.dtype), 0.0)


def _leaves(scores: Scores) -> Scores:
    """The same tensors, each by itself."""
    names = ["x0", "x", "teacher", "fake"]
    if scores.logit is not None:
        names.append("logit")
    return replace(scores, **{name: getattr(scores, name).detach().requires_grad_() for name in names})


def _through_networks(scores: Scores, leaves: Scores) -> Tensor:
    """The gradient with respect to ``x0``, from those with respect to the leaves.

    The backward passes of teacher and fake score are two, not one: where the networks are equal, the parts
    then cancel to the last bit, and a student that has converged stays where it is.
    """
    shared = scores.logit is not None  # the adversarial term may still need the graph
    outputs, slopes = [scores.teacher], [leaves.teacher.grad]
    if scores.logit is not None and leaves.logit is not None and leaves.logit.grad is not None:
        outputs, slopes = [*outputs, scores.logit], [*slopes, leaves.logit.grad]
    (total,) = torch.autograd.grad(outputs, scores.x0, slopes, retain_graph=shared)
    (other,) = torch.autograd.grad(scores.fake, scores.x0, leaves.fake.grad, retain_graph=shared)
    total = total + other
    for leaf in (leaves.x0, leaves.x):
        total = total if leaf.grad is None else total + leaf.grad
    return total
