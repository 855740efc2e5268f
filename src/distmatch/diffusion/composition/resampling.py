"""Weights of particles and their resampling, in float64 and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension: between 1 and the number of particles."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp()


def log_mean_exp(log_w: Tensor) -> Tensor:
    """The logarithm of the mean weight over the last dimension."""
    return log_w.logsumexp(-1) - torch.tensor(log_w.shape[-1], dtype=log_w.dtype).log()


def systematic_indices(log_w: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling: the particle in each slot.

    Particle i gets floor or ceil of K w_i slots, and K w_i on average over ``u``.

    Args:
        log_w: Log weights (P, K) of P populations, not normalized.
        u: One uniform number in [0, 1) for each population, (P,).

    Returns:
        Indices (P, K) int64, ascending.
    """
    k = log_w.shape[-1]
    edges = log_w.softmax(-1).cumsum(-1)
    edges = edges / edges[:, -1:]  # rounding must not leave the last slots empty
    points = (torch.arange(k, dtype=log_w.dtype, device=log_w.device) + u.to(log_w)[:, None]) / k
    return torch.searchsorted(edges, points, right=True).clamp_max(k - 1)
