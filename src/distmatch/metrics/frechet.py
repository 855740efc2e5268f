"""The Frechet distance between two feature sets, each taken as a Gaussian."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.samples import checked_pair
from distmatch.metrics.moments import center_of, congruence, scatter
from distmatch.metrics.resampling import group_bounds, kept

_MOST_EXACT = 1024  # dimensions up to which every group is left out exactly
_ALLOWED = 1e-4
"""Share of the distance up to which a bound of the rounding is accepted; the error is far below the bound."""


def _unless_rounding(traces: Tensor, roots: Tensor, error: Tensor) -> Tensor | None:
    """tr(S + T - 2 (S T)^(1/2)) from tr(S + T) and the square roots of the eigenvalues of S T.

    Args:
        traces: tr(S + T).
        roots: The square roots.
        error: A bound of the error of their sum in units of the rounding of float64.

    Returns:
        The distance; None where it is small next to the bound, so that :func:`_between_factors` is needed.
    """
    distance = traces - 2 * roots.sum()
    rounding = torch.finfo(torch.float64).eps * (error + traces)
    return distance if bool(rounding < _ALLOWED * distance) else None


def _between(s: Tensor, t: Tensor) -> Tensor:
    """tr(S + T - 2 (S T)^(1/2)) of two covariances, from eigenvalues alone where these are exact enough.

    Eigenvalues are right to the rounding of the largest, so a square root r to that over r, or to its root.
    """
    varying = (s.diagonal() > 0) & (t.diagonal() > 0)  # other coordinates add to the traces only
    inner, other = ((m if bool(varying.all()) else m[varying][:, varying]) for m in (s, t))
    lower, failed = torch.linalg.cholesky_ex(inner)
    distance = None
    if len(inner) and not bool(failed):
        roots = torch.linalg.eigvalsh(congruence(lower, other)).clamp(min=0).sqrt()
        least = torch.finfo(torch.float64).eps ** 0.5 * roots[-1]
        error = (roots[-1].square() / roots.clamp(min=least)).sum()
        distance = _unless_rounding(s.trace() + t.trace(), roots, error)
    return _between_factors(_factor(s), _factor(t)) if distance is None else distance


def _between_factors(a: Tensor, b: Tensor) -> Tensor:
    """tr(S + T - 2 (S T)^(1/2)) for S = a^T a and T = b^T b, from factors (k, D) and (l, D).

    It is the least |O a - b|^2 over orthogonal O (the Bures distance), whose O has the singular vectors of b
    a^T. So nothing is squared twice and no large traces are subtracted: a small difference next to a large
    common direction keeps its digits, unlike with the eigenvalues of S^(1/2) T S^(1/2).
    """
    left, _, right = torch.linalg.svd(b @ a.T, full_matrices=False)
    return _apart(a, b, left, right)


def _apart(a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """|O a - b|^2 for the orthogonal O of the singular vectors of b a^T."""
    if len(a) < len(b):
        a, b, left, right = b, a, right.T, left.T
    turned = left @ (right @ a)
    return (turned - b).square().sum() + (a - right.T @ (left.T @ turned)).square().sum()


def _from_samples(a: Tensor, b: Tensor) -> Tensor:
    """The distance without any (D, D) matrix."""
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (x.shape[0] - 1) ** 0.5 for x in (a, b))
    roots = torch.linalg.svdvals(b @ a.T)
    distance = _unless_rounding(a.square().sum() + b.square().sum(), roots, len(roots) * roots[0])
    return shift + (_between_factors(a, b) if distance is None else distance)


def _factor(covariance: Tensor) -> Tensor:
    """F (D, D) with F^T F the covariance; eigenvalues below zero are rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()).T


