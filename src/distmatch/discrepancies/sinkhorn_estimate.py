"""The Sinkhorn divergence of two distributions from samples: bias, standard error and their limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.base.samples import checked_pair
from distmatch.discrepancies.sinkhorn import SinkhornResult, sinkhorn_divergence

_LEAST = 16
_DEFAULT_TOL = 1e-3
_LARGEST_BIAS = 1.0
_NOTED_BIAS = 0.5
"""In standard errors: a bias that is not to be trusted however it falls, and one whose fall is looked at."""
_SLOWEST_GROWTH = 1.5
"""Growth of the bias at the second halving over that at the first; 2 if it falls like 1/n."""


def _why_biased(full: float, halves: float, quarters: float, stderr: float) -> str | None:
    """Why the bias read off the half-samples is not all of it, if that may matter."""
    bias = halves - full
    if abs(bias) > _LARGEST_BIAS * stderr:
        return f"the bias, {bias:.2g} by half-samples, is larger than the error bar"
    if abs(bias) > _NOTED_BIAS * stderr and abs(quarters - halves) < _SLOWEST_GROWTH * abs(bias):
        return f"the bias, {bias:.2g} by half-samples, falls more slowly than 1/n"
    return None


def sinkhorn_estimate(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float | None = None,
    tol: float = _DEFAULT_TOL,
    max_iter: int = 1000,
    memory: int = 1 << 30,
) -> Estimate:
    """The Sinkhorn divergence between the two distributions that were sampled, with its standard error.

    The divergence between samples is too large on average, by a part of order 1/n. That part is taken off: it
    is read off the mean divergence between half-samples, which have twice of it. The standard error is the
    first-order one, from the witnesses (del Barrio et al. 2022).

    The result has a warning where the iteration has not converged; where the value is within three standard
    errors of zero, as the error is not normal there; and where the bias is more than a standard error, or
    half of one and decreases more slowly than 1/n, which quarter-samples show: epsilon is then too small for
    n and the dimension.

    Args:
        x: Independent samples (n, d), n >= 16, in random order.
        y: Independent samples (m, d), m >= 16, in random order.
        epsilon: As in :func:`sinkhorn_divergence`.
        tol: L1 error of the marginals at which to stop; an error in the value of about its square is enough.
        max_iter: As in :func:`sinkhorn_divergence`.
        memory: As in :func:`sinkhorn_divergence`.

    Returns:
        The estimate; ``n`` is the smaller number of samples.

    Raises:
        UserError: Samples or settings that are not usable.
    """
    x, y = checked_pair(x.detach(), y.detach(), least=_LEAST)
    results: dict[int, list[SinkhornResult]] = {}
    with torch.no_grad():
        for parts in (1, 2, 4):
            results[parts] = [
                sinkhorn_divergence(
                    x[i::parts], y[i::parts], epsilon=epsilon, tol=tol, max_iter=max_iter, memory=memory
                )
                for i in range(parts)
            ]
            epsilon = results[1][0].epsilon
    full, halves, quarters = (
        math.fsum(float(r.value) for r in group) / len(group) for group in results.values()
    )
    bias = halves - full
    value, stderr = full - bias, results[1][0].stderr
    biased = _why_biased(full, halves, quarters, stderr)
    failed = [r for group in results.values() for r in group if not r.converged]
    warning = None
    if failed:
        warning = (
            f"Sinkhorn stopped after {failed[0].iterations} iterations with a marginal error of "
            f"{failed[0].marginal_error:.1e}; raise max_iter or epsilon"
        )
    elif not value > 3 * stderr:
        warning = "the value is within three standard errors of zero, where its error is not normal"
    elif biased is not None:
        warning = f"{biased}; raise epsilon or use more samples"
    return Estimate(value, stderr, min(len(x), len(y)), warning)
