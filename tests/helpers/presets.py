"""A teacher that is trained here, and the warnings of a distillation of it."""

from __future__ import annotations

import numpy as np
import torch

from distmatch.data import Dataset, from_arrays
from distmatch.diffusion.denoiser import Denoiser
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.options import DistillOptions
from distmatch.training.prepare import prepare_distillation


def own_teacher() -> EDMDenoiser:
    """An untrained network with classes, as one that was trained here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(MLPConfig(width=16, depth=1), (2,), 3)
    return EDMDenoiser(net, shape=(2,), num_classes=3, sigma_data=0.5).eval().requires_grad_(False)


def points() -> Dataset:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).numpy()
    return from_arrays(x, np.arange(40) % 3)


def warned(options: DistillOptions, teacher: Denoiser, data: Dataset) -> list[str]:
    job = prepare_distillation(options, teacher, data)
    return [message for message in job.warnings if "--preset" in message]
