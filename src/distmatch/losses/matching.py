"""Distribution matching: the score difference of a generator, and the additional terms.

In the frame x_t = x0 + sigma eps a score is (D(x_t) - x_t) / sigma^2, so everything is written with
denoisers: D_p of the teacher and D_q of the fake score, which is trained to denoise the generator's samples
(:func:`~distmatch.losses.denoising.denoising_loss`).

Some functions return a gradient and not a loss, because the loss itself cannot be computed. Pass it to the
backward pass of the samples, ``x0.backward(gradient / gradient.numel())``, or take the mean of ``gradient *
x0`` for a loss that has it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import expand
from distmatch.losses.denoising import denoising_loss

Scaling = Literal["dmd2", "score"]


def score_difference(
    teacher: Tensor,
    fake: Tensor,
    x0: Tensor,
    sigma: Tensor,
    weight: Tensor | None = None,
    *,
    scaling: Scaling = "dmd2",
) -> Tensor:
    """The gradient of a divergence with respect to the generator's samples, one sample a row.

    f-distill's theorem (arXiv 2502.15681): grad D_f = -E[h(r) (s_p - s_q)^T dx_t/dtheta], which is
    h (D_q - D_p) / sigma^2 for each sample. Nothing here needs a gradient: call the denoisers without.

    Args:
        teacher: D_p(x_t), (B, ...).
        fake: D_q(x_t), (B, ...).
        x0: The generator's clean samples, (B, ...).
        sigma: Noise levels (B,).
        weight: h(r) for each sample (B,), ``divergence.weight(log_r)`` with log_r = log p/q at x_t. None is
            one everywhere, which is reverse KL: DMD, and Diff-Instruct with ``scaling="score"``.
        scaling: ``score`` keeps 1 / sigma^2: the true gradient of the divergence at that noise level.
            ``dmd2`` divides by the mean of |x0 - D_p| instead, which makes levels comparable (DMD,
            arXiv 2311.18828, eq. 8).

    Returns:
        The gradient (B, ...), detached, in float32 or better; its unit is one over the data's with
        ``score``, none with ``dmd2``.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    p, q, x = (v.detach().to(dtype) for v in (teacher, fake, x0))
    gradient = q - p
    if scaling == "dmd2":
        gradient = gradient / expand(_error_size(p, x), x)
    else:
        gradient = gradient / expand(sigma.to(dtype), x) ** 2
    return gradient if weight is None else expand(weight.detach().to(dtype), x) * gradient


def difference_weight(teacher: Tensor, x0: Tensor, sigma: Tensor, scaling: Scaling) -> Tensor:
    """The weight of each sample that turns products of two differences of denoisers into a loss.

    Args:
        teacher: D_p(x_t), (B, ...).
        x0: The generator's clean samples, (B, ...).
        sigma: Noise levels (B,).
        scaling: ``score``: sigma^-4, which makes them products of two scores: the exact divergences.
            ``dmd2``: 1 / mean|x0 - D_p| (SiD's choice), which makes noise levels comparable.

    Returns:
        (B,), detached.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    if scaling == "score":
        return sigma.to(dtype) ** -4
    return 1.0 / _error_size(teacher.detach().to(dtype), x0.detach().to(dtype))


def _error_size(teacher: Tensor, x0: Tensor) -> Tensor:
    """The mean of |x0 - D_p| over each sample, (B,); not so small that dividing by it would overflow."""
    return (x0 - teacher).abs().flatten(1).mean(1).clamp_min(1e-5)


def moment_matching_loss(prediction: Tensor, x0: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The loss of the auxiliary denoiser g of moment matching, ``w (|x0 - g|^2 + |g - D_p|^2)``.

    Salimans et al. 2024 (arXiv 2406.04103), the variant with an auxiliary denoiser. At its optimum g is
    half-way between the posterior means of generator and teacher, and the generator's gradient is
    :func:`score_difference` with g as the fake score.

    Args:
        prediction: g(z_s), (B, ...), with gradient.
        x0: The generator's samples, (B, ...), detached.
        teacher: D_p(z_s), (B, ...), detached.
        weight: (B,), usually :func:`~distmatch.losses.denoising.edm_weight`.

    Returns:
        (B,), means over the elements of a sample.
    """
    return denoising_loss(prediction, x0, weight) + denoising_loss(prediction, teacher, weight)


def posterior_noise(x0: Tensor, x: Tensor, now: float, sigma: Tensor, noise: Tensor) -> Tensor:
    """The noise eps for which ``x0 + sigma eps`` is a draw from q(z_s | z_t = x, x0).

    How moment matching noises the samples of a generator of several steps. The posterior of the
    variance-exploding diffusion has mean x0 + (sigma / now)^2 (x - x0) and variance
    sigma^2 (1 - (sigma / now)^2).

    Args:
        x0: Clean samples (B, ...).
        x: The states at level ``now`` that they were made from, (B, ...).
        now: Level of ``x``.
        sigma: Levels to go to (B,), at most ``now``.
        noise: Fresh standard normal noise (B, ...).

    Returns:
        (B, ...).
    """
    ratio = expand(sigma / now, x0)
    return ratio * (x - x0) / now + (1 - ratio**2).clamp_min(0).sqrt() * noise


def pair_regression_loss(
    prediction: Tensor, target: Tensor, *, kind: Literal["squared", "huber"] = "squared", c: float = 0.1
) -> Tensor:
    """How far the generator's samples are from the teacher's for the same noise (DMD, arXiv 2311.18828).

    ``squared`` is the mean square difference d^2 of a sample's elements, ``huber`` is sqrt(d^2 + c^2) - c:
    quadratic where d is small against c, and d where it is large. DMD itself compares by LPIPS.

    Args:
        prediction: Of the generator, (B, ...), with gradient.
        target: The end of the teacher's deterministic sampling from the same noise, (B, ...).
        kind: Which of them.
        c: Positive, in the unit of the data; only ``huber`` reads it.

    Returns:
        (B,), in the unit of the data, squared or not.
    """
    square = (prediction - target).square().flatten(1).mean(1)
    return square if kind == "squared" else (square + c**2).sqrt() - c
