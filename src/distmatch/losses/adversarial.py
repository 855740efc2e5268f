"""Adversarial losses between noised real and noised generated samples.

At the optimum of the discriminator's loss its logit is log p_t / q_t, real over generated, so that one
discriminator serves an adversarial term and the density ratio of an f-divergence (f-distill, arXiv
2502.15681, section 1.3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def adversarial_generator_loss(logits: Tensor) -> Tensor:
    """Non-saturating loss of the generator, ``softplus(-logit)``.

    Args:
        logits: The discriminator's, on noised samples of the generator, (B,); they depend on the samples, and
            the discriminator's parameters do not learn from this loss.

    Returns:
        (B,), in float32 or better.
    """
    return F.softplus(-_wide(logits))


def adversarial_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator, ``E[softplus(-real)] + E[softplus(fake)]``; 2 log 2 is chance.

    Args:
        real: Logits of noised real samples, (B,).
        fake: Logits of noised samples of the generator, which are detached, (C,).

    Returns:
        A scalar, in float32 or better.
    """
    return F.softplus(-_wide(real)).mean() + F.softplus(_wide(fake)).mean()


def approximate_r1(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Smoothness penalty: the mean square change of the logits of real samples under a small perturbation.

    In place of R1's squared gradient norm (Mescheder et al. 2018), which needs second derivatives: for a
    perturbation of standard deviation s it is s^2 times that (APT, arXiv 2501.08316).

    Args:
        clean: Logits of noised real samples, (B,).
        perturbed: Logits of the same samples with a little Gaussian noise more, (B,).

    Returns:
        A scalar, in float32 or better.
    """
    return (_wide(clean) - _wide(perturbed)).square().mean()


def adaptive_weight(reference: Tensor, other: Tensor) -> Tensor:
    """The factor that makes another loss's gradient as large as the reference's, at most 1e4.

    ``|reference| / |other|`` (CTM, arXiv 2310.02279, as for VQGAN).

    Args:
        reference: Gradient of the main loss with respect to the last layer's weight.
        other: Gradient of the other loss with respect to the same.

    Returns:
        A scalar.
    """
    return (reference.norm() / (other.norm() + 1e-4)).clamp(0, 1e4)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
