"""Networks whose weights are shared out among processes: FSDP2, torch's ``fully_shard``.

Every process holds a share of the weights, gradients and moments of each network, and gathers the weights of a
block of layers for as long as it computes with it. What the processes compute is what one does that has all of it.
Small parts (discriminators, learned weights of a loss) stay whole on each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.nets.blocks import repeated_blocks
from distmatch.nets.training_state import TrainingState


def mesh_of(kind: str, ranks: Ranks, device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """How the processes share out weights: among all, or among groups that hold the same.

    Args:
        kind: ``fsdp2``: among all; ``hybrid``: among the processes of a group.
        ranks: The processes.
        device: Where networks are.
        shard_size: Processes of a group; 0: those of a machine.

    Raises:
        UserError: The groups are not of one size, or there is nothing to share out.
    """
    if kind == "fsdp2":
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if ranks.size % size or size == 1:
        raise UserError(
            "the processes of --parallel hybrid form groups of one size, each of which shares out the weights",
            got=f"{ranks.size} processes in groups of {size}",
            expected="2 or more in a group, and a whole number of groups",
            fix="set --shard-size to a divisor of the number of processes, or use --parallel ddp",
        )
    return init_device_mesh(device.type, (ranks.size // size, size), mesh_dim_names=("replicate", "shard"))


def shard_networks(networks: Iterable[nn.Module], state: TrainingState, mesh: DeviceMesh) -> None:
    """Shares out the weights of networks in place, and makes the optimizers of a state learn the shares.

    Parameters that several networks have in common, as the base of adapters, are shared out once.

    Args:
        networks: Each once; the optimizers have taken no step yet.
        state: Its optimizers and the remainders of its average follow.
        mesh: From :func:`mesh_of`.
    """
    replaced: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # while their places in memory are keys
    for network in networks:
        before = dict(network.named_parameters(remove_duplicate=False))
        kept += before.values()
        for block in repeated_blocks(network).values():
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # Also of the outermost: it would go on with old weights after a pass without gradients.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        for name, parameter in network.named_parameters(remove_duplicate=False):
            old = before[name]
            if id(old) in replaced:
                _assign(network, name, replaced[id(old)])
            else:
                replaced[id(old)] = parameter
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    state.ema.restart_rest()


def _assign(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a share that another network has already in the place of one's own, before the first pass."""
    path, _, last = name.rpartition(".")
    owner: Any = network.get_submodule(path)
    owner._parameters[last] = parameter
