"""The other side: the fake score learns to denoise student samples, the discriminator to tell them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from distmatch.diffusion.denoiser import expand
from distmatch.losses import adversarial_discriminator_loss, approximate_r1
from distmatch.methods.matching.networks import logits_alone
from distmatch.methods.matching.view import CriticView
from distmatch.methods.setup import Info, noised, part_of
from distmatch.methods.state import DistillState
from distmatch.ratio.discriminator import denoise_with_logit

if TYPE_CHECKING:
    from distmatch.methods.matching.loop import Matching


def critic_backward(
    method: Matching,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    real: Tensor,
    labels: Tensor | None,
) -> Info:
    """Adds the gradients of the critic's and the discriminator's losses to their parameters.

    Args:
        method: The method.
        state: The networks and random streams.
        x0: Samples of the student, (B, *shape), detached.
        sigma: Noise levels (B,).
        noise: Unit noise on these samples, (B, *shape).
        real: Real samples; read only with a discriminator.
        labels: Classes of both, (B,), or None.
    """
    n, head, r1 = len(x0), state.discriminator, method.config.r1
    kinds = [x0 + expand(sigma, x0) * noise]
    if head is not None:
        kinds.append(noised(real, sigma, state.ratio_generator))
        if r1 > 0:
            kinds.append(noised(kinds[1], 0.1 * sigma, state.ratio_generator))
    slices = method.setup.parts(n)
    total: Info = {}
    for part in slices:
        info = _part(
            method,
            state,
            CriticView(x0[part], sigma[part], kinds[0][part], part_of(labels, part)),
            [kind[part] for kind in kinds[1:]],
            (part.stop - part.start) / n,
        )
        total = {key: total[key] + value if total else value for key, value in info.items()}
    return total


def _part(method: Matching, state: DistillState, view: CriticView, real: list[Tensor], share: float) -> Info:
    """One part of the batch: ``real`` holds noised real samples and, with R1, noisier ones."""
    head, fake, r1 = state.discriminator, state.fake, method.config.r1
    if fake is None:
        raise RuntimeError("this state has no fake score")
    logits: list[Tensor] = []
    info: Info = {}
    with method.setup.autocast():
        if head is not None and method.source == "fake":
            prediction, own = denoise_with_logit(fake, head, view.x, view.sigma, view.labels)
            # Of real samples nobody reads a prediction.
            more = logits_alone(method, state, real, view.sigma, view.labels, grad=True)
            logits = [own, *more]
        else:
            prediction = fake(view.x, view.sigma, view.labels)
            if head is not None:
                kinds = [view.x, *real]
                logits = logits_alone(method, state, kinds, view.sigma, view.labels, grad=False)
        loss = method.objective.critic_loss(view, prediction, state).mean()
        info["loss_fake"] = share * loss.detach()
        if logits:
            ratio_loss = adversarial_discriminator_loss(real=logits[1], fake=logits[0])
            info["loss_ratio"] = share * ratio_loss.detach()
            if r1 > 0:
                ratio_loss = ratio_loss + r1 * approximate_r1(logits[1], logits[2])
            loss = loss + (method.config.joint_weight if method.source == "fake" else 1.0) * ratio_loss
    (share * loss).backward()
    return info
