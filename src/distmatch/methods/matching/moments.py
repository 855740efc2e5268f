"""Objective of moment matching: E[x~ | z_s] of the student's samples shall be the teacher's E[x | z_s].

Salimans et al. 2024, arXiv 2406.04103 (the variant with an auxiliary denoiser). The fake score g is trained
on both the student's samples and the teacher, so its optimum is half-way between the posterior means of
student and teacher, and its difference to the teacher is the gradient at the samples. For one call that is
Diff-Instruct at half the size; new are several steps, between which the samples are noised by the posterior
between the two noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise import Karras
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.losses import edm_weight, moment_matching_loss, score_difference
from distmatch.methods.context import Info
from distmatch.methods.matching.scores import NoisedSamples, Scores
from distmatch.methods.state import DistillState


def levels_between(levels: tuple[float, ...], call: int, noise: Karras | PathLevels) -> Karras | PathLevels:
    """The levels to which samples of a call are noised: between those of this call and of the next one.

    Args:
        levels: Those of the student's calls, decreasing.
        call: Number of the call, from 0. The first one starts from noise alone, whatever its level is called.
        noise: All levels.

    Raises:
        UserError: The steps are outside of them.
    """
    low = levels[call + 1] if call + 1 < len(levels) else noise.low
    return replace(noise, low=low, high=levels[call] if call else noise.high)


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

    def gradient(self, scores: Scores, state: DistillState) -> tuple[Tensor, Info]:
        """The auxiliary denoiser's distance to the teacher, held fixed."""
        gradient = score_difference(
            scores.teacher, scores.fake, scores.x0, scores.sigma, scaling=self.scaling
        )
        return gradient, {"loss_student": 0.5 * gradient.square().mean()}

    def fake_score_loss(self, samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
        """Half-way between the student's samples and the teacher."""
        with torch.no_grad():
            teacher = self.teacher(samples.x, samples.sigma, samples.conditioning)
        weight = edm_weight(samples.sigma, self.teacher.sigma_data)
        return moment_matching_loss(prediction, samples.x0, teacher, weight)
