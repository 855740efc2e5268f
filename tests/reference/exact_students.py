"""Linear students x0 = m + A z of exact teachers, for which everything is known.

Losses are integrated over (z, eps) by Gauss-Hermite quadrature in float64, with teacher and fake score as
frozen functions of x_t; the truth is central differences of integrals over the densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import Divergence

GAUSSIAN = GaussianMixture([1.0], [[0.0]], [1.3])
MIXTURE = GaussianMixture([0.4, 0.6], [[-0.7], [0.9]], [0.5, 0.8])
PLANE = GaussianMixture(
    [0.35, 0.65], [[-0.6, 0.2], [0.5, -0.3]], [[[0.6, 0.1], [0.1, 0.9]], [[0.8, -0.2], [-0.2, 0.6]]]
)
THETA_1D = torch.tensor([0.4, 0.9], dtype=torch.float64)
THETA_2D = torch.tensor([0.2, 0.1, 0.8, 0.15, -0.1, 0.75], dtype=torch.float64)


def student(theta: Tensor) -> GaussianMixture:
    """The law of m + A z for theta = (m, A)."""
    d = 1 if len(theta) == 2 else 2
    a = theta[d:].reshape(d, d)
    return GaussianMixture([1.0], theta[None, :d], (a @ a.T)[None])


@dataclass(frozen=True)
class Exact:
    """What a loss may look at, hanging on the student's samples, from networks that are perfect."""

    teacher: Tensor
    fake: Tensor
    x0: Tensor
    x: Tensor
    sigma: Tensor
    log_r: Tensor


def hermite(nodes: int, dims: int) -> tuple[Tensor, Tensor]:
    """Nodes (N, dims) and weights (N,) for the mean over a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.cartesian_prod(*[torch.as_tensor(x)] * dims)
    masses = torch.cartesian_prod(*[torch.as_tensor(w / math.sqrt(2 * math.pi))] * dims)
    points, weights = points.reshape(-1, dims), masses.reshape(-1, dims).prod(dim=1)
    keep = weights > 1e-60  # far out nothing is left of the weight, and ratios overflow
    return points[keep], weights[keep]


def mean_and_gradient(
    loss: Callable[[Exact], Tensor], teacher: GaussianMixture, theta: Tensor, sigma: float, nodes: int
) -> tuple[Tensor, Tensor]:
    """The mean of a loss over (z, eps), and its gradient by theta, networks frozen."""
    d = teacher.shape[0]
    points, mass = hermite(nodes, 2 * d)
    theta = theta.clone().requires_grad_()
    x0 = theta[:d] + points[:, :d] @ theta[d:].reshape(d, d).T
    x = x0 + sigma * points[:, d:]
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    fake = student(theta.detach())
    log_r = teacher.log_prob(x, level) - fake.log_prob(x, level)
    mean = (mass * loss(Exact(teacher(x, level), fake(x, level), x0, x, level, log_r))).sum()
    return mean.detach(), torch.autograd.grad(mean, theta)[0]


def differences(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 3e-5) -> Tensor:
    """Central differences of a function of a vector; the error is of order step^2 = 1e-9."""
    shifts = step * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(value(at + e) - value(at - e)) / (2 * step) for e in shifts])


def grid(dims: int) -> tuple[Tensor, float]:
    """Points for integrals over the densities, and the size of a cell: exact for densities this smooth."""
    axis = torch.linspace(-22, 22, 1201) if dims == 1 else torch.linspace(-11, 11, 181)
    axis = axis.double()
    x = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
    return x, float(axis[1] - axis[0]) ** dims


def scores(teacher: GaussianMixture, theta: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log r and the score difference at x."""
    own = student(theta)
    log_p, log_q = teacher.log_prob(x, sigma), own.log_prob(x, sigma)
    return log_q, log_p - log_q, teacher.score(x, sigma) - own.score(x, sigma)


def expanded(measure: Divergence, teacher: GaussianMixture, sigma: float) -> Callable[[Tensor], Tensor]:
    """theta -> E_q[h(r) |s_p - s_q|^2] at a noise level."""
    x, cell = grid(teacher.shape[0])

    def value(theta: Tensor) -> Tensor:
        log_q, log_r, delta = scores(teacher, theta, x, sigma)
        # Far out, where 22 spreads leave q no digits, h may overflow: log r is held where q h is still 0.
        h = measure.weight(log_r.clamp(-200, 200))
        return cell * (log_q.exp() * h * delta.square().sum(1)).sum()

    return value
