"""The Sinkhorn divergence between two Gaussians in closed form, as a truth to measure estimates against."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError


def _root(matrix: Tensor) -> Tensor:
    """A square root, R R^T; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()


def _spread_cost(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """OT_eps between centered Gaussians, less a constant that the divergence does not see."""
    # The eigenvalues of (4 S^(1/2) T S^(1/2) + eps^2)^(1/2), without half the digits lost to squares.
    mixed = torch.hypot(2 * torch.linalg.svdvals(_root(first).T @ _root(second)), first.new_tensor(eps))
    return (first.trace() + second.trace() - mixed.sum() + eps * (mixed + eps).log().sum()) / 2


def gaussian_sinkhorn(
    mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor, epsilon: float
) -> Tensor:
    """S_eps between N(mean_x, covariance_x) and N(mean_y, covariance_y) under the cost |x - y|^2 / 2.

    Janati et al. 2020, theorem 1, with half their cost and so half their regularization.

    Args:
        mean_x: (d,).
        covariance_x: (d, d), symmetric, positive semidefinite.
        mean_y: (d,).
        covariance_y: (d, d).
        epsilon: Regularization in units of the cost.

    Returns:
        () float64; half the squared Wasserstein-2 distance as ``epsilon`` falls to zero.

    Raises:
        UserError: Shapes that do not fit, or an ``epsilon`` that is not positive.
    """
    check_number("epsilon", epsilon, "(0, inf)")
    d = len(mean_x)
    shapes = [tuple(t.shape) for t in (mean_x, covariance_x, mean_y, covariance_y)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise UserError(
            "means and covariances do not match", got=shapes, expected="(d,), (d, d), (d,), (d, d)"
        )
    apart = mean_x.double() - mean_y.double()
    first, second = covariance_x.double(), covariance_y.double()
    both, of_x, of_y = (
        _spread_cost(*pair, epsilon) for pair in ((first, second), (first, first), (second, second))
    )
    return apart @ apart / 2 + both - (of_x + of_y) / 2