def _moments(x: Tensor, groups: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of all samples, then with each group left out, from group sums."""
    n = x.shape[0]
    center = center_of(x)
    parts = [x[low:high] for low, high in pairwise(group_bounds(n, groups))]
    sums = [scatter(part, lambda rows: rows.double() - center) for part in parts]
    total = sums[0].clone() if groups == 1 else torch.stack(sums).sum(0)
    result = [(center, total / (n - 1))]
    for part, within in zip(parts, sums, strict=True) if groups > 1 else ():
        m = n - len(part)
        # all samples less their mean sum to zero, so the rest sums to minus the part
        shift = -(center_of(part) - center) * (len(part) / m)
        result.append((center + shift, (total - within - m * torch.outer(shift, shift)) / (m - 1)))
    return result


def _tangent(x: Tensor, weights: Tensor, values: Tensor, groups: int) -> tuple[Tensor, list[Tensor]]:
    """A covariance without each group in tr(P S), and how each moves the mean.

    P = 1 - M is the derivative of the distance by S, where M S M = T. The distance is convex in both
    covariances, so these are lower bounds that differ from it in second order.

    Args:
        x: Centered samples (N, D).
        weights: (N, k) with x M x^T = weights diag(values) weights^T.
        values: (k,).
        groups: Number of groups.
    """
    squares = x.square().sum(1) - weights.square() @ values
    traces, shifts = [], []
    for low, high in pairwise(group_bounds(len(x), groups)):
        m = len(x) - (high - low)
        shift, moved = -x[low:high].sum(0) / m, -weights[low:high].sum(0) / m
        outer = shift.square().sum() - moved.square() @ values
        traces.append((squares.sum() - squares[low:high].sum() - m * outer) / (m - 1))
        shifts.append(shift)
    return torch.stack(traces), shifts


def _linearized(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The distance of all samples, then to first order without each group: one decomposition in all."""
    shift = a.mean(0) - b.mean(0)
    sides = [x - x.mean(0) for x in (a, b)]
    if a.shape[1] > min(len(a), len(b)):
        factors = [x / (len(x) - 1) ** 0.5 for x in sides]
        frames = [(len(x) - 1) ** 0.5 * torch.eye(len(x), dtype=x.dtype, device=x.device) for x in sides]
    else:
        factors, frames = [], []
        for x in sides:
            values, vectors = torch.linalg.eigh(scatter(x, Tensor.double) / (len(x) - 1))
            root = values.clamp(min=0).sqrt()
            inverse = torch.where(root > 1e-7 * root[-1], 1 / root, 0.0)
            factors.append((vectors * root).T)
            frames.append((x @ vectors) * inverse)
    left, values, right = torch.linalg.svd(factors[1] @ factors[0].T, full_matrices=False)
    found = [(right.T, sides[0], frames[0]), (left, sides[1], frames[1])]
    (of_a, by_a), (of_b, by_b) = (_tangent(x, frame @ turn, values, groups) for turn, x, frame in found)
    moved = [(shift + s - t).square().sum() for s, t in zip(by_a, by_b, strict=True)]
    value = shift.square().sum() + _apart(factors[0], factors[1], left, right)
    return torch.cat([value[None], torch.stack(moved) + of_a + of_b])


def frechet_replicates(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """The Frechet distance of all samples, then without each group in both sets.

    Beyond 1024 dimensions the latter are to first order, which takes one decomposition instead of eleven.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    if groups > 1 and a.shape[1] > _MOST_EXACT:
        return _linearized(a.double(), b.double(), groups)
    if a.shape[1] > min(a.shape[0], b.shape[0]):
        a, b = a.double(), b.double()
        masks = zip(kept(a.shape[0], groups, a.device), kept(b.shape[0], groups, b.device), strict=True)
        values = [_from_samples(a[in_a], b[in_b]) for in_a, in_b in masks]
    else:
        values = [
            (mean_a - mean_b).square().sum() + _between(cov_a, cov_b)
            for (mean_a, cov_a), (mean_b, cov_b) in zip(_moments(a, groups), _moments(b, groups), strict=True)
        ]
    return torch.stack(values)


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

    Raises:
        UserError: Fewer than two samples, values that are not finite, or sets of different dimension.
    """
    return float(frechet_replicates(*checked_pair(a, b, names=("a", "b")))[0])
