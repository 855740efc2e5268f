"""sCM: continuous-time consistency models with a bounded tangent (Lu & Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import expand
from distmatch.interop import is_external
from distmatch.losses import flow_direction, scm_loss, scm_tangent, trigflow_speed, uncertainty_loss
from distmatch.methods.consistency.direct import (
    Draws,
    mean_backward,
    noised_draws,
    training_levels,
)
from distmatch.methods.consistency.pairs import teacher_says
from distmatch.methods.consistency.settings import RCMSettings, SCMSettings
from distmatch.methods.consistency.tangents import allow_forward_mode, choose_derivative, derivative_along
from distmatch.methods.context import Context, Info
from distmatch.methods.state import DistillState
from distmatch.nets.uncertainty import LearnedUncertainty


@dataclass
class TangentTerm:
    """The loss ``|F - sg F - g / (|g| + c)|^2``, a mean over elements, with a learned weight for each level.

    F is the network's output and g the tangent, so that the value of the loss is about 1 for every sample and
    says little; watch ``tangent``, the norm of g before it is bounded.

    Attributes:
        context: Teacher and settings.
        learned_weight: Whether levels are weighed as in sCM. A term that is added to another loss must not
            be: the weight grows to 1 / E[loss], without bound as students get better, and the other fades.
    """

    context: Context[SCMSettings] | Context[RCMSettings]
    learned_weight: bool = True
    jumps = False
    needs_data = True

    def __post_init__(self) -> None:
        self._guided = self.context.guided()
        self._how = choose_derivative(self.context.settings.tangent, self.context.copied)
        self._levels = training_levels(self.context, self.context.settings)

    def notes(self) -> dict[str, Any]:
        """How derivatives are taken."""
        return {"tangent": self._how}

    def prepare(self, state: DistillState, seed: int) -> None:
        """The learned weight, which starts at the prior alone."""
        if is_external(state.student.denoiser):
            allow_forward_mode(state.student.denoiser)
        if not self.learned_weight:
            return
        weight = LearnedUncertainty(self.context.unit).to(self.context.device)
        state.extra["uncertainty"] = weight
        state.optimizers["uncertainty"] = self.context.adam(weight, self.context.settings.lr)

    def warmth(self, step: int) -> float:
        """rho: share of the tangent that is the consistency function's, from 0 to 1 in the warm-up."""
        warmup = self.context.settings.tangent_warmup * self.context.total_steps
        return min(1.0, step / warmup) if warmup > 0 else 1.0

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters, and moves the learned weight."""
        sigma = self._levels(len(batch.x), state).to(batch.x.dtype)
        draws = noised_draws(self.context, state, batch, sigma)
        info = mean_backward(self.context, draws, lambda part: self.loss(state, part))
        if self.learned_weight:
            self.context.move(state, "uncertainty", self.context.settings.lr)
        return info

    def loss(self, state: DistillState, draws: Draws) -> tuple[Tensor, Info]:
        """The loss of each sample, (b,)."""
        student, sigma_data = state.student.denoiser, self.context.teacher.sigma_data
        sigma, conditioning = draws["sigma"], draws.conditioning
        y = draws["x0"] + expand(sigma, draws["x0"]) * draws["noise"]
        target = self._target(y, draws)
        speed = trigflow_speed(sigma, sigma_data)
        slope = flow_direction(y, target, sigma, speed)
        value, derivative = derivative_along(student, y, sigma, slope, speed, conditioning, how=self._how)
        tangent = scm_tangent(value, target, derivative, sigma, sigma_data, self.warmth(state.step))
        out = student(y, sigma, conditioning)
        error = scm_loss(out, tangent, sigma, sigma_data, c=self.context.settings.tangent_bound)
        said = {"tangent": tangent.flatten(1).norm(dim=1)}
        if not self.learned_weight:
            return error, said
        if self.context.settings.level_distribution == "log-normal":
            # The paper's prior weight 1 / tan t suits its own law of levels. With levels up to the student's
            # start it would hide those from the loss until the learned weight, which starts at 1, has grown.
            error = error * sigma_data / sigma
        # A tangent far shorter than the bound c makes the loss small, and its inverse a weight without limit:
        # on toys that ruins a student that has nearly arrived. So (1/2)^2 / D, the loss of a tangent of
        # length c, is added to the expected loss, of which the paper's longer tangents hardly take notice.
        least = torch.full_like(sigma, math.log(0.25 / math.prod(self.context.teacher.shape)))
        learned = torch.logaddexp(state.extra["uncertainty"](sigma), least)
        return uncertainty_loss(error, learned), said

    def _target(self, y: Tensor, draws: Draws) -> Tensor:
        """The denoiser of the flow that is followed; from data it is the clean sample itself."""
        own = self.context.settings
        if isinstance(own, SCMSettings) and own.consistency_from == "data":
            return draws["x0"]
        return teacher_says(self._guided, y, draws)
