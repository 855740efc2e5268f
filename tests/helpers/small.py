"""Small teachers and batches that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import Divergence, divergence
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context
from distmatch.methods.initialization import has_network
from distmatch.methods.table import find_method, resolve_method
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser

PAIR = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2], [0, 1], sigma_max=20.0)
"""An exact teacher with two classes."""


def network_teacher(classes: int = 0, shape: tuple[int, ...] = (2,), dropout: float = 0.0) -> EDMDenoiser:
    """A random, untrained network: the algebra of a step does not care whether its teacher is a good one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(MLPConfig(width=16, depth=2, dropout=dropout), shape, classes)
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=fan_in**-0.5)
    denoiser = EDMDenoiser(net, shape=shape, num_classes=classes, sigma_data=0.7, sigma_max=20.0)
    return denoiser.eval().requires_grad_(False)


def read_by(method: str, **settings: Any) -> dict[str, Any]:
    """Those of some settings that a method has."""
    return {name: value for name, value in settings.items() if name in find_method(method).options()}


def distiller(
    teacher: Denoiser,
    which: str | Divergence | None = None,
    method: str = "f-distill",
    total_steps: int = 40,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> Any:
    """A method with quick settings; keywords are fields of its settings."""
    chosen, name = resolve_method(method, which.name if isinstance(which, Divergence) else which)
    quick = read_by(method, fake_score_steps=2, lr_rampup=0, fit_steps=20)
    return build_method(
        Context(
            teacher=teacher,
            method=chosen,
            divergence=which if isinstance(which, Divergence) else divergence(name),
            settings=chosen.settings(**{**quick, **settings}),
            total_steps=total_steps,
            device=torch.device("cpu"),
            net=None if has_network(teacher) else MLPConfig(width=16, depth=2),
            ranks=ranks,
        )
    )


def batch(step: int, classes: int = 0, n: int = 32, shape: tuple[int, ...] = (2,)) -> Batch:
    """The real samples of a step."""
    gen = torch.Generator().manual_seed(1000 + step)
    x = 0.7 * torch.randn(n, *shape, generator=gen)
    return Batch(x, torch.randint(classes, (n,), generator=gen) if classes else None)
