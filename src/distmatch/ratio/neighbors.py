"""The ratio of two k-nearest-neighbor density estimates."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distmatch.base.checks import check_count
from distmatch.base.neighbors import nearest
from distmatch.ratio.samples import Fitted, high_dimension

_CANDIDATES = (3, 5, 10, 20, 40, 80, 160)
_TRIALS = 2000  # points on each side that k is chosen on
_TINY = 1e-150  # square distances below this count as this: equal points


def fit_neighbors(p: Tensor, q: Tensor, neighbors: int | None) -> Fitted:
    """Log r(x) = d log(rho_q(x) / rho_p(x)) + log(m / n), with rho the distance to the k-th neighbor.

    Args:
        p: Samples of p, (n, d) float64, standardized.
        q: Samples of q, (m, d), likewise.
        neighbors: k; None selects the one with the least logistic loss on the samples themselves, each left
            out of its own neighborhood.

    Raises:
        UserError: k is less than 1 or not smaller than the samples.
    """
    most = min(len(p), len(q)) - 1
    check_count("the number of neighbors", 1 if neighbors is None else neighbors, 1, most)
    d = p.shape[1]
    ks = [k for k in _CANDIDATES if k <= most] if neighbors is None else [neighbors]
    loss = _left_out_losses(p, q, ks)
    best = ks[int(loss.argmin())]
    warnings = list(high_dimension("nearest neighbors", d))
    if bool((_distances(p[:_TRIALS], p, [2]) <= _TINY).any()):
        warnings.append("some samples are equal: the distances, and so the ratio, vanish at them")
    return Fitted(
        lambda x: _log_ratio(x, p, q, best),
        {"neighbors": best, "log_loss": loss.min().item()},
        tuple(warnings),
    )


def _log_ratio(x: Tensor, p: Tensor, q: Tensor, k: int) -> Tensor:
    to_p, to_q = (_distances(x, y, [k])[:, 0] for y in (p, q))
    return 0.5 * x.shape[1] * (to_q.log() - to_p.log()) + math.log(len(q) / len(p))


def _distances(x: Tensor, y: Tensor, ks: list[int], without: Tensor | None = None) -> Tensor:
    """Squared distances (N, len(ks)) from ``x`` to the k-th nearest of ``y``, with gradients."""
    columns = torch.tensor(ks, device=x.device) - 1
    index = nearest(x, y, max(ks), without=without)[1][:, columns]
    return (x[:, None] - y[index]).square().sum(-1).clamp_min(_TINY)


def _left_out_losses(p: Tensor, q: Tensor, ks: list[int]) -> Tensor:
    """Logistic loss of each k, every sample left out of its own neighborhood."""
    a, b = p[:_TRIALS], q[:_TRIALS]  # both are in random order
    itself = torch.arange(_TRIALS, device=p.device)
    own_p, other_p = _distances(a, p, ks, itself[: len(a)]), _distances(a, q, ks)
    own_q, other_q = _distances(b, q, ks, itself[: len(b)]), _distances(b, p, ks)
    half_d = 0.5 * p.shape[1]
    on_p = half_d * (other_p.log() - own_p.log()) + math.log(len(q) / (len(p) - 1))
    on_q = half_d * (own_q.log() - other_q.log()) + math.log((len(q) - 1) / len(p))
    return softplus(-on_p).mean(0) + softplus(on_q).mean(0)
