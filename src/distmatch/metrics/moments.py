"""Sums of outer products in float64, from a part of the rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.linalg import blas
from torch import Tensor

_ROWS = 2048
_COLUMNS = 256
"""Columns of a block; of the blocks of a symmetric matrix only those up to the diagonal are computed."""


def _column_blocks(size: int) -> list[slice]:
    return [slice(low, min(low + _COLUMNS, size)) for low in range(0, size, _COLUMNS)]


def _symmetrized(lower: Tensor) -> Tensor:
    """Fills the blocks above the diagonal from those below it, and those on it from their lower triangles."""
    for block in _column_blocks(len(lower)):
        lower[: block.start, block] = lower[block, : block.start].T
        own = lower[block, block]
        own.copy_(own.tril() + own.tril(-1).T)
    return lower


def center_of(x: Tensor) -> Tensor:
    """The mean of the rows in float64."""
    return torch.stack([part.double().sum(0) for part in x.detach().split(_ROWS)]).sum(0) / len(x)


def scatter(x: Tensor, prepared: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of the outer products of rows, float64 (D, D).

    Args:
        x: (N, D).
        prepared: From a part of the rows of ``x`` to the rows that are multiplied, (n, D). Products are in
            their precision; from one part to the next they are summed in float64.
    """
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.detach().split(_ROWS):
        _add_products(total, prepared(part))
    return _symmetrized(total)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Adds the lower triangle of rows^T rows: half of the work of a product, by BLAS on a CPU."""
    if rows.device.type != "cpu":
        for block in _column_blocks(len(total)):
            total[block, : block.stop] += rows[:, block].T @ rows[:, : block.stop]
    elif rows.dtype == torch.float64:  # total.T in Fortran's order is the same memory, and changed in place
        blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=1)
    else:
        total += torch.from_numpy(blas.ssyrk(1.0, rows.numpy().T).T)


def congruence(lower: Tensor, middle: Tensor) -> Tensor:
    """L^T M L for a lower triangular L and a symmetric M, in less than half of the work of two products."""
    blocks = _column_blocks(len(lower))
    right = torch.cat([middle[:, b.start :] @ lower[b.start :, b] for b in blocks], 1)
    result = torch.empty_like(middle)
    for b in blocks:
        result[b, : b.stop] = lower[b.start :, b].T @ right[b.start :, : b.stop]
    return _symmetrized(result)
