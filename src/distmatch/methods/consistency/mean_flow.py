"""MeanFlow: the average velocity between two times, from its identity (Geng et al. 2025, arXiv 2505.13447).

On the straight path x_t = (1 - t) x0 + t sigma_data eps, with t = sigma / (sigma + sigma_data), the average
velocity from t down to r is u = (x_t - g) / t, where g is what a network of two levels calls D(y, sigma, to):
x_r = x_t - (t - r) u is its jump. Students, their saved form and their sampling are as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import expand
from distmatch.losses import flow_direction, flow_speed, mean_flow_error, mean_flow_loss
from distmatch.methods.consistency.direct import (
    Draws,
    drawn_from,
    mean_backward,
    noised_draws,
    training_levels,
)
from distmatch.methods.consistency.pairs import teacher_says
from distmatch.methods.consistency.settings import MeanFlowSettings
from distmatch.methods.consistency.tangents import choose_derivative, derivative_along
from distmatch.methods.context import Context, Info, uniform
from distmatch.methods.state import DistillState


@dataclass
class AverageVelocityTerm:
    """The loss ``w |u - sg(v - (t - r) du/dt)|^2`` with ``w = 1 / (|error|^2 + c)^p``, held constant.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[MeanFlowSettings]
    jumps = True
    needs_data = True

    def __post_init__(self) -> None:
        cfg = self.context.settings
        self._guided = self.context.guided()
        self._how = choose_derivative(cfg.tangent, None)  # networks with two noise levels are built-in
        self._levels = training_levels(self.context, self.context.settings)
        # Far below sigma_min there is no difference from the data.
        lower = self.context.log_normal(cfg.to_mean, cfg.to_std, 0.0, self.context.first_sigma)
        self._lower = drawn_from(lower)

    def notes(self) -> dict[str, Any]:
        """How derivatives are taken."""
        return {"tangent": self._how}

    def prepare(self, state: DistillState, seed: int) -> None:
        """Needs no other network than the student."""

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters."""
        n = len(batch.x)
        one, other = self._levels(n, state), self._lower(n, state)
        sigma = torch.maximum(one, other).clamp_min(self.context.teacher.sigma_min)
        goes = uniform(n, state.generator, state.ranks) < self.context.settings.jump_share
        to = torch.where(goes, torch.minimum(one, other), sigma)
        draws = noised_draws(self.context, state, batch, sigma.to(batch.x.dtype))
        draws = draws.extended(to=to.to(batch.x.dtype))
        return mean_backward(self.context, draws, lambda part: self.loss(state, part))

    def loss(self, state: DistillState, draws: Draws) -> tuple[Tensor, Info]:
        """The loss of each sample, (b,)."""
        cfg, student = self.context.settings, state.student.denoiser
        sigma_data = self.context.teacher.sigma_data
        x0, sigma, to, conditioning = draws["x0"], draws["sigma"], draws["to"], draws.conditioning
        y = x0 + expand(sigma, x0) * draws["noise"]
        target = x0 if cfg.consistency_from == "data" else teacher_says(self._guided, y, draws)
        speed = flow_speed(sigma, sigma_data)
        slope = flow_direction(y, target, sigma, speed)
        value, derivative = derivative_along(student, y, sigma, slope, speed, conditioning, to, how=self._how)
        error = mean_flow_error(value, target, derivative, sigma, to, sigma_data)
        out = student(y, sigma, conditioning, target_sigma=to)
        loss = mean_flow_loss(out, error, sigma, sigma_data, power=cfg.adaptive_power)
        return loss, {"identity_error": error.flatten(1).square().sum(dim=1)}
