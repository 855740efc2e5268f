"""Methods under DDP in processes that talk to each other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmatch.methods.state import DistillState
from tests.helpers.small import batch, distiller, network_teacher
from tests.helpers.store_group import backend
from tests.helpers.wrapping import DECLARED, Wrap, wrap


def under_ddp(module: nn.Module) -> nn.Module:
    """The module inside DDP, with the attributes that the contracts name."""
    parallel = DistributedDataParallel(module)
    for name in DECLARED:
        if hasattr(module, name):
            setattr(parallel, name, getattr(module, name))
    return parallel


def _weights(state: DistillState, name: str) -> Tensor:
    module = state.modules()[name]
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def _trained(name: str, rank: int, around: Wrap | None) -> tuple[DistillState, list[str]]:
    """Four steps of a method on data and noise of a rank, and the names of the networks that learn.

    The method may be followed by a way to train: ``sida lora``.
    """
    name, _, how = name.partition(" ")
    options = {"gan_weight": 0.1, "gan_after": 0.0} if name == "ctm" else {}
    method = distiller(network_teacher(2), method=name, train=how or "full", **options)
    state = method.init(0)
    for generator in (state.generator, state.ratio_generator):
        generator.set_state(torch.Generator().manual_seed(rank).get_state())
    names = list(wrap(state, around) if around is not None else {})
    for step in range(4):
        method.step(state, batch(step + 50 * rank, 2))
    return state, names


def train(rank: int, folder: str, methods: tuple[str, ...]) -> None:
    """One of two processes; the first writes what came out as JSON.

    For each method: whether two ranks on the same data do as one process without DDP does, to the bit; and
    whether two on data of their own have the same networks in the end.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(backend(), init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, dict[str, bool]] = {}
    for name in methods:
        alone, _ = _trained(name, 0, None)
        same, names = _trained(name, 0, under_ddp)
        other, _ = _trained(name, rank, under_ddp)
        own = [_weights(other, key) for key in names]
        theirs = [[torch.empty_like(w) for _ in range(2)] for w in own]
        for weights, gathered in zip(own, theirs, strict=True):
            dist.all_gather(gathered, weights)
        found[name] = {
            "as without": all(torch.equal(_weights(alone, key), _weights(same, key)) for key in names),
            "equal": all(torch.equal(a, b) for a, b in theirs),
            "other data": not torch.equal(own[0], _weights(same, "student")),
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
