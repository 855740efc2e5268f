"""Consistency models by pairs of levels, tuned from a diffusion model (CM, iCT, ECT).

Song et al. 2023 (arXiv 2303.01469), Song & Dhariwal 2023 (arXiv 2310.14189), Geng et al. 2024
(arXiv 2406.14548).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import expand
from distmatch.losses import consistency_loss, ect_lower_level, pseudo_huber_scale
from distmatch.methods.consistency.direct import (
    Draws,
    mean_backward,
    noised_draws,
    training_levels,
)
from distmatch.methods.consistency.pairs import teacher_path, where_needed
from distmatch.methods.consistency.settings import ConsistencySettings
from distmatch.methods.context import Context, Info
from distmatch.methods.state import DistillState


@dataclass
class PairTerm:
    """The loss ``w d(D(y_t, t), sg D(y_r, r))`` of two points on one path.

    The lower point is one step of the teacher from the upper one (consistency distillation), or has the same
    clean sample and the same noise (consistency training). Both evaluations are of the same weights, without
    dropout, as all students are.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[ConsistencySettings]
    jumps = False
    needs_data = True

    def __post_init__(self) -> None:
        self._guided = self.context.guided()
        self._levels = training_levels(self.context, self.context.settings)
        teacher = self.context.teacher
        self._c = pseudo_huber_scale(self.context.settings.huber, teacher.shape, teacher.sigma_data)

    def notes(self) -> dict[str, Any]:
        """Nothing that the options do not say."""
        return {}

    def prepare(self, state: DistillState, seed: int) -> None:
        """Needs no other network than the student."""

    def stage(self, step: int) -> int:
        """How often the levels of a pair have come closer by half, from 0."""
        return min(self.context.settings.stages * step // self.context.total_steps, 60)

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters."""
        sigma = self._levels(len(batch.x), state).to(batch.x.dtype)
        draws = noised_draws(self.context, state, batch, sigma)
        return mean_backward(self.context, draws, lambda part: self.loss(state, part))

    def loss(self, state: DistillState, draws: Draws) -> tuple[Tensor, Info]:
        """The loss of each sample, (b,)."""
        settings, student = self.context.settings, state.student.denoiser
        sigma_data = self.context.teacher.sigma_data
        x0, sigma, conditioning = draws["x0"], draws["sigma"], draws.conditioning
        lower = ect_lower_level(sigma, sigma_data, self.stage(state.step))
        y = x0 + expand(sigma, x0) * draws["noise"]
        if settings.consistency_from == "data":
            below = x0 + expand(lower, x0) * draws["noise"]
        else:
            below = teacher_path(
                self._guided,
                y,
                sigma,
                lower,
                conditioning,
                solver=settings.teacher_solver,
                steps=settings.solver_steps,
            )
        with torch.no_grad():
            # At sigma 0 a consistency function is the identity, for any output of the network.
            safe = torch.where(lower > 0, lower, sigma)
            target = where_needed(lower > 0, student, below, below, safe, conditioning)
        loss = consistency_loss(student(y, sigma, conditioning), target, sigma, lower, self._c)
        return loss, {"distance": loss.detach() * (sigma - lower)}
