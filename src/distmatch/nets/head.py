"""Discriminators that give log r = log p_teacher - log q_student as a logit, starting at exactly r = 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, ConditioningSpec, as_conditioning
from distmatch.diffusion.denoiser import expand
from distmatch.nets.conditions import pooled_conditions
from distmatch.nets.config import MLPConfig
from distmatch.nets.layers import (
    ConditionEmbedding,
    at_least_float32,
    channels_and_sides,
    channels_first,
    convolution,
    group_norm,
    noise_coordinate,
    zeroed,
)
from distmatch.nets.mlp import MLPTrunk


class Projection(nn.Module):
    """``logit = <hidden, w(e)> / sqrt(width) + b(e)``, with w and b linear in the embedding e, zero at first.

    The projection discriminator of Miyato & Koyama (2018), here on class and noise level together: each
    noise level may have its own offset, which a ratio needs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = zeroed(nn.Linear(width, width + 1))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Maps two (B, width) to logits (B,), summed in float32 or better."""
        direction = self.last(embedding)
        dtype = at_least_float32(direction)
        weight, bias = direction[:, :-1].to(dtype), direction[:, -1].to(dtype)
        return (hidden.to(dtype) * weight).sum(dim=1) / math.sqrt(hidden.shape[1]) + bias


def _map_head(shape: tuple[int, ...], width: int) -> nn.Sequential:
    """Strided convolutions that bring tokens (C, N) or a map (C, H, W) or (C, T, H, W) to (width,).

    A kernel of 3 with padding 1 halves sizes upwards (7, 4, 2, 1), so every size ends at one point.
    """
    channels, sides = channels_and_sides(shape)
    conv = convolution(sides)
    layers: list[nn.Module] = [conv(channels, width, 1), group_norm(width), nn.SiLU()]
    for _ in range(math.ceil(math.log2(max(sides)))):
        layers += [conv(width, width, 3, stride=2, padding=1), group_norm(width), nn.SiLU()]
    # A sequence of another length than that of the trial may end at more than one point.
    return nn.Sequential(*layers, _Mean())


class _Mean(nn.Module):
    """Means over all positions of maps (B, C, ...); a map of one point is that point."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat[..., 0] if flat.shape[2] == 1 else flat.mean(2)


def _vector_head(shape: tuple[int, ...], width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(shape[0], width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )


class RatioHead(nn.Module):
    """Small heads on the features of a (frozen) denoiser; their logits are averaged.

    The average of log-ratios is the geometric mean of the ratios. The last layers start at zero, so that the
    ratio is exactly 1 before any training, whatever the features.

    Args:
        feature_shapes: Shapes of the features without batch, each a vector (C,), tokens (N, C), a map
            (C, H, W) or a map in space and time (C, T, H, W).
        num_classes: Number of classes; 0 without.
        width: Channels inside the heads.
        noise_unit: Unit of the noise levels, as of :class:`~distmatch.nets.edm.EDMDenoiser`.
        conditions: The fields of the conditioning that the denoiser takes; labels among them are those of
            ``num_classes``. All are part of the ratio, which is that of the distributions given them.

    Raises:
        UserError: There is no feature, or one is neither a vector nor tokens nor a map.
    """

    def __init__(
        self,
        feature_shapes: Sequence[tuple[int, ...]],
        num_classes: int,
        *,
        width: int = 64,
        noise_unit: float = 1.0,
        conditions: ConditioningSpec | None = None,
    ) -> None:
        super().__init__()
        self.noise_unit = noise_unit
        if not feature_shapes or any(len(shape) not in (1, 2, 3, 4) for shape in feature_shapes):
            raise UserError(
                "a ratio head needs features that are vectors, tokens or maps",
                got=f"shapes {list(feature_shapes)}",
                expected="one or more of (C,), (N, C), (C, H, W) or (C, T, H, W)",
                fix="use a separate network for the ratio if the teacher has no features",
            )
        self.conditioning = ConditionEmbedding(num_classes, width)
        self.heads = nn.ModuleList(
            _map_head(shape, width) if len(shape) > 1 else _vector_head(shape, width)
            for shape in feature_shapes
        )
        self.projections = nn.ModuleList(Projection(width) for _ in feature_shapes)
        self.pooled = pooled_conditions(conditions or {}, width)

    def forward(
        self, features: Sequence[Tensor], sigma: Tensor, conditioning: ConditioningLike = None
    ) -> Tensor:
        """Returns log r (B,) in float32 or better.

        Args:
            features: Those of the denoiser for x at ``sigma``, in the order of ``feature_shapes``.
            sigma: Noise levels (B,).
            conditioning: Classes (B,) int64, -1 for none, or a conditioning.
        """
        conditioning = as_conditioning(conditioning)
        level = noise_coordinate(sigma.to(at_least_float32(sigma)), self.noise_unit)
        text = None if self.pooled is None else self.pooled(conditioning, len(sigma))
        embedding = self.conditioning(level, conditioning.label, text)
        dtype = self.conditioning.mix.weight.dtype
        logits = [
            projection(head(channels_first(feature.to(dtype))), embedding)
            for feature, head, projection in zip(features, self.heads, self.projections, strict=True)
        ]
        return torch.stack(logits).mean(dim=0)


class RatioNet(nn.Module):
    """A discriminator with its own encoder, for teachers without features.

    Args:
        shape: Shape of one sample.
        num_classes: Number of classes; 0 without.
        width: Hidden units.
        depth: Residual blocks.
        sigma_data: Standard deviation of the data; inputs are scaled by ``1 / sqrt(sigma^2 + sigma_data^2)``,
            and noise levels are given in units of twice that.
        conditions: As for :class:`RatioHead`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        sigma_data: float = 0.5,
        conditions: ConditioningSpec | None = None,
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.trunk = MLPTrunk(MLPConfig(width=width, depth=depth), math.prod(shape), num_classes)
        self.norm = nn.LayerNorm(width)
        self.projection = Projection(width)
        self.pooled = pooled_conditions(conditions or {}, width)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """Returns log r (B,) of ``x`` (B, *shape) at levels ``sigma`` (B,), in float32 or better."""
        dtype = at_least_float32(x)
        sigma = sigma.to(dtype)
        c_in = (expand(sigma, x) ** 2 + self.sigma_data**2).rsqrt()
        level = noise_coordinate(sigma, 2 * self.sigma_data)
        conditioning = as_conditioning(conditioning)
        states, embedding = self.trunk(x.to(dtype) * c_in, level, conditioning.label)
        if self.pooled is not None:
            embedding = embedding + self.pooled(conditioning, len(x))
        return self.projection(F.silu(self.norm(states[-1])), embedding)
