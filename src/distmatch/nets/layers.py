"""Parts that the networks share: conditioning, zero-initialized layers, padding, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Angular frequencies, in radians per unit of c_noise. From sigma 0.002 to 80, c_noise = ln(sigma) / 4 covers
# 2.65 units: the slowest sine is monotone over that range, the fastest turns 5.5 rad when sigma doubles.
_LOWEST, _HIGHEST = 0.5, 32.0
_FREQUENCIES = 32

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def noise_coordinate(sigma: Tensor, unit: float = 1.0) -> Tensor:
    """``c_noise = ln(sigma / unit) / 4`` (Karras et al. 2022, table 1), finite at ``sigma = 0``.

    The table's unit is 1, for data of standard deviation 1/2.
    """
    relative = sigma if unit == 1 else sigma / unit
    return relative.clamp_min(torch.finfo(sigma.dtype).tiny).log() / 4


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype for arithmetic on ``x``: float64 stays, everything shorter becomes float32."""
    return torch.promote_types(x.dtype, torch.float32)


def zeroed(layer: Layer) -> Layer:
    """Sets weight and bias of a layer to zero, so that its branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with at most 32 groups of at least 4 channels each."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x (1 + scale) + shift``, with ``scale`` and ``shift`` already broadcastable."""
    return x * (1 + scale) + shift


def feature_blocks(depth: int) -> tuple[int, ...]:
    """The blocks of a stack whose output is lent as features: those at about 1/2 and 3/4 of the depth."""
    return tuple(sorted({depth // 2, 3 * depth // 4}))


def fourier_features(c_noise: Tensor) -> Tensor:
    """Cosines and sines of ``c_noise`` (B,) at fixed geometric frequencies, (B, 64), at least float32.

    They are computed, not stored, so that ``module.bfloat16()`` cannot round them.
    """
    dtype = at_least_float32(c_noise)
    steps = torch.arange(_FREQUENCIES, device=c_noise.device, dtype=dtype) / (_FREQUENCIES - 1)
    frequencies = _LOWEST * torch.exp(steps * math.log(_HIGHEST / _LOWEST))
    angle = c_noise.to(dtype)[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class Perturbation:
    """Noise on a condition's embedding of size d (CEP, Chen et al. 2024), its norm the same for every d.

    Attributes:
        scale: gamma. Uniform noise is within ``gamma / sqrt(d)`` and has norm ``gamma / sqrt(3)``; normal
            noise has standard deviation ``gamma / sqrt(d)`` and norm gamma.
        kind: ``"uniform"`` or ``"gaussian"``.
    """

    scale: float
    kind: Literal["uniform", "gaussian"] = "uniform"

    def like(self, embedding: Tensor) -> Tensor:
        """Noise for ``embedding`` (B, d)."""
        size = self.scale / math.sqrt(embedding.shape[1])
        if self.kind == "gaussian":
            return size * torch.randn_like(embedding)
        return size * (2 * torch.rand_like(embedding) - 1)


class ConditionEmbedding(nn.Module):
    """Embeds noise level and class label into one vector, and the target noise level if it supports one.

    Args:
        num_classes: Number of classes; the label table has one row more, for "no condition".
        width: Size of the vector.

    Attributes:
        to_level: Embeds the level to jump to; None in a network of one level.
        perturbation: Noise on the label's embedding while training, from torch's global stream; None for
            none. "No condition" stays as it is.
    """

    perturbation: Perturbation | None = None

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.mix = nn.Linear(width, width)
        self.to_level: nn.Linear | None = None

    def add_second_level(self) -> None:
        """Gives it a second noise coordinate, which counts for nothing until it is trained."""
        weight = self.noise.weight
        layer = nn.Linear(2 * _FREQUENCIES, weight.shape[0], bias=False, device=weight.device)
        self.to_level = zeroed(layer).to(weight.dtype).requires_grad_(weight.requires_grad)

    def forward(self, c_noise: Tensor, labels: Tensor | None, text: Tensor | None = None) -> Tensor:
        """Returns (B, width).

        Args:
            c_noise: Noise coordinates (B,), or (B, 2) with that of the level to jump to.
            labels: (B,) int64 with -1 for none, or None for none at all.
            text: A vector that is added, (B, width).
        """
        if labels is None:
            labels = torch.full(c_noise.shape[:1], self.num_classes, device=c_noise.device)
        else:
            labels = torch.where(labels < 0, self.num_classes, labels)
        level = c_noise if self.to_level is None else c_noise[:, 0]
        noise = self.noise(fourier_features(level).to(self.noise.weight.dtype))
        if self.to_level is not None:
            features = fourier_features(c_noise[:, 1]).to(self.to_level.weight.dtype)
            noise = noise + self.to_level(features).to(noise.dtype)
        label = self.label(labels)
        if self.training and self.perturbation is not None:
            named = (labels < self.num_classes)[:, None]
            label = torch.where(named, label + self.perturbation.like(label), label)
        mixed = noise + label if text is None else noise + label + text
        return F.silu(self.mix(F.silu(mixed)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens (B, N, width).

    Args:
        width: Size of a token.
        heads: Number of heads, a divisor of ``width``.
        last_zero: Start with a zero output layer.
    """

    def __init__(self, width: int, heads: int, *, last_zero: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if last_zero:
            zeroed(self.out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns mixed tokens of the same shape."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def channels_first(x: Tensor) -> Tensor:
    """Swaps the axes of sequences or tokens (B, L, D); vectors and maps have their channels first."""
    return x.transpose(1, 2) if x.ndim == 3 else x


def channels_and_sides(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The channels of one sample or feature and its other axes: D, (L,) of (L, D); C, (H, W) of (C, H, W)."""
    return (shape[1], shape[:1]) if len(shape) == 2 else (shape[0], shape[1:])


def convolution(sides: tuple[int, ...]) -> type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]:
    """The layer that convolves over as many axes."""
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sides) - 1]


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, ...]]:
    """Pads maps (B, C, *sides) with zeros, evenly at both ends, to sides that are multiples of ``multiple``.

    A network that halves the resolution a few times, or cuts it into patches, then has only whole sizes, and
    the maps of encoder and decoder always match. Zeros are what the convolutions pad with anyway, so the
    network has only one kind of border. Cropping the result with :func:`crop` undoes it.

    Returns:
        The padded maps, and what was added before the first entry of each side.
    """
    added = [-side % multiple for side in x.shape[2:]]
    offset = tuple(number // 2 for number in added)
    if any(added):
        ends = [(before, number - before) for before, number in zip(offset, added, strict=True)]
        x = F.pad(
            x, [number for pair in reversed(ends) for number in pair]
        )  # torch names the last side first
    return x, offset


def crop(x: Tensor, offset: tuple[int, ...], sides: Sequence[int]) -> Tensor:
    """Cuts maps of these ``sides`` out of ``x`` (B, C, *larger sides), from ``offset`` on."""
    for axis, (start, side) in enumerate(zip(offset, sides, strict=True), start=2):
        x = x.narrow(axis, start, side)
    return x
