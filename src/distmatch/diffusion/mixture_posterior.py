"""Exact quantities of a Gaussian mixture: the posterior given measurements, the flow map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError


def kalman_update(
    log_weights: Tensor, means: Tensor, covariances: Tensor, matrix: Tensor, value: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture of x0 given ``value = matrix x0 + N(0, noise)``, component by component.

    Args:
        log_weights: Log weights (K,).
        means: Means (K, D).
        covariances: Covariances (K, D, D).
        matrix: The linear measurement (M, D).
        value: What was measured (M,).
        noise: Covariance of the measurement (M, M).

    Returns:
        Weights (K,), means (K, D) and covariances (K, D, D) of the posterior.

    Raises:
        UserError: A measurement without noise repeats another or looks where a component has no width.
    """
    cross = covariances @ matrix.mT
    innovation = matrix @ cross + noise
    factor, failed = torch.linalg.cholesky_ex(innovation)
    if bool(failed.any()):
        raise UserError(
            "this measurement has no density: noiseless rows are repeated or have zero variance",
            fix="give the measurement some noise, or drop the repeated rows",
        )
    surprise = value - means @ matrix.mT
    whitened = torch.linalg.solve_triangular(factor, surprise[..., None], upper=False)[..., 0]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_p = -0.5 * (whitened.square().sum(-1) + log_det + len(value) * math.log(2 * math.pi))
    gain = torch.cholesky_solve(cross.mT, factor).mT
    # Joseph's form of the update stays positive semi-definite under rounding.
    keep = torch.eye(means.shape[1], dtype=means.dtype, device=means.device) - gain @ matrix
    covariance = keep @ covariances @ keep.mT + gain @ noise @ gain.mT
    weights = (log_weights + log_p).softmax(0)
    shifted = means + torch.einsum("kdm,km->kd", gain, surprise)
    return weights, shifted, (covariance + covariance.mT) / 2


def gaussian_flow(
    x: Tensor, mean: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """The end map of the probability flow for N(mean, C): stretch every principal axis.

    ``mean + sqrt((C + end^2) / (C + start^2)) (x - mean)``.

    Args:
        x: Samples at level ``start``, (B, D).
        mean: Mean (D,).
        eigenvalues: Variances along the axes (D,).
        eigenvectors: The axes, columns of (D, D).
        start: Levels (B,).
        end: Levels (B,).

    Returns:
        The samples at level ``end``, (B, D).
    """
    stretch = ((eigenvalues + end[:, None] ** 2) / (eigenvalues + start[:, None] ** 2)).sqrt()
    return mean + ((x - mean) @ eigenvectors * stretch) @ eigenvectors.mT
