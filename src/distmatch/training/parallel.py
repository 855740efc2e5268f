"""Networks whose weights are shared out among processes: FSDP2, torch's ``fully_shard``.

Every process holds a share of the weights, gradients and moments of each network, and gathers the weights of
a block of layers for as long as it computes with it. What the processes compute is what one does that has all
of it. Small parts (discriminators, learned weights of a loss) stay whole on each.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks, patience
from distmatch.methods.state import DistillState
from distmatch.nets.blocks import repeated_blocks
from distmatch.nets.shared import local, without_memory
from distmatch.nets.training_state import TrainingState
from distmatch.training.options import RunOptions
from distmatch.training.shards import Layout

SHARED = ("fsdp2", "hybrid")
"""Values of ``--parallel`` under which a process holds a share of the weights."""
_LARGE = 2**20  # parameters


def check_parallel(run: RunOptions, ranks: Ranks, *, fresh: bool) -> None:
    """Refuses choices that cannot work with these processes, before anything is made.

    Args:
        run: The options.
        ranks: The processes.
        fresh: Whether the run begins; one that is resumed may do so in a single process.

    Raises:
        UserError: One of them does not.
    """
    if run.shard_size and run.parallel != "hybrid" and fresh:
        raise UserError(
            "--shard-size is the size of the groups of --parallel hybrid",
            got=f"--shard-size {run.shard_size} with --parallel {run.parallel}",
            fix="omit it, or use --parallel hybrid",
        )
    if run.parallel not in SHARED:
        return
    if ranks.size == 1 and fresh:
        raise UserError(
            f"--parallel {run.parallel} shares out the weights among processes",
            got="one process",
            fix="start with: torchrun --nproc-per-node N -- $(which distmatch) ..., or leave --parallel out",
        )
    if ranks.size > 1 and run.compile:
        raise UserError(
            f"--compile makes one graph of a network, which --parallel {run.parallel} gathers by blocks",
            fix="leave --compile out, or use --parallel ddp",
        )
    size = _group_size(run, ranks)
    if ranks.size > 1 and (ranks.size % size or size == 1):
        raise UserError(
            "--parallel hybrid shares out the weights among the processes of a group",
            got=f"{ranks.size} processes in groups of {size}",
            expected="2 or more in a group, and a whole number of groups",
            fix="set --shard-size to a divisor of the number of processes, or use --parallel ddp",
        )


def shares_out(run: RunOptions, ranks: Ranks) -> bool:
    """Whether each process is to hold a share of the weights."""
    return run.parallel in SHARED and ranks.size > 1


def _group_size(run: RunOptions, ranks: Ranks) -> int:
    if run.parallel == "fsdp2":
        return ranks.size
    return run.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


def share_out(
    networks: Iterable[nn.Module], state: TrainingState, run: RunOptions, device: torch.device
) -> Callable[[], None]:
    """Shares out the weights of a run among its processes, where its options ask for it.

    Args:
        networks: Those of the run that are no part of its state.
        state: Its networks and optimizers, which have taken no step yet, are changed in place.
        run: The options.
        device: Where networks are.

    Returns:
        What puts the whole average into the state again, on all processes, for the end of the run.
    """
    ranks = state.ranks
    if not shares_out(run, ranks):
        return lambda: None
    if isinstance(state, DistillState):
        _ = state.base  # is computed while the weights are whole, and kept
    average = state.ema
    frame = copy.deepcopy(average.module, without_memory(average.module))
    every = {id(network): network for network in (*networks, *state.modules().values())}
    size = _group_size(run, ranks)
    mesh = _mesh(device.type, ranks.size, size)
    shard_networks([network for network in every.values() if _large(network)], state, mesh)

    def gather() -> None:
        whole = {name: _whole(tensor).cpu() for name, tensor in average.module.state_dict().items()}
        average.module = copy.deepcopy(frame)
        average.module.load_state_dict(whole, assign=True)

    return gather


def _mesh(kind: str, processes: int, size: int) -> DeviceMesh:
    """The processes, in groups of ``size`` that share out the weights."""
    if size == processes:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    table = torch.arange(processes).view(-1, size)
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout=patience(os.environ))[0]
        for rows in (table.T, table)
    ]
    return DeviceMesh.from_group(groups, kind, mesh=table, mesh_dim_names=("replicate", "shard"))


def _large(network: nn.Module) -> bool:
    """Whether it pays to share out a network."""
    return bool(repeated_blocks(network)) or sum(p.numel() for p in network.parameters()) >= _LARGE


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_networks(networks: Iterable[nn.Module], state: TrainingState, mesh: DeviceMesh) -> None:
    """Shares out the weights of networks in place, and makes the optimizers of a state learn the shares.

    Parameters that several networks have in common, as the base of adapters, are shared out once. Those
    without memory get it here, and the values of the first network's of that name.

    Args:
        networks: Each once, the teacher first; the optimizers have taken no step yet.
        state: Its optimizers and the remainders of its average follow.
        mesh: The processes; of two dimensions, the first one's hold the same.
    """
    replaced: dict[int, nn.Parameter] = {}
    first: dict[str, nn.Parameter] = {}
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
            if id(old) not in replaced:
                replaced[id(old)] = _filled(parameter, first[name]) if parameter.is_meta else parameter
            if replaced[id(old)] is not parameter:
                _assign(network, name, replaced[id(old)])
        first = first or dict(network.named_parameters())
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
            group["fused"] = True
    state.ema.restart_rest()


@torch.no_grad()
def _filled(parameter: nn.Parameter, source: nn.Parameter) -> nn.Parameter:
    """A share with memory, and the values of another network's share."""
    made = torch.empty_like(source, dtype=parameter.dtype)
    local(made).copy_(local(source))
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _assign(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a share that another network has already in the place of one's own, before the first pass."""
    path, _, last = name.rpartition(".")
    owner: Any = network.get_submodule(path)
    owner._parameters[last] = parameter


def _shares(node: Any, path: str) -> Iterator[tuple[str, DTensor]]:
    """The tensors of a tree that are shared out, by path."""
    if isinstance(node, DTensor):
        yield path, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _shares(value, f"{path}/{key}".lstrip("/"))


def layout_of(state: TrainingState) -> Layout:
    """The layout of the tensors of a state, by their names in a checkpoint; for restoring one."""
    like: dict[str, Tensor] = dict(_shares(state.state_dict(), ""))
    for name, optimizer in state.optimizers.items():  # before the first step they have no moments
        own = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(own):
            if isinstance(parameter, DTensor):
                for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    like[f"optimizers/{name}/state/{number}/{moment}"] = parameter

    def layout(name: str, shape: torch.Size) -> Tensor | None:
        found = like.get(name)
        return torch.zeros_like(found) if found is not None and found.shape == shape else None

    return layout
