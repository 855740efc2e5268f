"""Symmetric products of matrices in half of the work of a product, and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 5120
_CACHED = 256
"""Rows whose copies in float64 stay in the cache."""
_COLUMNS = 512


def center_of(x: Tensor) -> Tensor:
    """The mean of the rows in float64."""
    parts = (part.double() for part in x.detach().split(_CACHED))
    return torch.stack([part.new_ones(len(part)) @ part for part in parts]).sum(0) / len(x)


def scatter(x: Tensor, prepared: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of the outer products of rows, float64 (D, D).

    Args:
        x: (N, D).
        prepared: From a part of the rows of ``x`` to the rows that are multiplied, (n, D). Products are in
            their precision; from one part to the next they are summed in float64.
    """
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.detach().split(_ROWS):
        rows = torch.cat([prepared(some) for some in part.split(_CACHED)])
        if rows.device.type == "cpu":  # NumPy sees that the product is symmetric, PyTorch does not
            total += torch.from_numpy(rows.numpy().T @ rows.numpy())
        else:
            total += rows.T @ rows
    return total


def congruence(lower: Tensor, middle: Tensor) -> Tensor:
    """L^T M L for a lower triangular L and a symmetric M, in less than half of the work of two products."""
    blocks = [slice(low, min(low + _COLUMNS, len(lower))) for low in range(0, len(lower), _COLUMNS)]
    right = torch.cat([middle[:, b.start :] @ lower[b.start :, b] for b in blocks], 1)
    result = torch.empty_like(middle)
    for b in blocks:
        result[b, : b.stop] = lower[b.start :, b].T @ right[b.start :, : b.stop]
        result[: b.start, b] = result[b, : b.start].T
    return result
