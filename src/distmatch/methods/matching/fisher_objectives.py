"""Objectives of the Fisher family: SiD, SIM and Uni-Instruct, as the loop of the matching methods takes them.

All three differentiate teacher and fake score by their input, which costs a backward pass through both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distmatch.divergences import Divergence
from distmatch.methods.matching.fisher import (
    Distance,
    Scaling,
    omega,
    sid_loss,
    sim_loss,
    uni_instruct_loss,
)
from distmatch.methods.matching.objectives import denoising_critic, require_weight
from distmatch.methods.matching.view import CriticView, View
from distmatch.methods.setup import Info
from distmatch.methods.state import DistillState
from distmatch.ratio.normaliser import RatioNormaliser, effective_sample_size

RatioGradient = Literal["discriminator", "scores", "none"]


class _ThroughInputs:
    """What the family shares."""

    through_inputs = True

    def critic_loss(self, view: CriticView, prediction: Tensor, state: DistillState) -> Tensor:
        """Denoising of the student's samples."""
        return denoising_critic(view, prediction, state)


@dataclass(frozen=True)
class SiD(_ThroughInputs):
    """Score identity distillation (arXiv 2404.04057).

    Attributes:
        alpha: 1/2 is the exact Fisher divergence; at 1 its biased term is gone; the authors go on to 1.2.
        scaling: As for :func:`~distmatch.methods.matching.fisher.omega`.
    """

    alpha: float = 1.2
    scaling: Scaling = "dmd2"
    needs_ratio = False

    def gradient(self, view: View, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of :func:`~distmatch.methods.matching.fisher.sid_loss`."""
        loss = sid_loss(view.teacher, view.fake, view.x0, view.sigma, alpha=self.alpha, scaling=self.scaling)
        return _differentiated(loss, view, self.scaling)


@dataclass(frozen=True)
class SIM(_ThroughInputs):
    """Score implicit matching (arXiv 2410.16794).

    Attributes:
        distance: As for :func:`~distmatch.methods.matching.fisher.distance_slope`.
        c: Where the distance turns from quadratic to linear.
        scaling: As for :func:`~distmatch.methods.matching.fisher.sim_loss`.
    """

    distance: Distance = "huber"
    c: float = 0.1
    scaling: Scaling = "dmd2"
    needs_ratio = False

    def gradient(self, view: View, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of :func:`~distmatch.methods.matching.fisher.sim_loss`."""
        loss = sim_loss(
            view.teacher,
            view.fake,
            view.x0,
            view.sigma,
            distance=self.distance,
            c=self.c,
            scaling=self.scaling,
        )
        return _differentiated(loss, view, self.scaling)


@dataclass(frozen=True)
class UniInstruct(_ThroughInputs):
    """The gradient of any f-divergence by its expansion over noise levels (arXiv 2505.20755).

    The weights of all three terms are divided by the batch mean of h, as in f-distill.

    Attributes:
        divergence: Whose h weights the terms.
        ratio_gradient: Where the gradient of log r in h(r) comes from. ``discriminator``: from its logit.
            ``scores``: it is s_p - s_q, which both networks know already. ``none``: a biased gradient.
        warmup: Steps of the run before which the weights are those of r = 1 in SIM: the discriminator learns
            first.
        scaling: As for :func:`~distmatch.methods.matching.fisher.omega`.
    """

    divergence: Divergence
    ratio_gradient: RatioGradient = "discriminator"
    warmup: int = 0
    scaling: Scaling = "dmd2"
    needs_ratio = True

    def __post_init__(self) -> None:
        require_weight(self.divergence)

    def gradient(self, view: View, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient of :func:`~distmatch.methods.matching.fisher.uni_instruct_loss`."""
        normaliser = state.normaliser
        if view.log_r is None or view.all_log_r is None or normaliser is None:
            raise RuntimeError("Uni-Instruct was given no ratio")
        if state.step < self.warmup:
            loss = sim_loss(
                view.teacher, view.fake, view.x0, view.sigma, distance="squared", scaling=self.scaling
            )
            return _differentiated(loss, view, self.scaling)
        weights = self.divergence.weight(view.all_log_r)
        size = weights.mean().clamp_min(1e-12)
        loss = uni_instruct_loss(
            view.teacher,
            view.fake,
            view.x0,
            view.x,
            view.sigma,
            self._log_r(view, normaliser),
            self.divergence,
            scaling=self.scaling,
        )
        gradient, info = _differentiated(loss / size, view, self.scaling)
        normaliser.record(self.divergence.weight(view.log_r) / size, view.quantile)
        return gradient, info | {"ess": effective_sample_size(weights)}

    def _log_r(self, view: View, normaliser: RatioNormaliser) -> Tensor:
        """The normalised log ratio with the gradient that was asked for; zero where it is clipped."""
        log_r = view.log_r
        if log_r is None or view.logit is None:
            raise RuntimeError("Uni-Instruct was given no ratio")
        if self.ratio_gradient == "none":
            return log_r
        if self.ratio_gradient == "discriminator":
            free = (log_r.abs() < normaliser.config.clip) & (view.logit.detach().abs() < normaliser.RAW_LIMIT)
            slope = (view.logit - view.logit.detach()).to(log_r.dtype)
        else:
            free = log_r.abs() < normaliser.config.clip
            push = (view.teacher - view.fake).detach().flatten(1) / view.sigma[:, None] ** 2
            slope = (push * (view.x - view.x.detach()).flatten(1)).sum(1).to(log_r.dtype)
        return log_r + torch.where(free, slope, torch.zeros_like(slope))


def _differentiated(loss: Tensor, view: View, scaling: Scaling) -> tuple[Tensor, Info]:
    """The gradient of a loss (B,) by the samples, and what to log of it.

    The loss itself measures no progress: its mean is zero for SIM and forward KL and negative for SiD with
    alpha > 1. ``score_gap``, the weighted |D_p - D_q|^2 of an element, does.
    """
    # The adversarial term may still go through the same pass.
    (gradient,) = torch.autograd.grad(loss.sum(), view.x0, retain_graph=view.logit is not None)
    with torch.no_grad():
        square = (view.teacher - view.fake).float().square().flatten(1).mean(1)
        gap = (omega(view.teacher, view.x0, view.sigma, scaling) * square).mean()
    return gradient, {"loss_student": loss.detach().sum() / view.x0.numel(), "score_gap": gap}
