"""What each network of a training owns: parameters, and bytes of weights, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.nets.ema import EMA
from distmatch.nets.shared import local

_MOMENTS = 2  # of Adam, for each parameter


@dataclass(frozen=True)
class RoleSize:
    """What a network has that no network before it has. All but the first are bytes.

    Attributes:
        parameters: Number of parameters, also where this process holds a share of them.
        weights: Parameters and buffers; of an average also what it keeps against rounding.
        gradients: Those of the parameters that learn.
        optimizer: Adam's two moments.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer


def role_sizes(
    networks: Mapping[str, nn.Module],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    ema: EMA | None = None,
) -> dict[str, RoleSize]:
    """What each network owns; what several share is counted for the first of them.

    With adapters the base is the teacher, and the other roles own their adapters alone.

    Args:
        networks: The networks by name, the teacher first.
        optimizers: Those of the training, whose state may not be made yet.
        ema: The average among the networks.
    """
    moved = {id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]}
    seen: set[tuple[Any, ...]] = set()

    def new(tensors: Iterable[Tensor]) -> list[Tensor]:
        found = []
        for tensor in tensors:
            share = local(tensor)
            place: tuple[Any, ...] = (
                share.untyped_storage()._cdata,
                share.storage_offset(),
            )  # fake tensors have no address
            if not share.numel():  # of a tensor with fewer rows than processes
                place = (id(tensor),)
            if tensor.numel() and place not in seen:
                seen.add(place)
                found.append(tensor)
        return found

    sizes = {}
    for name, network in networks.items():
        own, buffers = new(network.parameters()), new(network.buffers())
        rest = list(ema.rest.values()) if ema is not None and ema.module is network else []
        sizes[name] = RoleSize(
            parameters=sum(p.numel() for p in own),
            weights=sum(local(t).nbytes for t in (*own, *buffers, *rest)),
            gradients=sum(local(p).nbytes for p in own if p.requires_grad),
            optimizer=_MOMENTS * sum(local(p).nbytes for p in own if id(p) in moved),
        )
    return sizes


def as_json(sizes: Mapping[str, RoleSize]) -> dict[str, dict[str, int]]:
    """The sizes as a log holds them."""
    return {name: asdict(size) for name, size in sizes.items()}
