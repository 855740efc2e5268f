"""Networks that can be differentiated as often as one likes.

The third derivative of torch's fused layer normalization is silently wrong: its second one holds mean and
deviation fixed (pytorch issue 175754; group normalization is made of simple operations there, and right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AnyOrder(TorchFunctionMode):
    """Within this context layer normalization is made of operations with derivatives of every order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch, or its replacement."""
        chosen = _layer_norm if func in (F.layer_norm, torch.layer_norm) else func
        return chosen(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centered = x - x.mean(axes, keepdim=True)
    out = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
