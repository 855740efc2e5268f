"""The Vendi score: how many different samples a set is worth."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.samples import checked
from distmatch.metrics.resampling import group_bounds, kept


def _directions(x: Tensor) -> Tensor:
    """Unit vectors (N, D + 1): a zero feature vector has no direction and becomes the extra axis."""
    norm = x.norm(dim=1, keepdim=True)
    zero = norm == 0
    return torch.cat([x / norm.masked_fill(zero, 1.0), zero.to(x)], dim=1)


def _exp_entropy(kernel: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(kernel).clamp(min=0)
    return torch.exp(-torch.xlogy(values, values).sum())


def vendi_replicates(x: Tensor, groups: int = 1) -> Tensor:
    """The Vendi score of all samples, then with each group left out.

    The (D, D) second moment of the unit vectors has the non-zero spectrum of the (N, N) kernel matrix; the
    smaller of the two is used.

    Args:
        x: Features (N, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    unit = _directions(x.double())
    n, dim = unit.shape
    if dim > n:
        kernel = unit @ unit.T
        return torch.stack(
            [_exp_entropy(kernel[keep][:, keep] / keep.sum()) for keep in kept(n, groups, x.device)]
        )
    moment = unit.T @ unit
    values = [_exp_entropy(moment / n)]
    edges = group_bounds(n, groups)
    for low, high in pairwise(edges) if groups > 1 else ():
        part = unit[low:high]
        values.append(_exp_entropy((moment - part.T @ part) / (n - (high - low))))
    return torch.stack(values)


def vendi_score(x: Tensor) -> float:
    r"""The Vendi score of order 1 with the cosine kernel (Friedman and Dieng 2022).

    .. math:: \exp(-\sum_i \lambda_i \log \lambda_i), \quad \lambda = \mathrm{eig}(K / n)

    K holds the cosines of all pairs. The score is 1 for identical samples, n for orthogonal ones, and does
    not change when the whole set is duplicated. It grows with n: compare only values that were taken at the
    same n.

    Args:
        x: Features (N, D).

    Returns:
        The score, between 1 and min(N, D + 1).

    Raises:
        UserError: No samples, or values that are not finite.
    """
    return float(vendi_replicates(checked(x, "x", least=1))[0])
