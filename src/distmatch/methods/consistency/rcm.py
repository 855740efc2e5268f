"""rCM: sCM, which covers, with a score difference, which sharpens (Zheng et al. 2025, arXiv 2510.08431)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from distmatch.methods.consistency.scm import TangentTerm
from distmatch.methods.consistency.settings import RCMSettings
from distmatch.methods.context import Context, Info
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.score import ScoreDifference, fake_score_denoising
from distmatch.methods.matching.scores import NoisedSamples, Scores
from distmatch.methods.state import DistillState


@dataclass(frozen=True)
class WeightedScoreDifference:
    """The score difference of DMD times a constant.

    Attributes:
        inner: The score difference.
        weight: The constant.
    """

    inner: ScoreDifference
    weight: float
    needs_ratio = False
    through_inputs = False

    def gradient(self, scores: Scores, state: DistillState) -> tuple[Tensor, Info]:
        """The gradient, weighted; what is logged is not."""
        gradient, info = self.inner.gradient(scores, state)
        return self.weight * gradient, info

    def fake_score_loss(self, samples: NoisedSamples, prediction: Tensor, state: DistillState) -> Tensor:
        """Denoising of the student's samples."""
        return fake_score_denoising(samples, prediction, state)


def build_rcm(context: Context[RCMSettings]) -> Matching:
    """The loop of the methods with a fake score, with sCM's loss in addition to the score difference.

    The samples for the score difference come from the student's own sampler (``--num-steps``), and only the
    last step is differentiated. There is no adversarial term.

    The authors add ``|F - sg F - g / (|g| + c)|^2 + lambda |x0 - sg(x0 - d)|^2``, both as sums over the
    elements of a sample and in the unit of the data's standard deviation, with d the score difference as DMD
    scales it. Here both are means over elements, which leaves their balance as it is in any number of
    dimensions.
    """
    score = ScoreDifference(None, context.settings.scaling)
    own = context.settings
    # The loop takes d for the gradient in the unit of the scores, in which the data have standard deviation
    # 1/2. The square's derivative is 2 d in the unit of the data's own, which is twice as much again.
    objective = WeightedScoreDifference(score, 4 * own.dmd_weight)
    first = own.dmd_after * context.total_steps if own.dmd_weight > 0 else math.inf
    return Matching(context, objective, terms=(TangentTerm(context, learned_weight=False),), first=first)
