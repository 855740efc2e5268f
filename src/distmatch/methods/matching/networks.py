"""The passes of teacher, fake score and discriminator: one each, and none further than somebody reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distmatch.methods.state import DistillState
from distmatch.ratio.discriminator import denoise_with_logit, logits_of

if TYPE_CHECKING:
    from distmatch.methods.matching.loop import Matching


def predictions(
    method: Matching, state: DistillState, x: Tensor, sigma: Tensor, labels: Tensor | None, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Target's and critic's denoised x and the raw log ratio; one pass each serves all three.

    Args:
        method: The method, for its teacher and where its features come from.
        state: The networks.
        x: Noised samples (B, *shape).
        sigma: Their levels (B,).
        labels: Their classes (B,), or None.
        grad: Whether both denoisers are differentiated by ``x``. If not, only the discriminator is, and
            only where gradients are enabled.
    """
    head, target, fake = state.discriminator, method.target_of(state), state.fake
    if fake is None:
        raise RuntimeError("this state has no fake score")
    logit = None
    lends = method.source == "teacher" and head is not None
    # A target that is not the teacher (a recorded one) has other features than the head was trained on.
    same = method.target is None or target is method.guided
    wanted = torch.is_grad_enabled()
    with torch.set_grad_enabled(wanted and (grad or (lends and same))):
        if lends and same and head is not None:
            p, logit = denoise_with_logit(target, head, x, sigma, labels)
        else:
            p = target(x, sigma, labels)
    if lends and not same:
        (logit,) = logits_alone(method, state, [x], sigma, labels, grad=True)
    shares = method.source == "fake" and head is not None
    with torch.set_grad_enabled(wanted and (grad or shares)):
        if shares and head is not None:
            q, logit = denoise_with_logit(fake, head, x, sigma, labels)
        else:
            q = fake(x, sigma, labels)
    if head is not None and method.source == "own":
        logit = head(x, sigma, labels)
    return p, q, logit


def logits_alone(
    method: Matching,
    state: DistillState,
    kinds: Sequence[Tensor],
    sigma: Tensor,
    labels: Tensor | None,
    *,
    grad: bool,
) -> list[Tensor]:
    """The raw log ratios (B,) of samples of several kinds, where no prediction is wanted.

    Args:
        method: The method.
        state: The networks.
        kinds: Noised samples (B, *shape) each.
        sigma: Their levels (B,), the same for all kinds.
        labels: Their classes (B,), or None.
        grad: Whether they are differentiated by the samples, or by a fake score that lends features.
    """
    lender = state.fake if method.source == "fake" else method.teacher
    if lender is None or state.discriminator is None:
        raise RuntimeError("this state has no discriminator, or no fake score to lend it features")
    return logits_of(method.source, lender, state.discriminator, kinds, sigma, labels, grad=grad)
