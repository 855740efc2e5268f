"""The Frechet distance between two feature sets, each taken as a Gaussian."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distmatch.metrics.resampling import group_bounds, kept


def _trace_root_product(first: Tensor, second: Tensor) -> Tensor:
    """The trace of (S1 S2)^(1/2) of two covariances (D, D), by eigenvalues of S1^(1/2) S2 S1^(1/2)."""
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root.T @ second @ root).clamp(min=0).sqrt().sum()


def _from_samples(a: Tensor, b: Tensor) -> Tensor:
    """The distance without any (D, D) matrix: the trace is the nuclear norm of the centred cross products."""
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a = (a - a.mean(0)) / (a.shape[0] - 1) ** 0.5
    b = (b - b.mean(0)) / (b.shape[0] - 1) ** 0.5
    return shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()


def _moments(x: Tensor, groups: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of all samples, then with each group left out, from group sums."""
    n = x.shape[0]
    centre = x.mean(0)
    centred = x - centre
    total = centred.T @ centred
    edges = group_bounds(n, groups)
    result = [(centre, total / (n - 1))]
    for low, high in pairwise(edges) if groups > 1 else ():
        part = centred[low:high]
        m = n - (high - low)
        shift = -part.sum(0) / m  # all of centred sums to zero, so the rest sums to minus the part
        result.append((centre + shift, (total - part.T @ part - m * torch.outer(shift, shift)) / (m - 1)))
    return result


def frechet_replicates(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """The Frechet distance of all samples, then with each group left out of both sets.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    a, b = a.double(), b.double()
    if a.shape[1] > min(a.shape[0], b.shape[0]):
        masks = zip(kept(a.shape[0], groups, a.device), kept(b.shape[0], groups, b.device), strict=True)
        values = [_from_samples(a[in_a], b[in_b]) for in_a, in_b in masks]
    else:
        values = [
            (mean_a - mean_b).square().sum()
            + cov_a.trace()
            + cov_b.trace()
            - 2 * _trace_root_product(cov_a, cov_b)
            for (mean_a, cov_a), (mean_b, cov_b) in zip(_moments(a, groups), _moments(b, groups), strict=True)
        ]
    return torch.stack(values).clamp(min=0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""The squared 2-Wasserstein distance of the Gaussians fitted to two sets (Heusel et al. 2017).

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(S_a + S_b) - 2\,\mathrm{tr}(S_a S_b)^{1/2}

    Covariances are unbiased (N - 1). The estimate is biased upwards by about 1/N even for equal
    distributions, so compare only values that were taken at the same N.

    Args:
        a: Features (N, D), any N >= 2; D may exceed N.
        b: Features (M, D).

    Returns:
        The distance, in squared units of the features; 0 for identical sets.
    """
    return float(frechet_replicates(a, b)[0])
