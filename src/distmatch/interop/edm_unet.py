"""The U-Nets of EDM (Karras et al. 2022), DDPM++, NCSN++ and ADM, with the layer names of its checkpoints.

Sizes and formulas are those of Song et al. 2021 (appendix H), Dhariwal & Nichol 2021 and EDM, appendix F.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.interop.edm_blocks import Block, Conv, norm, one_hot
from distmatch.interop.edm_config import ADM, EDMConfig, plan
from distmatch.nets.layers import at_least_float32
from distmatch.nets.unet import FeatureUNet

_HALF = math.sqrt(0.5)


class _Fourier(nn.Module):
    """Frequencies of NCSN++, random when it was trained and kept in the checkpoint."""

    freqs: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(size // 2))


class EDMUNet(FeatureUNet):
    """A network ``net(x, c_noise, labels)`` with the layers of an EDM checkpoint.

    Augmentation labels, which these networks use in training only, are zero when sampling and omitted here.

    Args:
        config: Which network.
    """

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        self.song = config.architecture != ADM
        size = config.model_channels * config.channel_mult_emb
        self.noise_size = config.model_channels * config.channel_mult_noise
        if config.embedding == "fourier":
            self.map_noise = _Fourier(self.noise_size)
        self.map_layer0 = nn.Linear(self.noise_size, size)
        self.map_layer1 = nn.Linear(size, size)
        if config.num_classes:
            target = self.noise_size if self.song else size
            self.map_label = nn.Linear(config.num_classes, target, bias=self.song)
        encoder, decoder = plan(config)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.lent: set[str] = set()  # the last stage of each level on the way down: its output is a feature
        previous = config.channels
        for stage, following in zip(encoder, [*encoder[1:], None], strict=True):
            if stage.name.endswith("_conv"):
                self.enc[stage.name] = Conv(stage.inputs, stage.outputs, 3)
            else:
                self.enc[stage.name] = Block(stage, size, config)
            if stage.resample == "down" and config.residual_encoder:
                self.enc[stage.name.replace("down", "aux_residual")] = Conv(
                    previous, stage.outputs, 3, resample="down", taps=config.resample_filter, fused=True
                )
                previous = stage.outputs
            if following is None or following.resample == "down":
                self.lent.add(stage.name)
        for stage in decoder:
            self.dec[stage.name] = Block(stage, size, config)
        self.joining = {stage.name for stage in decoder if stage.joins}
        width = decoder[-1].outputs
        final, last = norm(width, 1e-6 if self.song else 1e-5), Conv(width, config.channels, 3)
        if self.song:
            side = f"{config.resolution}x{config.resolution}"
            self.dec[f"{side}_aux_norm"], self.dec[f"{side}_aux_conv"] = final, last
        else:
            self.out_norm, self.out_conv = final, last

    def _embedding(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """The conditioning vector (B, E) in the dtype of the weights."""
        dtype = at_least_float32(c_noise)
        half = self.noise_size // 2
        if self.config.embedding == "fourier":
            frequencies = 2 * math.pi * self.map_noise.freqs.to(dtype)
        else:
            # Frequencies from 1 down to 1/10000: reached by DDPM++, approached by ADM.
            steps = torch.arange(half, device=c_noise.device, dtype=dtype) / (half - 1 if self.song else half)
            frequencies = 10000.0**-steps
        angle = c_noise.to(dtype)[:, None] * frequencies
        waves = [angle.sin(), angle.cos()] if self.song else [angle.cos(), angle.sin()]
        weight = self.map_layer0.weight
        vector = torch.cat(waves, dim=1).to(weight.dtype)
        count = self.config.num_classes
        if count and self.song:
            # Rows of unit variance: a one-hot vector times the root of its length.
            vector = vector + self.map_label(one_hot(labels, count, vector) * math.sqrt(count))
        vector = self.map_layer1(F.silu(self.map_layer0(vector)))
        if count and not self.song:
            vector = vector + self.map_label(one_hot(labels, count, vector))
        return F.silu(vector)

    def _run(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        embedding = self._embedding(c_noise, labels)
        hidden = image = x.to(self.map_layer0.weight.dtype)
        kept: list[Tensor] = []
        features: list[Tensor] = []
        for name, stage in self.enc.items():
            if name.endswith("_aux_residual"):
                image = (hidden + stage(image)) * _HALF
                hidden = kept[-1] = image
                continue
            hidden = stage(hidden) if name.endswith("_conv") else stage(hidden, embedding)
            kept.append(hidden)
            if name in self.lent:
                features.append(hidden)
        for name, stage in self.dec.items():
            if name.endswith("_aux_norm"):
                hidden = F.silu(stage(hidden))
            elif name.endswith("_aux_conv"):
                hidden = stage(hidden)
            else:
                if name in self.joining:
                    hidden = torch.cat([hidden, kept.pop()], dim=1)
                hidden = stage(hidden, embedding)
                if name.endswith("_in1"):
                    features[-1] = hidden
                    if not whole:
                        break
        if whole and not self.song:
            hidden = self.out_conv(F.silu(self.out_norm(hidden)))
        return hidden, features
