"""Where networks run, and how they are compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.base.ranks import joined
from distmatch.diffusion.calls import CalledNet
from distmatch.interop.diffusers_net import DiffusersNet

_GRAPHS = 64
"""Graphs that are made at most of one function."""


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes an accelerator when torch sees one.

    Of several processes each has its own accelerator of the machine, where the name has no number.

    Raises:
        UserError: No such device here.
    """
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = found or torch.device("cpu")
        else:
            device = torch.device(name)
        if joined().size > 1 and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "this device cannot be used",
            got=repr(name),
            expected="auto, cpu, or an accelerator that torch sees (cuda, cuda:0, mps)",
            fix="run `distmatch doctor` to list the devices",
        ) from error


def compile_network(net: nn.Module) -> None:
    """Compiles the forward pass of a network in place; names in its state stay as they are."""
    import torch._dynamo

    # Teacher, student and fake score of one class share the graphs of its code: with and without gradients
    # and features, for one and any number of samples. Beyond 8 of them torch would go on without compiling.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    if isinstance(net, (CalledNet, DiffusersNet)):
        net.listen()
    net.forward = torch.compile(net.forward)
