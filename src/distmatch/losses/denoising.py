"""Denoising losses: what trains a teacher, a fake score, and the denoising term of a consistency model.

Whatever a network predicts, its error is a known multiple of the error in x0
(:func:`distmatch.diffusion.predictions.loss_weight`), so the loss is always that of x0, and a weighting is a
function of the noise level alone.
"""

from __future__ import annotations

from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.diffusion.denoiser import expand
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.predictions import loss_weight


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """``weight |D - target|^2`` of each sample, averaged over its elements.

    With :func:`edm_weight` this is the loss of EDM (Karras et al. 2022, table 1): every noise level has the
    same expected loss, 1, for a network that still returns 0 and data of variance ``sigma_data^2``. It is the
    loss of a fake score too, with samples of the student as its targets (DMD, arXiv 2311.18828).

    Args:
        prediction: D(x_t, sigma), (B, ...), with gradient.
        target: What it should be, (B, ...), detached: clean samples, or another denoiser's prediction.
        weight: (B,).

    Returns:
        (B,), in the square of the data's unit times that of the weight.
    """
    return weight * (prediction - target).flatten(1).square().mean(dim=1)


def noisy_mean(denoised: Tensor, x: Tensor, sigma: Tensor, data_noise: Tensor) -> Tensor:
    """E[y | x] for a noisy sample y = x0 + s n on the way to x = x0 + sigma eps.

    Given x0 and x, y is Gaussian with mean ``(1 - s^2 / sigma^2) x0 + (s^2 / sigma^2) x``. Put into
    :func:`denoising_loss` with target y, it trains the denoiser of clean samples from noisy ones (Daras et
    al. 2024, "How much is a noisy image worth?"). A sample teaches nothing at sigma = s.

    Args:
        denoised: E[x0 | x], (B, ...).
        x: (B, ...), at level ``sigma``: y with ``sqrt(sigma^2 - s^2)`` of fresh noise.
        sigma: (B,), not below ``data_noise``.
        data_noise: s, (B,).

    Returns:
        (B, ...).
    """
    share = expand((data_noise / sigma) ** 2, x)
    return (1 - share) * denoised + share * x


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`` (Karras et al. 2022, table 1).

    Args:
        sigma: Noise levels (B,).
        sigma_data: Standard deviation of the data.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def target_weight(prediction: str, path: NoisePath, sigma: Tensor) -> Tensor:
    """The x0 weight of an unweighted loss on ``prediction``, (B,) in the dtype of ``sigma``.

    Args:
        prediction: One of :data:`~distmatch.diffusion.predictions.PREDICTIONS`.
        path: The path on which it is predicted.
        sigma: Noise-to-signal ratios (B,).
    """
    return loss_weight(prediction, path.coefficients(path.t_of_rho(sigma))).to(sigma.dtype)


def min_snr_weight(sigma: Tensor, gamma: float) -> Tensor:
    """``min(1 / sigma^2, gamma)`` (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting").

    Below the level ``gamma^-1/2`` the weight stops growing. As the weight of another loss this is
    ``min(SNR, gamma) / SNR`` for eps and, where the path preserves variance,
    ``min(SNR, gamma) / (SNR + 1)`` for v.

    Args:
        sigma: Noise levels (B,); SNR = 1 / sigma^2, that of the noise to data of unit variance.
        gamma: Largest weight; 5 in the paper.

    Raises:
        UserError: ``gamma`` is not positive.
    """
    check_number("the gamma of min-SNR", gamma, "(0, inf)", fix="it is usually 5")
    return sigma.pow(-2).clamp_max(gamma)


def uncertainty_loss(loss: Tensor, log_variance: Tensor) -> Tensor:
    """``loss exp(-u) + u``: every noise level has the same share in the gradient.

    EDM2's learned weighting (Karras et al. 2024, "Analyzing and improving", eq. 21). Its smallest value,
    1 + log loss, is where u is the log of the expected loss.

    Args:
        loss: (B,).
        log_variance: u at each sample's noise level, (B,), of a small network that learns from this loss.

    Returns:
        (B,).
    """
    return loss * (-log_variance).exp() + log_variance
