"""From the student's samples to the gradient field at them, in parts where a batch is too large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import expand
from distmatch.losses import adversarial_generator_loss, difference_weight
from distmatch.methods.matching.networks import logits_alone, predictions
from distmatch.methods.matching.view import View
from distmatch.methods.setup import Info, part_of
from distmatch.methods.state import DistillState
from distmatch.ratio.normaliser import NormalisedRatio, effective_sample_size

if TYPE_CHECKING:
    from distmatch.methods.matching.loop import Matching


@dataclass(frozen=True)
class Field:
    """The gradient by the student's samples, and what to log.

    Attributes:
        gradient: (B, *shape), of the mean over all elements of the batch.
        info: Losses, norms and diagnostics.
    """

    gradient: Tensor
    info: Info


def student_field(
    method: Matching,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor | None,
) -> Field:
    """The gradient of objective and adversarial term by the student's samples.

    Networks see the batch in the parts of the set-up; the ratio's statistics and all means are those of the
    whole batch, so that the parts change nothing but rounding.

    Args:
        method: The method.
        state: Networks and the running means of the ratio, which are updated.
        x0: Clean samples (B, *shape), detached.
        sigma: Noise levels (B,).
        noise: Standard normal noise (B, *shape).
        labels: Classes (B,), or None.
    """
    objective = method.objective
    slices = method.setup.parts(len(x0))
    quantile = method.noise.cdf(sigma)
    info: Info = {}
    ratio: NormalisedRatio | None = None
    if objective.through_inputs and objective.needs_ratio and len(slices) > 1:
        # Its part of the gradient depends on the whole batch's ratios, which therefore come first.
        with torch.no_grad(), method.setup.autocast():
            logits = [
                logits_alone(
                    method,
                    state,
                    [x0[p] + expand(sigma[p], x0) * noise[p]],
                    sigma[p],
                    part_of(labels, p),
                    grad=False,
                )[0]
                for p in slices
            ]
        ratio = _ratio(method, state, torch.cat(logits), quantile, info)
    views, fields, pulls, losses = [], [], [], []
    for part in slices:
        whole = len(slices) == 1
        view = _look(method, state, x0[part], sigma[part], noise[part], quantile[part], part_of(labels, part))
        if objective.through_inputs:
            if objective.needs_ratio and whole:
                ratio = _ratio(method, state, view.logit, quantile, info)
            view = _with_ratio(view, ratio, part)
            gradient, said = objective.gradient(view, state)
            fields.append((gradient, said, len(gradient)))
        if method.config.gan_weight > 0 and view.logit is not None:
            adversarial = adversarial_generator_loss(view.logit)
            if method.weigh_adversary:
                weight = difference_weight(view.teacher, view.x0, view.sigma, "dmd2")
                adversarial = weight * adversarial
            loss = method.config.gan_weight * adversarial.mean()
            (pull,) = torch.autograd.grad(loss, view.x0)
            pulls.append(pull * (len(view.x0) / len(x0)))
            losses.append(loss.detach() * (len(view.x0) / len(x0)))
        views.append(_detached(view))
    if objective.through_inputs:
        gradient = torch.cat([g for g, _, _ in fields]) if len(fields) > 1 else fields[0][0]
        for key in fields[0][1]:
            info[key] = torch.stack([said[key] * (n / len(x0)) for _, said, n in fields]).sum(0)
    else:
        view = views[0] if len(views) == 1 else _together(views)
        if objective.needs_ratio:
            ratio = _ratio(method, state, view.logit, quantile, info)
        gradient, said = objective.gradient(_with_ratio(view, ratio, slice(None)), state)
        info |= said
    gradient = gradient / gradient.numel()
    info["grad_dm"] = gradient.norm()
    if pulls:
        pull = torch.cat(pulls) if len(pulls) > 1 else pulls[0]
        info["loss_gan"] = torch.stack(losses).sum() / method.config.gan_weight
        info["grad_gan"] = pull.norm()
        gradient = gradient + pull
    return Field(gradient / method.setup.unit, info)


def _look(
    method: Matching,
    state: DistillState,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    quantile: Tensor,
    labels: Tensor | None,
) -> View:
    """One pass of all networks on a part of the batch; lengths in the view are in the unit of the set-up."""
    through = method.objective.through_inputs
    grad = through or method.config.gan_weight > 0
    unit = method.setup.unit
    leaf = (x0.detach() / unit).requires_grad_(grad)
    x = leaf + expand(sigma / unit, leaf) * noise
    # By `alpha`, which keeps no tensor that the first backward pass through a network would free.
    seen = torch.add(expand(sigma, leaf) * noise, leaf, alpha=unit)
    with method.setup.autocast(), torch.set_grad_enabled(grad):
        teacher, fake, logit = predictions(method, state, seen, sigma, labels, through)
    return View(
        leaf, noise, sigma / unit, x, teacher / unit, fake / unit, logit, quantile, None, None, labels
    )


def _ratio(
    method: Matching, state: DistillState, logit: Tensor | None, quantile: Tensor, info: Info
) -> NormalisedRatio:
    """The whole batch's normalised log ratios; the running means take them in."""
    if logit is None or state.normaliser is None:
        raise RuntimeError("this objective needs a discriminator")
    ratio = state.normaliser.update(logit, quantile, method.setup.divergence.weight)
    info["clip_fraction"] = ratio.clip_fraction
    info["pooled_bins"] = ratio.pooled
    info["ess"] = effective_sample_size(ratio.weight)
    info["ratio_mean"], info["weight_mean"] = state.normaliser.bin_means()
    return ratio


def _with_ratio(view: View, ratio: NormalisedRatio | None, part: slice) -> View:
    return view if ratio is None else replace(view, log_r=ratio.log_r[part], weight_scale=ratio.scale)


def _detached(view: View) -> View:
    return replace(
        view,
        x0=view.x0.detach(),
        x=view.x.detach(),
        teacher=view.teacher.detach(),
        fake=view.fake.detach(),
        logit=None if view.logit is None else view.logit.detach(),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _together(views: list[View]) -> View:
    """The views of all parts as one."""
    names = ("x0", "noise", "sigma", "x", "teacher", "fake", "quantile")
    joined = {name: torch.cat([getattr(view, name) for view in views]) for name in names}
    logit, labels = _joined([v.logit for v in views]), _joined([v.labels for v in views])
    return View(**joined, logit=logit, labels=labels, log_r=None, weight_scale=None)
