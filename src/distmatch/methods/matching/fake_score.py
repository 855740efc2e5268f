"""The networks trained besides the student: the fake score and the discriminator, both from its samples."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import expand
from distmatch.losses import adversarial_discriminator_loss, approximate_r1
from distmatch.methods.context import Info, noised
from distmatch.methods.matching.networks import Comparison, discriminator_logits
from distmatch.methods.matching.scores import NoisedSamples
from distmatch.methods.state import DistillState
from distmatch.ratio.discriminator import denoise_with_logit


def fake_score_backward(
    compared: Comparison,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    real: Tensor,
    conditioning: Conditioning,
) -> Info:
    """Adds the gradients of the fake score's and the discriminator's losses to their parameters.

    Args:
        compared: Objective, teacher and settings.
        state: The networks and random streams.
        x0: Samples of the student, (B, *shape), detached.
        sigma: Noise levels (B,).
        noise: Unit noise on these samples, (B, *shape).
        real: Real samples; read only with a discriminator.
        conditioning: What both are conditioned on.
    """
    n, head, r1 = len(x0), state.discriminator, compared.r1
    kinds = [x0 + expand(sigma, x0) * noise]
    if head is not None:
        kinds.append(noised(real, sigma, state.ratio_generator, state.ranks))
        if r1 > 0:
            kinds.append(noised(kinds[1], 0.1 * sigma, state.ratio_generator, state.ranks))
    slices = compared.context.parts(n)
    total: Info = {}
    for part in slices:
        info = _part(
            compared,
            state,
            NoisedSamples(x0[part], sigma[part], kinds[0][part], conditioning.index(part)),
            [kind[part] for kind in kinds[1:]],
            (part.stop - part.start) / n,
        )
        total = {key: total[key] + value if total else value for key, value in info.items()}
    return total


def _part(
    compared: Comparison, state: DistillState, samples: NoisedSamples, real: list[Tensor], share: float
) -> Info:
    """One part of the batch: ``real`` holds noised real samples and, with R1, noisier ones."""
    head, fake, r1 = state.discriminator, state.fake_score, compared.r1
    if fake is None:
        raise RuntimeError("this state has no fake score")
    logits: list[Tensor] = []
    info: Info = {}
    with compared.context.autocast():
        if head is not None and compared.source == "fake":
            prediction, own = denoise_with_logit(fake, head, samples.x, samples.sigma, samples.conditioning)
            # The predictions for real samples are not read.
            more = discriminator_logits(compared, state, real, samples.sigma, samples.conditioning, grad=True)
            logits = [own, *more]
        else:
            prediction = fake(samples.x, samples.sigma, samples.conditioning)
            if head is not None:
                kinds = [samples.x, *real]
                logits = discriminator_logits(
                    compared, state, kinds, samples.sigma, samples.conditioning, grad=False
                )
        loss = compared.objective.fake_score_loss(samples, prediction, state).mean()
        info["loss_fake"] = share * loss.detach()
        if logits:
            ratio_loss = adversarial_discriminator_loss(real=logits[1], fake=logits[0])
            info["loss_ratio"] = share * ratio_loss.detach()
            if r1 > 0:
                ratio_loss = ratio_loss + r1 * approximate_r1(logits[1], logits[2])
            loss = loss + (compared.joint_weight if compared.source == "fake" else 1.0) * ratio_loss
    (share * loss).backward()
    return info


@torch.no_grad()
def fake_score_error(
    compared: Comparison,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """The fake score's loss on samples that it has not learned from, (); see :func:`fake_score_backward`."""
    if state.fake_score is None:
        raise RuntimeError("this state has no fake score")
    total = torch.zeros((), device=x0.device)
    for part in compared.context.parts(len(x0)):
        noisy = x0[part] + expand(sigma[part], x0[part]) * noise[part]
        samples = NoisedSamples(x0[part], sigma[part], noisy, conditioning.index(part))
        with compared.context.autocast():
            prediction = state.fake_score(samples.x, samples.sigma, samples.conditioning)
            total += compared.objective.fake_score_loss(samples, prediction, state).float().sum()
    return total / len(x0)
