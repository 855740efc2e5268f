"""Work on the matrix of all pairs in chunks of rows: bounded memory, with and without a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CPU_ELEMENTS = 2**19
_GPU_ELEMENTS = 2**26


def rows_per_chunk(columns: int, device: torch.device) -> int:
    """Rows of a block with that many columns: small enough for the cache of a CPU, large enough for a GPU."""
    return max(1, (_CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS) // max(columns, 1))


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | int) -> Tensor:
    """The value of a function whose inner tensors are computed again in the backward pass, not kept."""
    if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
        result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return result
    return function(*inputs)


def in_chunks(of_rows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Row sums of a matrix with n rows that is never held, (..., n), differentiable in bounded memory.

    Args:
        of_rows: ``of_rows(low, high, *tensors)`` gives them for a chunk of rows, (..., high - low).
        tensors: What it needs; the first has n rows, the longest has as many rows as the matrix has columns.
    """
    n = len(tensors[0])
    step = rows_per_chunk(max(len(t) for t in tensors), tensors[0].device)
    return torch.cat(
        [recomputed(of_rows, low, min(low + step, n), *tensors) for low in range(0, n, step)], -1
    )
