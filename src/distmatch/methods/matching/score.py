"""Objective of f-distill and its special cases: a score difference, weighted by h(r) or not.

With reverse KL the weight is one, which is DMD2; without the adversarial term too, it is Diff-Instruct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.divergences import Divergence
from distmatch.losses import denoising_loss, edm_weight, score_difference
from distmatch.methods.context import Info
from distmatch.methods.matching.scores import NoisedSamples, Scores
from distmatch.methods.state import DistillState


def require_weight(divergence: Divergence) -> None:
    """Refuses a divergence whose weight h can not drive a student.

    Raises:
        UserError: It has no second derivative.
    """
    if not divergence.differentiable:
        raise UserError(
            f"{divergence.name} has no second derivative, so its weight is zero almost everywhere",
            fix="choose another divergence; le_cam and js are bounded too",
        )


def fake_score_denoising(samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
    """The usual loss of a fake score: EDM-weighted denoising of the student's samples, (B,)."""
    if state.fake_score is None:
        raise RuntimeError("this state has no fake score")
    return denoising_loss(prediction, samples.x0, edm_weight(samples.sigma, state.fake_score.sigma_data))


@dataclass(frozen=True)
class ScoreDifference:
    """f-distill's gradient (arXiv 2502.15681).

    Attributes:
        divergence: Whose h(r) weights it; None leaves it unweighted (reverse KL).
        scaling: As for :func:`~distmatch.losses.score_difference`.
    """

    divergence: Divergence | None
    scaling: Literal["dmd2", "score"] = "dmd2"
    through_inputs = False

    def __post_init__(self) -> None:
        if self.divergence is not None:
            require_weight(self.divergence)

    @property
    def needs_ratio(self) -> bool:
        """Only a weighted gradient does."""
        return self.divergence is not None

    def gradient(self, scores: Scores, state: DistillState) -> tuple[Tensor, Info]:
        """The weighted score difference."""
        weight = None
        if self.divergence is not None and scores.log_r is not None and scores.weight_scale is not None:
            weight = self.divergence.weight(scores.log_r) / scores.weight_scale.to(scores.log_r.dtype)
        gradient = score_difference(
            scores.teacher, scores.fake, scores.x0, scores.sigma, weight, scaling=self.scaling
        )
        return gradient, {"loss_student": 0.5 * gradient.square().mean()}

    def fake_score_loss(self, samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
        """Denoising of the student's samples."""
        return fake_score_denoising(samples, prediction, state)
