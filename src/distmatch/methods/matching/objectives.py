"""The terms of the student's gradient, as plain functions of tensors."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand
from distmatch.divergences import Divergence
from distmatch.methods.matching.view import CriticView
from distmatch.methods.state import DistillState
from distmatch.nets.edm import weighted_error


def score_difference(
    teacher: Tensor,
    fake: Tensor,
    x0: Tensor,
    sigma: Tensor,
    weight: Tensor | None = None,
    *,
    scaling: Literal["dmd2", "score"] = "dmd2",
) -> Tensor:
    """The gradient of a divergence with respect to the student's samples, one sample a row.

    f-distill's theorem (arXiv 2502.15681): grad D_f = -E[h(r) (s_p - s_q)^T dx_t/dtheta]. In the
    variance-exploding frame s = (D - x_t) / sigma^2, so it is h (D_q - D_p) / sigma^2 for each sample.

    Args:
        teacher: D_p(x_t), (B, ...).
        fake: D_q(x_t), (B, ...).
        x0: The student's clean samples, (B, ...).
        sigma: Noise levels (B,).
        weight: h(r) for each sample (B,); None is one everywhere (reverse KL).
        scaling: ``score`` keeps 1 / sigma^2: the true gradient of the divergence at that noise level.
            ``dmd2`` divides by the mean of |x0 - D_p| instead, which makes levels comparable (DMD, eq. 8).

    Returns:
        The gradient (B, ...), detached, in float32 or better.
    """
    dtype = teacher.dtype if teacher.dtype.itemsize >= 4 else None
    p, q, x = (v.detach() if dtype else v.detach().float() for v in (teacher, fake, x0))
    gradient = q - p
    if scaling == "dmd2":
        size = (x - p).abs().flatten(1).mean(1).clamp_min(1e-5)
        gradient = gradient / expand(size, x)
    else:
        gradient = gradient / expand(sigma.to(gradient.dtype), x) ** 2
    return gradient if weight is None else expand(weight.to(gradient.dtype), x) * gradient


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


def adversarial_student(logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """Non-saturating loss of the student: E[w softplus(-l)] on its own samples; ``weight`` None is one."""
    loss = F.softplus(-logits.float())
    return loss.mean() if weight is None else (weight * loss).mean()


def adversarial_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator; at its optimum the logit is log p/q (real over fake)."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def approximate_r1(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Smoothness penalty: mean square change of the logit of real samples under a small perturbation."""
    return (clean.float() - perturbed.float()).square().mean()


def denoising_critic(view: CriticView, prediction: Tensor, state: DistillState) -> Tensor:
    """The usual loss of a fake score: EDM-weighted denoising of the student's samples, (B,)."""
    if state.fake is None:
        raise RuntimeError("this state has no fake score")
    return weighted_error(prediction, view.x0, view.sigma, state.fake.sigma_data)
