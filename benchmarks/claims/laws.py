"""The exact laws that samplers are held against, and distances of samples to them."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid

F64 = torch.float64
EIGHT = range(8)


def mixture(
    seed: int, dim: int = 4, modes: int = 8, spread: float = 0.1, classes: int = 0
) -> GaussianMixture:
    """A random mixture: means of unit variance, weights that differ by about ten, equal variances."""
    gen = generator(seed, "claims/mixture")
    weights = torch.rand(modes, generator=gen, dtype=F64) + 0.1
    means = torch.randn(modes, dim, generator=gen, dtype=F64)
    labels = [k % classes for k in range(modes)] if classes else None
    return GaussianMixture(weights / weights.sum(), means, torch.full((modes,), spread), labels)


def normal(seed: int, n: int, dim: int = 4) -> Tensor:
    return torch.randn(n, dim, generator=generator(seed, "claims/start"), dtype=F64)


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance of samples."""
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (x, y)]
    return float(2 * between - within[0] - within[1])


def shares(x: Tensor, means: Tensor) -> Tensor:
    """Of the modes, by the nearest mean."""
    counts = torch.cdist(x.to(means.dtype), means).argmin(1).bincount(minlength=len(means)) + 0.5
    return counts / counts.sum()


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q), nats."""
    return float((p * (p / q).log()).sum())


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def karras(steps: int) -> Tensor:
    """EDM's noise levels."""
    return grid("karras", steps, 0.002, 80.0)
