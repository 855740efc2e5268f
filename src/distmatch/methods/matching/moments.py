"""Objective of moment matching: E[x~ | z_s] of the student's samples shall be the teacher's E[x | z_s].

Salimans et al. 2024, arXiv 2406.04103 (the variant with an auxiliary denoiser). The fake score g is drawn
both to the student's samples and to the teacher, so at its optimum it lies half-way between the student's
posterior mean and the teacher's, and its distance to the teacher is what moves the samples. For one call that
is Diff-Instruct at half the size; what is new are several calls, after which the samples are noised again by
the posterior between the two levels and not afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.noise import Karras
from distmatch.methods.matching.objectives import score_difference
from distmatch.methods.matching.view import CriticView, View
from distmatch.methods.setup import Info
from distmatch.methods.state import DistillState
from distmatch.nets.edm import weighted_error


def auxiliary_error(
    prediction: Tensor, x0: Tensor, teacher: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """The loss w (|x~ - g|^2 + |g - D_p|^2) for each sample, with EDM's weight; means over the dimensions.

    Args:
        prediction: g(z_s), (B, *shape).
        x0: The student's samples x~, (B, *shape).
        teacher: D_p(z_s), (B, *shape).
        sigma: Levels (B,).
        sigma_data: Standard deviation of the data.

    Returns:
        (B,).
    """
    to_samples = weighted_error(prediction, x0, sigma, sigma_data)
    return to_samples + weighted_error(prediction, teacher, sigma, sigma_data)


def posterior_noise(x0: Tensor, x: Tensor, now: float, sigma: Tensor, noise: Tensor) -> Tensor:
    """The noise eps for which ``x0 + sigma eps`` is a draw from q(z_s | z_t = x, x0).

    The posterior of the variance-exploding diffusion has mean x0 + (sigma / now)^2 (x - x0) and variance
    sigma^2 (1 - (sigma / now)^2).

    Args:
        x0: Clean samples (B, *shape).
        x: The states at level ``now`` that they were made from, (B, *shape).
        now: Level of ``x``.
        sigma: Levels to go to (B,), at most ``now``.
        noise: Fresh standard normal noise (B, *shape).
    """
    ratio = expand(sigma / now, x0)
    return ratio * (x - x0) / now + (1 - ratio**2).clamp_min(0).sqrt() * noise


def levels_between(levels: tuple[float, ...], call: int, noise: Karras) -> Karras:
    """The levels to which samples of a call are noised: between those of this call and of the next one.

    Args:
        levels: Those of the student's calls, decreasing.
        call: Number of the call, from 0. The first one starts from noise alone, whatever its level is called.
        noise: All levels.

    Raises:
        UserError: The calls lie outside of them.
    """
    low = levels[call + 1] if call + 1 < len(levels) else noise.low
    return Karras(low, levels[call] if call else noise.high, noise.rho)


@dataclass(frozen=True)
class MomentMatching:
    """The gradient w(s) (g - D_p) at the student's samples, and the auxiliary denoiser's loss.

    Attributes:
        teacher: The (guided) teacher.
        scaling: Its weight: ``score`` is 1 / sigma^2, as Diff-Instruct has it; ``dmd2`` the adaptive one.
    """

    teacher: Denoiser
    scaling: Literal["dmd2", "score"] = "score"
    needs_ratio = False
    through_inputs = False

    def gradient(self, view: View, state: DistillState) -> tuple[Tensor, Info]:
        """The auxiliary denoiser's distance to the teacher, held fixed."""
        gradient = score_difference(view.teacher, view.fake, view.x0, view.sigma, scaling=self.scaling)
        return gradient, {"loss_student": 0.5 * gradient.square().mean()}

    def critic_loss(self, view: CriticView, prediction: Tensor, state: DistillState) -> Tensor:
        """Half-way between the student's samples and the teacher."""
        with torch.no_grad():
            teacher = self.teacher(view.x, view.sigma, view.labels)
        return auxiliary_error(prediction, view.x0, teacher, view.sigma, self.teacher.sigma_data)
