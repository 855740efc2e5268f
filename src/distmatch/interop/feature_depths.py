"""Features of networks from elsewhere at shares of their depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import PLAIN, CalledNet
from distmatch.diffusion.conditioning import example_conditioning, null_conditioning
from distmatch.diffusion.hooked import blocks_of, names_at_depths
from distmatch.interop.diffusers_net import DiffusersNet

DEPTHS = (0.5, 0.75, 0.99)
"""Where the features of pipelines are taken for a discriminator, as shares of the blocks."""


def take_features(teacher: Any, depths: Sequence[float]) -> None:
    """Makes the outputs of some blocks of a network its features, in place.

    Args:
        teacher: A denoiser around a network that is not built in.
        depths: Shares of the blocks, in (0, 1].

    Raises:
        UserError: Another network, or one without repeated blocks.
    """
    net = teacher.net if isinstance(teacher, PredictionDenoiser) else None
    if not isinstance(net, nn.Module) or (
        getattr(net, "has_features", False) and not isinstance(net, _HOOKED)
    ):
        raise _refused(teacher, "features of its own, or none")
    inner = net.model if isinstance(net, DiffusersNet) else net.module if isinstance(net, CalledNet) else net
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    x = torch.ones(2, *teacher.shape, device=device)
    try:
        conditioning = null_conditioning(teacher, 2, device)
    except UserError:
        conditioning = example_conditioning(teacher, 2, device)
    with torch.no_grad():
        names = blocks_of(inner, lambda: teacher(x, x.new_ones(2), conditioning))
    if not names:
        raise _refused(teacher, "no list of blocks")
    chosen = names_at_depths(names, depths)
    if isinstance(net, _HOOKED):
        net.features = chosen
    else:
        teacher.net = CalledNet(net, PLAIN, chosen)


_HOOKED = (CalledNet, DiffusersNet)


def _refused(teacher: Any, got: str) -> UserError:
    return UserError(
        "this network has no blocks at chosen depths",
        got=f"a {type(getattr(teacher, 'net', teacher)).__name__} with {got}",
        expected="a network of other code with a list of blocks (nn.ModuleList)",
        fix="leave --ratio-depths out, or name parts: dm.as_denoiser(net, ..., features=(...))",
    )
