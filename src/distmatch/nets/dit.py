"""A diffusion transformer with zero-initialized adaptive layer norm (DiT, Peebles & Xie 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.nets.config import DiTConfig
from distmatch.nets.layers import (
    Conditioning,
    SelfAttention,
    crop,
    feature_blocks,
    modulate,
    pad_to_multiple,
    zeroed,
)


def position_table(rows: int, columns: int, width: int) -> Tensor:
    """Sine-cosine positions of a grid, (rows * columns, width): one half for the row, one for the column."""
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter) / quarter)

    def waves(count: int) -> Tensor:
        angle = torch.arange(count)[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_row = waves(rows)[:, None].expand(-1, columns, -1)
    by_column = waves(columns)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=2).flatten(0, 1)


class DiTBlock(nn.Module):
    """Attention and a perceptron, each scaled, shifted and gated by the embedding; gates start at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Maps tokens (B, N, width) to (B, N, width)."""
        scale_a, shift_a, gate_a, scale_p, shift_p, gate_p = self.modulation(embedding)[:, None].chunk(
            6, dim=2
        )
        tokens = tokens + gate_a * self.attention(modulate(self.norm(tokens), scale_a, shift_a))
        return tokens + gate_p * self.perceptron(modulate(self.norm(tokens), scale_p, shift_p))


class DiT(nn.Module):
    """The transformer as a network ``net(x, c_noise, labels)``.

    Args:
        config: Patch, width, depth, heads.
        shape: Shape of one image, (channels, height, width); sizes that the patch does not divide are padded.
        num_classes: Number of classes; 0 without.
    """

    has_features = True

    def __init__(self, config: DiTConfig, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.features = feature_blocks(config.depth)
        channels, height, width = shape
        self.grid = (-(-height // config.patch), -(-width // config.patch))
        self.conditioning = Conditioning(num_classes, config.width)
        self.first = nn.Linear(channels * config.patch**2, config.width)
        self.positions = nn.Parameter(position_table(*self.grid, config.width))
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(config.width, 2 * config.width))
        self.last = zeroed(nn.Linear(config.width, channels * config.patch**2))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Output:
        """Maps ``x`` (B, C, H, W) and ``c_noise`` (B,) to (B, C, H, W).

        Features are the tokens at about 1/2 and 3/4 of the depth, as maps (B, width, h, w); a pass for
        ``"only"`` them leaves out the blocks behind the last.
        """
        embedding = self.conditioning(c_noise, labels)
        padded, offset = pad_to_multiple(x, self.config.patch)
        depth = max(self.features) + 1 if return_features == "only" else len(self.blocks)
        states = self._states(padded, embedding, depth)
        features = [self._as_map(states[i]) for i in self.features] if return_features else []
        if return_features == "only":
            return features
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        pixels = self._as_map(self.last(modulate(self.norm(states[-1]), scale, shift)))
        out = crop(F.pixel_shuffle(pixels, self.config.patch), offset, x.shape[-2], x.shape[-1])
        return (out, features) if return_features else out

    def _as_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def _states(self, padded: Tensor, embedding: Tensor, depth: int) -> list[Tensor]:
        """The tokens (B, N, width) after each of the first ``depth`` blocks."""
        patches = F.pixel_unshuffle(padded, self.config.patch).flatten(2).transpose(1, 2)
        tokens = self.first(patches.to(self.first.weight.dtype)) + self.positions
        states = []
        for block in self.blocks[:depth]:
            tokens = block(tokens, embedding)
            states.append(tokens)
        return states
