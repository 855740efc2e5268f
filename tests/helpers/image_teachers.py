"""Untrained teachers of small images, of every kind of network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import distmatch as dm
from distmatch.data.batches import Batch
from distmatch.interop import teacher_from
from distmatch.interop.edm_checkpoint import Preconditioning, build_edm, network_of
from distmatch.interop.edm_config import EDM2Config, EDMConfig
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from tests.helpers.diffusers_models import schedule, unet
from tests.helpers.edm_pickles import fill
from tests.helpers.own_networks import Conv, OfEDM
from tests.helpers.small import batch

SMALL_NETS: dict[str, NetConfig] = {
    "unet": UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,)),
    "dit": DiTConfig(width=16, depth=2, heads=2, patch=2),
}

EDM: dict[str, Any] = {
    "edm": EDMConfig(
        architecture="song", resolution=8, channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1
    ),
    "edm2": EDM2Config(
        resolution=8, channels=1, num_classes=2, model_channels=8, channel_mult=(1, 2), channels_per_head=8
    ),
}


def image_teacher(name: str) -> Any:
    """An untrained teacher of images (1, 8, 8)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name in SMALL_NETS:
            net = build_net(SMALL_NETS[name], (1, 8, 8), 2)
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
            made: Any = EDMDenoiser(net, shape=(1, 8, 8), num_classes=2, sigma_data=0.5)
        elif name in ("edm", "edm2"):
            made = build_edm(EDM[name], Preconditioning())
            fill(network_of(made))
        elif name == "own":
            made = dm.as_denoiser(Conv(), "vp", "eps", shape=(1, 8, 8), sigma_data=0.5)
        elif name == "edm's code":
            made = dm.as_denoiser(OfEDM(2))
        else:
            made = teacher_from(unet(in_channels=1, out_channels=1, num_class_embeds=2), schedule("ddpm eps"))
    return made.eval().requires_grad_(False)


def images(step: int, teacher: Any, n: int = 4) -> Batch:
    return batch(step, teacher.num_classes, n, teacher.shape)
