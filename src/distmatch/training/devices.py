"""Where networks run, and how they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.base.ranks import joined
from distmatch.diffusion.calls import CalledNet
from distmatch.interop.diffusers_net import DiffusersNet

Result = TypeVar("Result")
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


def check_compile_mode(compiled: bool, mode: str, device: torch.device) -> None:
    """Refuses a mode of the compiler that would do nothing.

    Args:
        compiled: Whether networks are compiled.
        mode: ``default``, ``reduce-overhead`` or ``max-autotune``.
        device: Where they run.

    Raises:
        UserError: Nothing is compiled, or the device has no CUDA graphs.
    """
    if mode == "default":
        return
    if not compiled:
        raise UserError(
            f"--compile-mode {mode} is a mode of --compile", got="no --compile", fix="add --compile"
        )
    if device.type != "cuda":
        raise UserError(
            f"--compile-mode {mode} is for accelerators with CUDA graphs",
            got=f"device {device}",
            expected="a device such as cuda or cuda:0",
            fix="use --compile alone, or another --device",
        )


def with_marked_steps(step: Callable[..., Result], mode: str) -> Callable[..., Result]:
    """A training step, announced to CUDA graphs: what networks return in it is kept until the next begins."""
    if mode == "default":
        return step

    def marked(*arguments: Any) -> Result:
        torch.compiler.cudagraph_mark_step_begin()
        return step(*arguments)

    return marked


def compile_network(net: nn.Module, mode: str = "default") -> None:
    """Compiles the forward pass of a network in place; names in its state stay as they are."""
    import torch._dynamo

    # Teacher, student and fake score of one class share the graphs of its code: with and without gradients
    # and features, for one and any number of samples. Beyond 8 of them torch would go on without compiling.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    if isinstance(net, (CalledNet, DiffusersNet)):
        net.listen()
    net.forward = torch.compile(net.forward, mode=mode)
