"""The one loss that trains a teacher: a weighted square error of x0, from clean or from noisy data."""

from __future__ import annotations

from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser, expand


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor,
    condition: Tensor | None = None,
    *,
    data_noise: Tensor | None = None,
) -> Tensor:
    """``weight |D(x0 + sigma noise) - x0|^2`` per sample, averaged over its dimensions, (B,).

    From noisy data (Daras et al. 2024, "How much is a noisy image worth?"): a sample that is itself
    ``x0 + s n`` is taken to the level sigma by ``sqrt(sigma^2 - s^2)`` of fresh noise, and the prediction
    is turned into that of the sample, ``E[y | x] = (1 - s^2 / sigma^2) D + (s^2 / sigma^2) x``. The
    minimiser is the same D. A sample teaches nothing at sigma = s.

    Args:
        denoiser: The denoiser to train.
        x0: Samples (B, *shape).
        sigma: Noise levels (B,), positive; not below ``data_noise``.
        noise: Unit noise like ``x0``, of standard deviation 1 where Gaussian; it is scaled here.
        weight: (B,).
        condition: Labels (B,) int64, -1 for none.
        data_noise: Standard deviation s of the noise that is in each sample already, (B,); None for 0.
    """
    if data_noise is None:
        prediction = denoiser(x0 + expand(sigma, x0) * noise, sigma, condition)
    else:
        # For s = 0 the root is sigma and the mean D, both exactly: IEEE's root of a square is exact.
        fresh = ((sigma - data_noise) * (sigma + data_noise)).clamp_min(0).sqrt()
        x = x0 + expand(fresh, x0) * noise
        prediction = noisy_mean(denoiser(x, sigma, condition), x, sigma, data_noise)
    return weight * (prediction - x0).flatten(1).square().mean(dim=1)


def noisy_mean(denoised: Tensor, x: Tensor, sigma: Tensor, data_noise: Tensor) -> Tensor:
    """E[y | x] for a noisy sample y = x0 + s n on the way to x = x0 + sigma eps.

    Given x0 and x, y is Gaussian with mean ``(1 - s^2 / sigma^2) x0 + (s^2 / sigma^2) x``.

    Args:
        denoised: E[x0 | x], (B, *shape).
        x: (B, *shape), at level ``sigma``.
        sigma: (B,), not below ``data_noise``.
        data_noise: s, (B,).
    """
    share = expand((data_noise / sigma) ** 2, x)
    return (1 - share) * denoised + share * x
