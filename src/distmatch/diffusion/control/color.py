"""Colorization: grey is one coordinate of an orthonormal frame of colors (Song et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.control.linear import LinearMap


def color_frame() -> Tensor:
    """An orthonormal (3, 3) float64 matrix whose first column is (1, 1, 1) / sqrt 3."""
    columns = [[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]
    frame = torch.tensor(columns, dtype=torch.float64)
    return (frame / frame.norm(dim=1, keepdim=True)).mT


def to_frame(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in the frame: channel 0 is sqrt 3 times grey, 1 and 2 hold the color."""
    return torch.einsum("cf,bchw->bfhw", color_frame().to(x), x)


def from_frame(x: Tensor) -> Tensor:
    """The inverse of :func:`to_frame`."""
    return torch.einsum("cf,bfhw->bchw", color_frame().to(x), x)


def grey_map(shape: tuple[int, ...]) -> LinearMap:
    """Channel 0 of the frame, (B, 1, H, W), as a measurement of pictures; see :func:`grey_value`.

    Raises:
        UserError: The samples are not pictures of three channels.
    """
    if len(shape) != 3 or shape[0] != 3:
        raise UserError("only pictures of three channels can be colorized", got=shape, expected="(3, H, W)")
    root = math.sqrt(3)
    return LinearMap(
        lambda x: x.sum(1, keepdim=True) / root,
        lambda v: v.expand(-1, 3, -1, -1) / root,
        tuple(shape),
        (1, *shape[1:]),
        orthonormal=True,
    )


def grey_value(grey: Tensor) -> Tensor:
    """What :func:`grey_map` measures on pictures whose mean over the channels is ``grey`` (..., 1, H, W)."""
    return math.sqrt(3) * grey
