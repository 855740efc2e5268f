"""Unbiased squared maximum mean discrepancies: the cubic kernel of KID, the Gaussian one of CMMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.samples import checked_pair
from distmatch.metrics.resampling import membership

_ROWS = 2048
_WIDTH = 10.0  # sigma of the kernel of CMMD
_SCALE = 1000.0  # in which its values are published


Kernel = Callable[[Tensor], Tensor]
"""Kernel values of inner products (n, m), whose memory it may use."""


def _group_sums(x: Tensor, y: Tensor, groups: int, kernel_of: Kernel, *, same: bool) -> Tensor:
    """Kernel sums (groups, groups) over pairs of a group of ``x`` and one of ``y`` (same: no self-pairs)."""
    of_x, of_y = (membership(z.shape[0], groups, z.device) for z in (x, y))
    sums = x.new_zeros(groups, groups)
    for low in range(0, x.shape[0], _ROWS):
        rows = x[low : low + _ROWS]
        kernel = kernel_of(rows @ y.T)
        if same:
            kernel.diagonal(low).zero_()
        sums += of_x[low : low + _ROWS].T @ (kernel @ of_y)
    return sums


def _without(sums: Tensor) -> Tensor:
    """The total of a (g, g) matrix, then with row a and column a left out for each a."""
    total = sums.sum()
    if sums.shape[0] == 1:
        return total[None]
    return torch.cat([total[None], total - sums.sum(0) - sums.sum(1) + sums.diagonal()])


def kid_replicates(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """The kernel distance of all samples, then without each group in both sets.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    a, b = a.double(), b.double()
    return _mmd(a, b, groups, lambda products: products.div_(a.shape[1]).add_(1.0).pow_(3))


def cmmd_replicates(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """The discrepancy of CMMD for all samples, then without each group in both sets.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        groups: Number of jackknife groups; 1 for none.

    Returns:
        Float64 (1 + groups,), or (1,) when ``groups`` is 1.
    """
    a, b = (
        x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (a.double(), b.double())
    )
    return _SCALE * _mmd(a, b, groups, lambda cosines: cosines.sub_(1.0).div_(_WIDTH**2).exp_())


def _mmd(a: Tensor, b: Tensor, groups: int, kernel: Kernel) -> Tensor:
    """Unbiased squared discrepancies of float64 points, of all and without each group."""
    sizes = [membership(x.shape[0], groups, x.device).sum(0) for x in (a, b)]
    n, m = (torch.cat([s.sum()[None], s.sum() - s]) if groups > 1 else s for s in sizes)
    within_a = _without(_group_sums(a, a, groups, kernel, same=True)) / (n * (n - 1))
    within_b = _without(_group_sums(b, b, groups, kernel, same=True)) / (m * (m - 1))
    across = _without(_group_sums(a, b, groups, kernel, same=False)) / (n * m)
    return within_a + within_b - 2 * across


def kernel_distance(a: Tensor, b: Tensor) -> float:
    r"""The unbiased estimate of MMD^2 with kernel (x.y / D + 1)^3 (KID, Binkowski et al. 2018).

    Self-pairs are excluded from both inner sums, so the mean over repetitions is zero for equal distributions
    and a single value can be negative.

    Args:
        a: Features (N, D), N >= 2.
        b: Features (M, D), M >= 2.

    Returns:
        The estimate, in units of the kernel.

    Raises:
        UserError: Fewer than two samples, values that are not finite, or sets of different dimension.
    """
    return float(kid_replicates(*checked_pair(a, b, names=("a", "b")))[0])


def cmmd(a: Tensor, b: Tensor) -> float:
    r"""A thousand times the squared MMD of directions with a wide Gaussian kernel (Jayasumana et al. 2024).

    .. math:: k(x, y) = \exp(-|x - y|^2 / (2 \cdot 10^2)), \quad |x| = |y| = 1

    The name CMMD is for embeddings of CLIP (ViT-L/14 at 336 pixels). The published code includes pairs of a
    sample with itself, which adds about 1000 / N times the mean of 1 - k within each set; this estimate is
    unbiased and can be negative.

    Args:
        a: Features (N, D), N >= 2, of any length: they are normalized.
        b: Features (M, D), M >= 2.

    Returns:
        The estimate.

    Raises:
        UserError: Fewer than two samples, values that are not finite, or sets of different dimension.
    """
    return float(cmmd_replicates(*checked_pair(a, b, names=("a", "b")))[0])
