"""A U-Net in the manner of ADM (Dhariwal & Nichol 2021) and EDM (Karras et al. 2022), for any image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.nets.config import UNetConfig
from distmatch.nets.layers import (
    ConditionEmbedding,
    SelfAttention,
    crop,
    group_norm,
    modulate,
    pad_to_multiple,
    zeroed,
)

_HEAD_WIDTH = 64


class UNetBlock(nn.Module):
    """Two convolutions with a residual path, modulated between them, then optional attention.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        embedding: Size of the conditioning vector.
        attention: Whether self-attention over all pixels follows.
        dropout: Dropout before the second convolution.
        resample: ``"down"`` halves the resolution by averaging, ``"up"`` doubles it by repeating pixels,
            ``"same"`` does neither.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        attention: bool = False,
        dropout: float = 0.0,
        resample: str = "same",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm_out = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention: SelfAttention | None = None
        if attention:
            heads = outputs // _HEAD_WIDTH if outputs % _HEAD_WIDTH == 0 else 1
            self.norm_attention = group_norm(outputs)
            self.attention = SelfAttention(outputs, heads, last_zero=True)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H', W')."""
        inner = self.conv_in(self._resampled(F.silu(self.norm_in(x))))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        inner = F.silu(modulate(self.norm_out(inner), scale, shift))
        # The sum of two paths of about equal size is scaled back, so that the size does not grow with depth.
        x = (self.skip(self._resampled(x)) + self.conv_out(self.dropout(inner))) * math.sqrt(0.5)
        if self.attention is not None:
            tokens = self.norm_attention(x).flatten(2).transpose(1, 2)
            x = (x + self.attention(tokens).transpose(1, 2).reshape(x.shape)) * math.sqrt(0.5)
        return x


class FeatureUNet(nn.Module):
    """What all U-Nets share: how they are called."""

    has_features = True

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Output:
        """Maps ``x`` (B, C, H, W), ``c_noise`` (B,) and labels (B,), -1 for none, to (B, C, H, W).

        Features are one map (B, C_l, H_l, W_l) for each resolution, finest first: the coarsest is that of the
        middle, the others are the last of their level on the way down. A pass for ``"only"`` them leaves out
        the way up.
        """
        out, features = self._run(x, c_noise, labels, whole=return_features != "only")
        if return_features == "only":
            return features
        return (out, features) if return_features else out

    def _run(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The output and the maps; the first is of no use unless the ``whole`` network is run."""
        raise NotImplementedError


class UNet(FeatureUNet):
    """The U-Net as a network ``net(x, c_noise, labels)``.

    Args:
        config: Channels, levels, attention, dropout.
        shape: Shape of one image, (channels, height, width).
        num_classes: Number of classes; 0 without.
    """

    def __init__(self, config: UNetConfig, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.config = config
        channels = [config.width * multiplier for multiplier in config.multipliers]
        levels = len(channels)
        size = 4 * config.width
        attending = config.attention_levels
        self.multiple = 2 ** (levels - 1)
        self.conditioning = ConditionEmbedding(num_classes, size)
        self.first = nn.Conv2d(shape[0], channels[0], 3, padding=1)

        down: list[UNetBlock] = []
        lent = []  # the last block of each level: its output is a feature
        widths = [channels[0]]  # of the maps that the way up will take, in the order they are made
        for level, outputs in enumerate(channels):
            if level:
                down.append(UNetBlock(widths[-1], widths[-1], size, dropout=config.dropout, resample="down"))
                widths.append(widths[-1])
            for _ in range(config.blocks):
                at = level in attending
                down.append(UNetBlock(widths[-1], outputs, size, attention=at, dropout=config.dropout))
                widths.append(outputs)
            lent.append(len(down) - 1)
        self.down, self.lent = nn.ModuleList(down), tuple(lent)

        deepest = channels[-1]
        self.middle = nn.ModuleList(
            UNetBlock(deepest, deepest, size, attention=attention, dropout=config.dropout)
            for attention in (True, False)
        )

        up: list[UNetBlock] = []
        current = deepest
        for level in reversed(range(levels)):
            at, outputs = level in attending, channels[level]
            for _ in range(config.blocks + 1):
                inputs = current + widths.pop()
                up.append(UNetBlock(inputs, outputs, size, attention=at, dropout=config.dropout))
                current = outputs
            if level:
                up.append(UNetBlock(current, current, size, dropout=config.dropout, resample="up"))
        self.up = nn.ModuleList(up)

        self.norm = group_norm(current)
        self.last = zeroed(nn.Conv2d(current, shape[0], 3, padding=1))

    def _run(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        embedding = self.conditioning(c_noise, labels)
        padded, offset = pad_to_multiple(x, self.multiple)
        kept, features = self._way_down(padded, embedding)
        hidden = features[-1]
        if not whole:
            return hidden, features
        for block in self.up:
            if block.resample == "same":
                hidden = torch.cat([hidden, kept.pop()], dim=1)
            hidden = block(hidden, embedding)
        return crop(self.last(F.silu(self.norm(hidden))), offset, x.shape[2:]), features

    def _way_down(self, padded: Tensor, embedding: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps that the way up takes, in the order they are made, and the features."""
        hidden = self.first(padded.to(self.first.weight.dtype))
        kept, features = [hidden], []
        for index, block in enumerate(self.down):
            hidden = block(hidden, embedding)
            kept.append(hidden)
            if index in self.lent:
                features.append(hidden)
        for block in self.middle:
            hidden = block(hidden, embedding)
        features[-1] = hidden
        return kept, features
