"""The networks that a student is compared by, and their passes, each no further than its result is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise import NoiseLevels
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.methods.context import Context
from distmatch.methods.matching.scores import MatchingObjective
from distmatch.methods.settings import FakeScoreSettings
from distmatch.methods.state import DistillState
from distmatch.ratio.discriminator import Source, denoise_with_logit, logits_of


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a student is compared with its teacher; the same in all steps of a run.

    Attributes:
        context: Teacher, unit of length, precision and parts of a batch.
        objective: What becomes of the scores.
        guided: The teacher with guidance.
        target: The denoiser that takes the teacher's place at a state; None is ``guided`` throughout.
        source: Where the discriminator's features come from.
        noise: The distribution of the noise levels at which the student learns.
        gan_weight: Weight of the adversarial term of the student; 0 leaves it out.
        scaled_adversary: Whether the adversarial loss of each sample is divided by its mean |x0 - D_p|, as
            the score terms are (SiDA's code).
        r1: Weight of the approximate R1 penalty on the discriminator.
        joint_weight: Weight of the discriminator's loss where its features are those of the fake score.
    """

    context: Context[FakeScoreSettings]
    objective: MatchingObjective
    guided: Denoiser
    target: Callable[[DistillState], Denoiser] | None
    source: Source
    noise: NoiseLevels | PathLevels
    gan_weight: float
    scaled_adversary: bool
    r1: float
    joint_weight: float

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher, unguided."""
        return self.context.teacher

    def target_of(self, state: DistillState) -> Denoiser:
        """The denoiser that the student learns to match."""
        return self.guided if self.target is None else self.target(state)


def predictions(
    compared: Comparison,
    state: DistillState,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The denoised x of target and fake score and the raw log ratio; one pass each serves all three.

    Args:
        compared: The teacher, and where features come from.
        state: The networks.
        x: Noised samples (B, *shape).
        sigma: Their levels (B,).
        conditioning: What they are conditioned on.
        grad: Whether both denoisers are differentiated with respect to ``x``. If not, only the discriminator
            is, and only where gradients are enabled.
    """
    head, target, fake = state.discriminator, compared.target_of(state), state.fake_score
    if fake is None:
        raise RuntimeError("this state has no fake score")
    logit = None
    on_teacher = compared.source == "teacher" and head is not None
    # A target that is not the teacher (a recorded one) has other features than the head was trained on.
    same = compared.target is None or target is compared.guided
    wanted = torch.is_grad_enabled()
    with torch.set_grad_enabled(wanted and (grad or (on_teacher and same))):
        if on_teacher and same and head is not None:
            p, logit = denoise_with_logit(target, head, x, sigma, conditioning)
        else:
            p = target(x, sigma, conditioning)
    if on_teacher and not same:
        (logit,) = discriminator_logits(compared, state, [x], sigma, conditioning, grad=True)
    on_fake = compared.source == "fake" and head is not None
    with torch.set_grad_enabled(wanted and (grad or on_fake)):
        if on_fake and head is not None:
            q, logit = denoise_with_logit(fake, head, x, sigma, conditioning)
        else:
            q = fake(x, sigma, conditioning)
    if head is not None and compared.source == "own":
        logit = head(x, sigma, conditioning)
    return p, q, logit


def discriminator_logits(
    compared: Comparison,
    state: DistillState,
    kinds: Sequence[Tensor],
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    grad: bool,
) -> list[Tensor]:
    """The raw log ratios (B,) of samples of several kinds, where no prediction is wanted.

    Args:
        compared: The teacher, and where features come from.
        state: The networks.
        kinds: Noised samples (B, *shape) each.
        sigma: Their levels (B,), the same for all kinds.
        conditioning: What they are conditioned on.
        grad: Whether the features have a gradient: to the samples, or to the fake score that they come from.
    """
    features_from = state.fake_score if compared.source == "fake" else compared.teacher
    if features_from is None or state.discriminator is None:
        raise RuntimeError("this state has no discriminator, or no fake score for its features")
    return logits_of(
        compared.source, features_from, state.discriminator, kinds, sigma, conditioning, grad=grad
    )
