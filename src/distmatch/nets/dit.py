"""A diffusion transformer with zero-initialized adaptive layer norm (DiT, Peebles & Xie 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.nets.config import DiTConfig
from distmatch.nets.layers import (
    ConditionEmbedding,
    SelfAttention,
    channels_and_sides,
    channels_first,
    crop,
    feature_blocks,
    modulate,
    pad_to_multiple,
    zeroed,
)
from distmatch.nets.text import CrossAttention, TextEmbedding, TextInput


def position_table(grid: Sequence[int], width: int) -> Tensor:
    """Sine-cosine positions of a grid, (points, width), row by row: each axis has an equal part of the width.

    What is left where the width cannot be divided is zero.
    """
    part = width // (2 * len(grid))
    frequencies = 10_000.0 ** (-torch.arange(part) / part)
    parts = []
    for axis, count in enumerate(grid):
        angle = torch.arange(count)[:, None] * frequencies
        along = [count if other == axis else 1 for other in range(len(grid))]
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).reshape(*along, -1)
        parts.append(waves.expand(*grid, -1))
    table = torch.cat(parts, dim=-1).flatten(0, -2)
    return F.pad(table, (0, width - table.shape[1]))


class DiTBlock(nn.Module):
    """Attention and a perceptron, each scaled, shifted and gated by the embedding; gates start at zero.

    With text, attention to it comes between them.
    """

    def __init__(self, width: int, heads: int, *, text: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.to_text = CrossAttention(width, heads) if text else None

    def forward(self, tokens: Tensor, embedding: Tensor, text: Sequence[Tensor] | None = None) -> Tensor:
        """Maps tokens (B, N, width) to (B, N, width); ``text`` is its states and their mask."""
        scale_a, shift_a, gate_a, scale_p, shift_p, gate_p = self.modulation(embedding)[:, None].chunk(
            6, dim=2
        )
        tokens = tokens + gate_a * self.attention(modulate(self.norm(tokens), scale_a, shift_a))
        if self.to_text is not None and text is not None:
            tokens = tokens + self.to_text(self.norm(tokens), *text)
        return tokens + gate_p * self.perceptron(modulate(self.norm(tokens), scale_p, shift_p))


class DiT(nn.Module):
    """The transformer as a network ``net(x, c_noise, labels)`` for sequences, images and video.

    With text it is called as ``net(x, c_noise, labels, text=fields)``: every block attends to the text, and
    its vector is part of the embedding that scales and shifts.

    Args:
        config: Patch, width, depth, heads.
        shape: Shape of one sample: (length, channels), (channels, height, width) or (channels, frames,
            height, width). A patch has one side along all axes; sizes that it does not divide are padded.
        num_classes: Number of classes; 0 without.
        text: The text that it takes; None without.

    Attributes:
        text: The embedding of the text; None without.
    """

    has_features = True

    def __init__(
        self, config: DiTConfig, shape: tuple[int, ...], num_classes: int, text: TextInput | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.features = feature_blocks(config.depth)
        self.channels, sides = channels_and_sides(shape)
        self.grid = tuple(-(-side // config.patch) for side in sides)
        numbers = self.channels * config.patch ** len(sides)  # in a patch
        self.conditioning = ConditionEmbedding(num_classes, config.width)
        self.first = nn.Linear(numbers, config.width)
        self.positions = nn.Parameter(position_table(self.grid, config.width))
        self.blocks = nn.ModuleList(
            DiTBlock(config.width, config.heads, text=text is not None) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(config.width, 2 * config.width))
        self.last = zeroed(nn.Linear(config.width, numbers))
        self.text = None if text is None else TextEmbedding(text, config.width)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
        text: Mapping[str, Tensor] | None = None,
    ) -> Output:
        """Maps ``x`` (B, *shape) and ``c_noise`` (B,) to (B, *shape).

        ``text`` has the fields of :attr:`~distmatch.nets.text.TextInput.spec`; None is the empty prompt.

        Features are the tokens at about 1/2 and 3/4 of the depth: of sequences as they are (B, l, width),
        else as maps (B, width, h, w) or (B, width, t, h, w). A pass for ``"only"`` them leaves out the blocks
        behind the last.
        """
        states_of_text = vector = None
        if self.text is not None:
            *states_of_text, vector = self.text(text or self.text.null_conditioning(x.shape[0]))
        embedding = self.conditioning(c_noise, labels, vector)
        maps = channels_first(x)
        padded, offset = pad_to_multiple(maps, self.config.patch)
        depth = max(self.features) + 1 if return_features == "only" else len(self.blocks)
        states = self._states(padded, embedding, depth, states_of_text)
        features = [self._as_map(states[i]) for i in self.features] if return_features else []
        if return_features == "only":
            return features
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        patches = self.last(modulate(self.norm(states[-1]), scale, shift))
        out = channels_first(crop(self._joined(patches), offset, maps.shape[2:]))
        return (out, features) if return_features else out

    def _as_map(self, tokens: Tensor) -> Tensor:
        return tokens if len(self.grid) == 1 else tokens.transpose(1, 2).unflatten(2, self.grid)

    def _cut(self, maps: Tensor) -> Tensor:
        """Maps (B, C, *sides) as patches (B, N, C * patch^axes)."""
        axes = len(self.grid)
        sides = [size for count in self.grid for size in (count, self.config.patch)]
        apart = maps.reshape(maps.shape[0], self.channels, *sides)  # (B, C, count, patch, count, patch, ...)
        inside, outside = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
        return apart.permute(0, 1, *inside, *outside).flatten(1, 1 + axes).flatten(2).transpose(1, 2)

    def _joined(self, patches: Tensor) -> Tensor:
        """Undoes :meth:`_cut`."""
        axes, patch = len(self.grid), self.config.patch
        apart = patches.transpose(1, 2).reshape(patches.shape[0], self.channels, *[patch] * axes, *self.grid)
        order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
        return apart.permute(0, 1, *order).reshape(
            patches.shape[0], self.channels, *(patch * count for count in self.grid)
        )

    def _states(
        self, padded: Tensor, embedding: Tensor, depth: int, text: list[Tensor] | None
    ) -> list[Tensor]:
        """The tokens (B, N, width) after each of the first ``depth`` blocks."""
        tokens = self.first(self._cut(padded).to(self.first.weight.dtype)) + self.positions
        states = []
        for block in self.blocks[:depth]:
            tokens = block(tokens, embedding, text)
            states.append(tokens)
        return states
