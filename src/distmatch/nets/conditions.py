"""Whatever samples are conditioned on, besides classes, as one vector for each: for discriminators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.diffusion.conditioning import LABEL, ConditioningSpec, FieldSpec
from distmatch.nets.layers import at_least_float32

_ROWS = 4096  # embeddings of integer tokens; those of larger vocabularies share them
_NORMALIZED = 16  # vectors of at least this size are normalized: hidden states have very different scales


class PooledConditions(nn.Module):
    """The fields of a conditioning, each pooled over its tokens, as a vector (B, width).

    Floating fields (L, C) are averaged over the L tokens that a mask of L tokens shows, or that the field
    ``NAME.length`` counts; vectors and single numbers are taken as they are; integer tokens (L,) have an
    embedding each. Fields with ``mask`` in their name, or of booleans, are masks.

    Args:
        spec: The fields; labels are left out.
        width: Size of the vector.
    """

    def __init__(self, spec: ConditioningSpec, width: int) -> None:
        super().__init__()
        sizes = {name: _size(name, field, width) for name, field in spec.items()}
        self.sizes = {name: size for name, size in sizes.items() if size}
        tokens = [name for name in self.sizes if not spec[name].dtype.is_floating_point]
        self.tokens = nn.ModuleDict({_key(name): nn.Embedding(_ROWS, width) for name in tokens})
        self.first, self.last = nn.Linear(sum(self.sizes.values()), width), nn.Linear(width, width)

    def forward(self, conditioning: Mapping[str, Tensor], n: int) -> Tensor:
        """The vectors (n, width).

        Args:
            conditioning: The fields, n rows each; a missing one counts as zeros.
            n: Number of samples.
        """
        like = self.first.weight
        found = [
            self._pooled(name, conditioning) if name in conditioning else like.new_zeros(n, size)
            for name, size in self.sizes.items()
        ]
        out: Tensor = self.last(F.silu(self.first(torch.cat(found, 1).to(like.dtype))))
        return out

    def _pooled(self, name: str, conditioning: Mapping[str, Tensor]) -> Tensor:
        value = conditioning[name]
        if not value.is_floating_point():
            value = self.tokens[_key(name)](value % _ROWS)
        value = value.to(at_least_float32(value)).reshape(
            len(value), -1, value.shape[-1] if value.ndim > 1 else 1
        )
        if value.shape[1] > 1:
            shown = _shown(name, value.shape[1], conditioning)
            value = value.mean(1) if shown is None else (value * shown).sum(1) / shown.sum(1).clamp_min(1)
        value = value.flatten(1)
        return F.layer_norm(value, value.shape[1:]) if value.shape[1] >= _NORMALIZED else value


def pooled_conditions(spec: ConditioningSpec, width: int) -> PooledConditions | None:
    """The pooling for a model that takes these fields; None where nothing but labels has a size."""
    return PooledConditions(spec, width) if any(_size(n, field, width) for n, field in spec.items()) else None


def _shown(name: str, length: int, conditioning: Mapping[str, Tensor]) -> Tensor | None:
    """Weights (B, length, 1) of 1 for the tokens that count, 0 for padding; None where all count."""
    lengths = conditioning.get(f"{name}.length")
    if lengths is not None:
        return (torch.arange(length, device=lengths.device) < lengths[:, None]).float()[..., None]
    masks = [v for other, v in conditioning.items() if _is_mask(other, v.dtype) and v.shape[1:] == (length,)]
    return (masks[0] > 0).float()[..., None] if masks else None


def _is_mask(name: str, dtype: torch.dtype) -> bool:
    return dtype == torch.bool or "mask" in name


def _size(name: str, field: FieldSpec, width: int) -> int:
    """Numbers of a pooled field; 0 for one that is not pooled: labels, masks, counts."""
    if name == LABEL or _is_mask(name, field.dtype):
        return 0
    if not field.dtype.is_floating_point:
        return width if len(field.shape) == 1 else 0
    return max(field.shape[-1], 0) if field.shape else 1


def _key(name: str) -> str:
    return name.replace(".", "_")
