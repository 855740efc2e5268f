"""Exact consistency functions of Gaussians, and random networks in float64, for the tests of that family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmatch.losses import scm_tangent, trigflow_speed
from distmatch.methods.consistency.tangents import derivative_along
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser

F64 = torch.float64
SIGMA = torch.tensor([0.002, 0.03, 0.4, 1.0, 5.0, 80.0], dtype=F64)
VARIANCES = [(0.5, 0.25), (0.5, 1.7), (1.0, 1.0), (0.8, 0.04)]
"""(sigma_data, true variance): sigma_data is a setting and need not be right."""


class Flow(nn.Module):
    """The exact jump denoiser of N(0, v): g with (s/t) y + (1 - s/t) g = y sqrt((v + s^2) / (v + t^2))."""

    def __init__(self, variance: float, gain: float = 0.0) -> None:
        super().__init__()
        self.variance, self.jumps = variance, True
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))

    def forward(
        self, y: Tensor, sigma: Tensor, labels: Tensor | None = None, *, target_sigma: Tensor | None = None
    ) -> Tensor:
        """With a gain the function is wrong by a smooth factor, but right at level 0."""
        t, to = sigma[:, None], target_sigma
        s = torch.zeros_like(t) if to is None else to[:, None]
        if to is not None and torch.equal(to, sigma):
            exact = self.variance * y / (self.variance + t**2)
        else:
            share = s / t
            exact = y * (((self.variance + s**2) / (self.variance + t**2)).sqrt() - share) / (1 - share)
        return exact * (1 + self.gain * t / (1 + t))


def noisy(variance: float, n: int = 3) -> tuple[Tensor, Tensor]:
    """Samples of N(0, v) at each level of SIGMA."""
    sigma = SIGMA.repeat_interleave(n)
    z = torch.randn(len(sigma), 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    return z * (variance + sigma[:, None] ** 2).sqrt(), sigma


def posterior_mean(y: Tensor, sigma: Tensor, variance: float) -> Tensor:
    """The exact denoiser of N(0, v)."""
    return variance * y / (variance + sigma[:, None] ** 2)


def tangent_of(
    student: nn.Module, y: Tensor, sigma: Tensor, target: Tensor, sd: float, rho: float = 1.0
) -> Tensor:
    """sCM's tangent in units of sigma_data, by forward mode."""
    speed = trigflow_speed(sigma, sd)
    slope = (speed / sigma)[:, None] * (y - target)
    value, derivative = derivative_along(student, y, sigma, slope, speed)
    return scm_tangent(value, target, derivative, sigma, sd, rho)


NETS: list[tuple[NetConfig, tuple[int, ...]]] = [
    (MLPConfig(width=16, depth=2), (2,)),
    (UNetConfig(width=8, multipliers=(1, 2), blocks=1), (1, 4, 4)),
    (DiTConfig(width=16, depth=2, heads=2), (1, 4, 4)),
]


def network(config: NetConfig, shape: tuple[int, ...], classes: int = 0) -> EDMDenoiser:
    """A random network whose every layer matters."""
    torch.manual_seed(0)
    net = build_net(config, shape, classes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=(parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
    return EDMDenoiser(net, shape=shape, num_classes=classes).double().eval()


def rectified(sigma: Tensor, sd: float) -> Tensor:
    """Time on the straight path."""
    return sigma / (sigma + sd)
