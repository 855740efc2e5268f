"""A residual multilayer perceptron, modulated by noise level and class."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.nets.config import MLPConfig
from distmatch.nets.layers import ConditionEmbedding, feature_blocks, modulate, zeroed


class MLPBlock(nn.Module):
    """``h + linear(SiLU(linear(SiLU(norm(h) (1 + scale) + shift))))``; the last linear starts at zero."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.last = zeroed(nn.Linear(width, width))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Maps (B, width) to (B, width)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        inner = self.first(F.silu(modulate(self.norm(hidden), scale, shift)))
        return hidden + self.last(self.dropout(F.silu(inner)))


class MLPTrunk(nn.Module):
    """The hidden part of the perceptron: flattened samples in, hidden states and embedding out.

    Args:
        config: Width, depth, dropout.
        inputs: Numbers per sample.
        num_classes: Number of classes; 0 without.
    """

    def __init__(self, config: MLPConfig, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conditioning = ConditionEmbedding(num_classes, config.width)
        self.first = nn.Linear(inputs, config.width)
        self.blocks = nn.ModuleList(MLPBlock(config.width, config.dropout) for _ in range(config.depth))

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, depth: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the hidden state after each block, each (B, width), and the embedding (B, width).

        Args:
            x: Samples.
            c_noise: Their noise-level input.
            labels: Classes, or None.
            depth: How many blocks are run; None is all of them.
        """
        embedding = self.conditioning(c_noise, labels)
        hidden = self.first(x.flatten(1).to(self.first.weight.dtype))
        states = []
        for block in self.blocks[:depth]:
            hidden = block(hidden, embedding)
            states.append(hidden)
        return states, embedding


class MLP(nn.Module):
    """The perceptron as a network ``net(x, c_noise, labels)``; it flattens samples of any shape.

    Args:
        config: Width, depth, dropout.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 without.
    """

    has_features = True

    def __init__(self, config: MLPConfig, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.features = feature_blocks(config.depth)
        self.trunk = MLPTrunk(config, math.prod(shape), num_classes)
        self.norm = nn.LayerNorm(config.width)
        self.last = zeroed(nn.Linear(config.width, math.prod(shape)))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Output:
        """Maps ``x`` (B, *shape) and ``c_noise`` (B,) to (B, *shape).

        Features are the hidden states (B, width) at about 1/2 and 3/4 of the depth; with ``"only"`` the pass
        stops after the last of these blocks.
        """
        depth = max(self.features) + 1 if return_features == "only" else None
        states, _ = self.trunk(x, c_noise, labels, depth=depth)
        features = [states[i] for i in self.features]
        if return_features == "only":
            return features
        out = self.last(F.silu(self.norm(states[-1]))).reshape(x.shape)
        return (out, features) if return_features else out
