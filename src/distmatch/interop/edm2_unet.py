"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024), layer for layer as its checkpoints name it.

Equation numbers are those of the paper. Weights are normalized where they are used (equation 47); the forced
normalization of the stored weights during training (equation 66), which changes no output, is not done here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.interop.edm_blocks import attend, double, halve, one_hot, smoothing, unit
from distmatch.interop.edm_config import EDM2Config, Stage, plan
from distmatch.nets.layers import at_least_float32
from distmatch.nets.unet import FeatureUNet


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over the root mean square it has for unit normal input (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """A weighted sum that keeps the magnitude of two independent inputs (equation 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor, share: float) -> Tensor:
    """A concatenation of channels to which ``b`` contributes ``share`` of the magnitude (equation 103)."""
    size_a, size_b = a.shape[1], b.shape[1]
    scale = math.sqrt(size_a + size_b) / math.hypot(1 - share, share)
    return torch.cat(
        [a * (scale * (1 - share) / math.sqrt(size_a)), b * (scale * share / math.sqrt(size_b))], 1
    )


class MPLayer(nn.Module):
    """A linear layer or convolution without bias whose rows count by their direction only (equation 47).

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the kernel; 0 for a linear layer.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *([kernel, kernel] if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Maps (B, inputs, ...) to (B, outputs, ...)."""
        weight = self.weight.to(at_least_float32(self.weight))
        dims = list(range(1, weight.ndim))
        weight = (unit(weight, dims) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """Random waves of unit magnitude (equation 75); their frequencies are kept in the checkpoint."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(size))
        self.register_buffer("phases", 2 * math.pi * torch.rand(size))

    def forward(self, c_noise: Tensor) -> Tensor:
        """Maps (B,) to (B, size), at least float32."""
        dtype = at_least_float32(c_noise)
        angle = c_noise.to(dtype)[:, None] * self.freqs.to(dtype) + self.phases.to(dtype)
        return angle.cos() * math.sqrt(2)


class MPBlock(nn.Module):
    """A residual block of the encoder or decoder (figure 21).

    Args:
        stage: Channels, attention, resampling.
        embedding: Size of the conditioning vector.
        config: The network's config.
        encoder: Whether it stands in the encoder: there the input is changed and normalized first.
    """

    kernel: Tensor

    def __init__(self, stage: Stage, embedding: int, config: EDM2Config, *, encoder: bool) -> None:
        super().__init__()
        inputs, outputs = stage.inputs, stage.outputs
        self.config, self.encoder, self.resample = config, encoder, stage.resample
        self.kernel_pad = (len(config.resample_filter) - 1) // 2
        if stage.resample != "same":
            # Not a part of the checkpoint: it follows from the config.
            self.register_buffer("kernel", smoothing(config.resample_filter), persistent=False)
        self.heads = outputs // config.channels_per_head if stage.attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPLayer(outputs if encoder else inputs, outputs, 3)
        self.emb_linear = MPLayer(embedding, outputs)
        self.conv_res1 = MPLayer(outputs, outputs, 3)
        self.conv_skip = MPLayer(inputs, outputs, 1) if inputs != outputs else None
        if self.heads:
            self.attn_qkv = MPLayer(outputs, 3 * outputs, 1)
            self.attn_proj = MPLayer(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) and (B, E) to (B, outputs, H', W')."""
        if self.resample != "same":
            x = (halve if self.resample == "down" else double)(x, self.kernel, self.kernel_pad)
        if self.encoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        inner = self.conv_res0(mp_silu(x))
        scale = 1 + self.emb_linear(embedding, self.emb_gain)
        inner = mp_silu(inner * scale[:, :, None, None])
        inner = self.conv_res1(F.dropout(inner, self.config.dropout, self.training))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, inner, self.config.res_balance)
        if self.heads:
            mixed = attend(self.attn_qkv(x), self.heads, normalize=True)
            x = mp_sum(x, self.attn_proj(mixed), self.config.attn_balance)
        limit = self.config.clip_act
        return x if limit is None else x.clamp(-limit, limit)


class EDM2UNet(FeatureUNet):
    """A network ``net(x, c_noise, labels)`` with the layers of an EDM2 checkpoint.

    Args:
        config: Which network.
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        levels = [config.model_channels * multiplier for multiplier in config.channel_mult]
        noise = config.model_channels * config.channel_mult_noise if config.channel_mult_noise else levels[0]
        size = config.model_channels * config.channel_mult_emb if config.channel_mult_emb else max(levels)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPLayer(noise, size)
        if config.num_classes:
            self.emb_label = MPLayer(config.num_classes, size)
        encoder, decoder = plan(config)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.lent: set[str] = set()  # the last stage of each level on the way down: its output is a feature
        for stage, following in zip(encoder, [*encoder[1:], None], strict=True):
            if stage.name.endswith("_conv"):
                self.enc[stage.name] = MPLayer(stage.inputs, stage.outputs, 3)
            else:
                self.enc[stage.name] = MPBlock(stage, size, config, encoder=True)
            if following is None or following.resample == "down":
                self.lent.add(stage.name)
        for stage in decoder:
            self.dec[stage.name] = MPBlock(stage, size, config, encoder=False)
        self.joining = {stage.name for stage in decoder if stage.joins}
        self.out_conv = MPLayer(decoder[-1].outputs, config.channels, 3)

    def _embedding(self, c_noise: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The conditioning vector (B, E)."""
        vector = self.emb_noise(self.emb_fourier(c_noise).to(dtype))
        count = self.config.num_classes
        if count:
            rows = one_hot(labels, count, vector) * math.sqrt(count)
            vector = mp_sum(vector, self.emb_label(rows), self.config.label_balance)
        return mp_silu(vector)

    def _run(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        dtype = self.out_conv.weight.dtype
        embedding = self._embedding(c_noise, labels, dtype)
        hidden = torch.cat([x.to(dtype), x.new_ones(x.shape[0], 1, *x.shape[2:], dtype=dtype)], dim=1)
        kept: list[Tensor] = []
        features: list[Tensor] = []
        for name, stage in self.enc.items():
            hidden = stage(hidden) if name.endswith("_conv") else stage(hidden, embedding)
            kept.append(hidden)
            if name in self.lent:
                features.append(hidden)
        for name, stage in self.dec.items():
            if name in self.joining:
                hidden = mp_cat(hidden, kept.pop(), self.config.concat_balance)
            hidden = stage(hidden, embedding)
            if name.endswith("_in1"):
                features[-1] = hidden
                if not whole:
                    break
        return (self.out_conv(hidden, self.out_gain) if whole else hidden), features
