"""Layers of the U-Nets of EDM (Karras et al. 2022): resampling convolutions, residual blocks, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.interop.edm_config import ADM, EDMConfig, Stage
from distmatch.nets.layers import at_least_float32

_HALF = math.sqrt(0.5)


def smoothing(taps: tuple[int, ...]) -> Tensor:
    """The separable filter (1, 1, n, n) of unit sum from a list of taps."""
    line = torch.tensor(taps, dtype=torch.float32, device="cpu")  # numbers, even in a network without memory
    return torch.outer(line, line)[None, None] / line.sum() ** 2


def halve(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """Every channel of ``x`` (B, C, H, W) filtered by ``kernel`` (1, 1, n, n), then every second pixel."""
    channels = x.shape[1]
    kernel = kernel.to(x.dtype).expand(channels, -1, -1, -1)
    return F.conv2d(x, kernel, groups=channels, stride=2, padding=padding)


def double(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """The transpose of :func:`halve` times 4, which keeps a constant image constant."""
    channels = x.shape[1]
    kernel = 4 * kernel.to(x.dtype).expand(channels, -1, -1, -1)
    return F.conv_transpose2d(x, kernel, groups=channels, stride=2, padding=padding)


def one_hot(labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Labels (B,) as rows (B, num_classes) in the dtype of ``like`` (B, ...); -1 and None are zeros."""
    if labels is None:
        return like.new_zeros(like.shape[0], num_classes)
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(like.dtype)


class Conv(nn.Module):
    """A convolution, or resampling, or resampling and then a convolution.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the kernel; 0 for resampling only.
        resample: ``"same"``, ``"down"`` or ``"up"``.
        taps: The resampling filter.
        fused: Halve after the convolution, with one border for both, instead of before it.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        resample: str = "same",
        taps: tuple[int, ...] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.fused = resample, fused
        self.pad, self.filter_pad = kernel // 2, (len(taps) - 1) // 2
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(outputs))
            nn.init.xavier_uniform_(self.weight)
        self.register_buffer("resample_filter", None if resample == "same" else smoothing(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H', W')."""
        if self.resample_filter is not None and not self.fused:
            change = halve if self.resample == "down" else double
            x = change(x, self.resample_filter, self.filter_pad)
        if self.weight is not None and self.bias is not None:
            border = self.pad + (self.filter_pad if self.fused else 0)
            if not self.fused or self.resample_filter is None:
                return F.conv2d(x, self.weight, self.bias, padding=border)
            x = halve(F.conv2d(x, self.weight, padding=border), self.resample_filter, 0)
            x = x + self.bias[:, None, None]
        return x


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalization with at most 32 groups of at least 4 channels each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Block(nn.Module):
    """A residual block of both families, with attention where the stage has it.

    DDPM++ adds the conditioning to the activations, scales both sums of a block by sqrt(1/2), and attends
    with one head; ADM modulates by scale and shift, does not scale sums, and has heads of 64 channels.

    Args:
        stage: Channels, attention, resampling.
        embedding: Size of the conditioning vector.
        config: The network's config.
    """

    def __init__(self, stage: Stage, embedding: int, config: EDMConfig) -> None:
        super().__init__()
        inputs, outputs, resample = stage.inputs, stage.outputs, stage.resample
        self.adm = config.architecture == ADM
        eps = 1e-5 if self.adm else 1e-6
        taps = config.resample_filter
        self.dropout = config.dropout
        self.scale = 1.0 if self.adm else _HALF
        self.heads = (outputs // 64 if self.adm else 1) if stage.attention else 0
        self.norm0 = norm(inputs, eps)
        self.conv0 = Conv(inputs, outputs, 3, resample=resample, taps=taps)
        self.affine = nn.Linear(embedding, 2 * outputs if self.adm else outputs)
        self.norm1 = norm(outputs, eps)
        self.conv1 = Conv(outputs, outputs, 3)
        self.skip: Conv | None = None
        if inputs != outputs or resample != "same":
            # ADM resamples the skip path without a convolution where the channels stay.
            kernel = 0 if self.adm and inputs == outputs else 1
            self.skip = Conv(inputs, outputs, kernel, resample=resample, taps=taps)
        if self.heads:
            self.norm2 = norm(outputs, eps)
            self.qkv = Conv(outputs, 3 * outputs, 1)
            self.proj = Conv(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) and (B, E) to (B, outputs, H', W')."""
        inner = self.conv0(F.silu(self.norm0(x)))
        affine = self.affine(embedding)[:, :, None, None]
        if self.adm:
            scale, shift = affine.chunk(2, dim=1)
            inner = F.silu(self.norm1(inner) * (1 + scale) + shift)
        else:
            inner = F.silu(self.norm1(inner + affine))
        inner = self.conv1(F.dropout(inner, self.dropout, self.training))
        x = (inner + (x if self.skip is None else self.skip(x))) * self.scale
        if self.heads:
            x = (self.proj(attend(self.qkv(self.norm2(x)), self.heads)) + x) * self.scale
        return x


def attend(qkv: Tensor, heads: int, normalize: bool = False) -> Tensor:
    """Attention over all pixels; query, key and value are interleaved channel by channel in each head.

    Args:
        qkv: (B, 3 C, H, W).
        heads: Number of heads.
        normalize: Bring each of the three to unit magnitude at each pixel (EDM2).

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = qkv.shape
    parts = qkv.reshape(batch, heads, channels // (3 * heads), 3, height * width)
    if normalize:
        parts = unit(parts, 2)
    q, k, v = (part.transpose(2, 3) for part in parts.unbind(3))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(2, 3).reshape(batch, channels // 3, height, width)


def unit(x: Tensor, dims: int | list[int], eps: float = 1e-4) -> Tensor:
    """``x`` over its root mean square along ``dims`` (EDM2, equation 47); ``eps`` keeps zeros finite."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=at_least_float32(x))
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)
