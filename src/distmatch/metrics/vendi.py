"""The Vendi score: how many different samples a set is worth."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.samples import checked
from distmatch.metrics.moments import scatter
from distmatch.metrics.resampling import group_bounds, kept

_WIDE = 1024
"""Dimensions from which on products and eigenvalues of features in float32 are taken in float32."""
_NOISE = 1e-8
"""What negative eigenvalues may sum to before this is repeated in float64: they are rounding. Over 18 spectra
the score was off by about 16 times their sum, and by 7e-7 at most where that is below this."""


def _directions(x: Tensor) -> Tensor:
    """Unit vectors; a zero feature vector stays zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x)
    return x / norm.masked_fill(norm == 0, 1.0)


def _spectrum(products: Tensor, n: int, precision: torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues, which sum to one, of the kernel matrix of ``n`` samples over n.

    Zero feature vectors have no direction and share an axis of their own, so an eigenvalue. The trace tells
    how many others there are.

    Args:
        products: The inner or the summed outer products of the unit vectors.
        n: Number of samples, with zero vectors.
        precision: Of the decomposition. That the sum is known takes away most of the error of float32.
    """
    trace = products.trace()
    values = torch.linalg.eigvalsh((products / trace.clamp(min=1)).to(precision)).double()
    directed = trace.round() / n
    return torch.cat([values * (directed / values.sum().clamp(min=0.5)), (1 - directed)[None]])


def _exp_entropy(values: Tensor) -> Tensor:
    values = values.clamp(min=0)
    return torch.exp(-torch.xlogy(values, values).sum())


def _from_moments(x: Tensor, groups: int, precision: torch.dtype) -> list[Tensor]:
    """The eigenvalues of all samples, then with each group left out."""

    def moment(rows: Tensor) -> Tensor:
        return scatter(rows, lambda part: _directions(part.to(precision)))

    whole, n = moment(x), len(x)
    found = [_spectrum(whole, n, precision)]
    for low, high in pairwise(group_bounds(n, groups)) if groups > 1 else ():
        found.append(_spectrum(whole - moment(x[low:high]), n - (high - low), precision))
    return found


def vendi_replicates(x: Tensor, groups: int = 1) -> Tensor:
    """The Vendi score of all samples, then with each group left out.

    The (D, D) second moment of the unit vectors has the non-zero spectrum of the (N, N) kernel matrix; the
    smaller of the two is used. From 1024 dimensions on, products and eigenvalues of float32 features are
    float32 where that leaves the score right to about 1e-6; sums over parts of the rows are always float64.

    Args:
        x: Features (N, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    n, dim = x.shape
    if dim > n:
        unit = _directions(x.double())
        kernel = unit @ unit.T
        spectra = [_spectrum(kernel[keep][:, keep], int(keep.sum())) for keep in kept(n, groups, x.device)]
        return torch.stack([_exp_entropy(values) for values in spectra])
    if x.dtype == torch.float32 and dim >= _WIDE:
        spectra = _from_moments(x, groups, torch.float32)
        if all(float(values.clamp(max=0).sum()) > -_NOISE for values in spectra):
            return torch.stack([_exp_entropy(values) for values in spectra])
    return torch.stack([_exp_entropy(values) for values in _from_moments(x, groups, torch.float64)])


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
