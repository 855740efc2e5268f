"""Samples of two Gaussians and the truth about their ratio, for the tests of fitted ratios."""

import math

import torch

SHIFT, SCALE = 0.7, 0.8


def draw(n, d, seed, shift=SHIFT, scale=SCALE, dtype=torch.float64):
    """n samples of N(shift, scale^2 I)."""
    g = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=g, dtype=dtype)


def truth(x, shift=SHIFT, scale=SCALE):
    """log N(shift, scale^2 I) - log N(0, I)."""
    return (-0.5 * ((x - shift) / scale) ** 2 - math.log(scale) + 0.5 * x**2).sum(1)


def error(ratio, x):
    return (ratio.log_ratio(x) - truth(x)).square().mean().sqrt().item()


def quick(method, steps=60):
    """Options that keep the network of a method short."""
    return {"steps": steps} if method in ("classifier", "telescoping") else {}
