"""Weights of the one loss that trains every teacher: w(sigma) times the square error of x0.

Whatever a network predicts, its error is a known multiple of the error in x0
(:func:`distmatch.diffusion.predictions.loss_weight`), so a weighting is a function of the level alone.
"""

from __future__ import annotations

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.path_core import NoisePath
from distmatch.diffusion.predictions import loss_weight


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
    if not gamma > 0:
        raise UserError("the gamma of min-SNR must be positive", got=gamma, expected="5, usually")
    return sigma.pow(-2).clamp_max(gamma)
