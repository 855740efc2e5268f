"""The gradient at the student's samples, in parts where a batch is too large."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmatch.diffusion.conditioning import Conditioning, cat
from distmatch.diffusion.denoiser import expand
from distmatch.losses import adversarial_generator_loss, difference_weight
from distmatch.methods.context import Info
from distmatch.methods.matching.networks import Comparison, discriminator_logits, predictions
from distmatch.methods.matching.scores import Scores
from distmatch.methods.state import DistillState
from distmatch.ratio.normalizer import NormalizedRatio, effective_sample_size


@dataclass(frozen=True)
class GeneratorGradient:
    """The gradient with respect to the student's samples, and what to log.

    Attributes:
        gradient: (B, *shape), of the mean over all elements of the batch.
        info: Losses, norms and diagnostics.
    """

    gradient: Tensor
    info: Info


def generator_gradient(
    compared: Comparison,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
) -> GeneratorGradient:
    """The gradient of objective and adversarial term with respect to the student's samples.

    Networks see the batch in the parts of the context; the ratio's statistics and all means are those of the
    whole batch, so that the parts change nothing but rounding.

    Args:
        compared: Objective, teacher and settings.
        state: Networks and the running means of the ratio, which are updated.
        x0: Clean samples (B, *shape), detached.
        sigma: Noise levels (B,).
        noise: Standard normal noise (B, *shape).
        conditioning: What the samples are conditioned on.
    """
    objective = compared.objective
    slices = compared.context.parts(len(x0))
    quantile = compared.noise.cdf(sigma)
    info: Info = {}
    ratio: NormalizedRatio | None = None
    if objective.through_inputs and objective.needs_ratio and len(slices) > 1:
        # Its part of the gradient depends on the whole batch's ratios, which therefore come first.
        with torch.no_grad(), compared.context.autocast():
            logits = [
                discriminator_logits(
                    compared,
                    state,
                    [x0[p] + expand(sigma[p], x0) * noise[p]],
                    sigma[p],
                    conditioning.index(p),
                    grad=False,
                )[0]
                for p in slices
            ]
        ratio = _ratio(compared, state, torch.cat(logits), quantile, info)
    batches, gradients, adversarial, losses = [], [], [], []
    for part in slices:
        whole = len(slices) == 1
        scores = _scores(
            compared, state, x0[part], sigma[part], noise[part], quantile[part], conditioning.index(part)
        )
        if objective.through_inputs:
            if objective.needs_ratio and whole:
                ratio = _ratio(compared, state, scores.logit, quantile, info)
            scores = _with_ratio(scores, ratio, part)
            gradient, found = objective.gradient(scores, state)
            gradients.append((gradient, found, len(gradient)))
        if compared.gan_weight > 0 and scores.logit is not None:
            each = adversarial_generator_loss(scores.logit)
            if compared.scaled_adversary:
                weight = difference_weight(scores.teacher, scores.x0, scores.sigma, "dmd2")
                each = weight * each
            loss = compared.gan_weight * each.mean()
            (slope,) = torch.autograd.grad(loss, scores.x0)
            adversarial.append(slope * (len(scores.x0) / len(x0)))
            losses.append(loss.detach() * (len(scores.x0) / len(x0)))
        batches.append(_detached(scores))
    if objective.through_inputs:
        gradient = torch.cat([g for g, _, _ in gradients]) if len(gradients) > 1 else gradients[0][0]
        for key in gradients[0][1]:
            info[key] = torch.stack([found[key] * (n / len(x0)) for _, found, n in gradients]).sum(0)
    else:
        scores = batches[0] if len(batches) == 1 else _joined(batches)
        if objective.needs_ratio:
            ratio = _ratio(compared, state, scores.logit, quantile, info)
        gradient, found = objective.gradient(_with_ratio(scores, ratio, slice(None)), state)
        info |= found
    gradient = gradient / gradient.numel()
    info["grad_dm"] = state.ranks.norm(gradient)
    if adversarial:
        term = torch.cat(adversarial) if len(adversarial) > 1 else adversarial[0]
        info["loss_gan"] = torch.stack(losses).sum() / compared.gan_weight
        info["grad_gan"] = state.ranks.norm(term)
        gradient = gradient + term
    return GeneratorGradient(gradient / compared.context.unit, info)


def _scores(
    compared: Comparison,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    quantile: Tensor,
    conditioning: Conditioning,
) -> Scores:
    """One pass of all networks on a part of the batch; lengths in the result are in ``context.unit``."""
    through = compared.objective.through_inputs
    grad = through or compared.gan_weight > 0
    unit = compared.context.unit
    leaf = (x0.detach() / unit).requires_grad_(grad)
    x = leaf + expand(sigma / unit, leaf) * noise
    # By `alpha`, which keeps no tensor that the first backward pass through a network would free.
    in_data_units = torch.add(expand(sigma, leaf) * noise, leaf, alpha=unit)
    with compared.context.autocast(), torch.set_grad_enabled(grad):
        teacher, fake, logit = predictions(compared, state, in_data_units, sigma, conditioning, through)
    return Scores(
        leaf, noise, sigma / unit, x, teacher / unit, fake / unit, logit, quantile, None, None, conditioning
    )


def _ratio(
    compared: Comparison, state: DistillState, logit: Tensor | None, quantile: Tensor, info: Info
) -> NormalizedRatio:
    """The whole batch's normalized log ratios; the running means take them in."""
    if logit is None or state.normalizer is None:
        raise RuntimeError("this objective needs a discriminator")
    ratio = state.normalizer.update(logit, quantile, compared.context.divergence.weight, state.ranks)
    info["clip_fraction"] = ratio.clip_fraction
    info["pooled_bins"] = ratio.pooled
    info["ess"] = effective_sample_size(ratio.weight, state.ranks)
    info["ratio_mean"], info["weight_mean"] = state.normalizer.bin_means()
    return ratio


def _with_ratio(scores: Scores, ratio: NormalizedRatio | None, part: slice) -> Scores:
    return scores if ratio is None else replace(scores, log_r=ratio.log_r[part], weight_scale=ratio.scale)


def _detached(scores: Scores) -> Scores:
    return replace(
        scores,
        x0=scores.x0.detach(),
        x=scores.x.detach(),
        teacher=scores.teacher.detach(),
        fake=scores.fake.detach(),
        logit=None if scores.logit is None else scores.logit.detach(),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _joined(parts: list[Scores]) -> Scores:
    """The scores of all parts as one."""
    names = ("x0", "noise", "sigma", "x", "teacher", "fake", "quantile")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    logit, conditioning = _cat([p.logit for p in parts]), cat([p.conditioning for p in parts])
    return Scores(**joined, logit=logit, conditioning=conditioning, log_r=None, weight_scale=None)
