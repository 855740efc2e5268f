"""Networks with a common base: what a role copies, what it shares, and what it owns.

A role (student, fake score, average, recorded teacher) starts as a copy of another network. What learns is
copied; parameters that do not learn and buffers that no pass changes are the same objects in both, so that
any number of roles has them once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmatch.base.files import load_into

Module = TypeVar("Module", bound=nn.Module)
_KNOWN = ("diffusers.", "distmatch.interop.", "distmatch.nets.")
_WRAPPED = ".base_layer."  # what peft puts into the name of a layer to which it adds an adapter


@dataclass(frozen=True)
class Adapted:
    """The description of a network with adapters on a frozen base, as its attribute ``adapted``.

    Attributes:
        shared: Names of the parameters and buffers that are the base's, all of them where one has several.
        config: Rank ``r``, ``lora_alpha``, and the names of the layers with adapters, ``targets``.
    """

    shared: frozenset[str]
    config: dict[str, Any]


def adapted_of(module: nn.Module) -> Adapted | None:
    """The description of a network with adapters; None for one without a base."""
    found = getattr(module, "adapted", None)
    return found if isinstance(found, Adapted) else None


def dtype_of_base(network: nn.Module) -> str | None:
    """The dtype of the base of a network with adapters, such as "bfloat16"; None for one without a base."""
    adapted = adapted_of(network)
    if adapted is None:
        return None
    parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
    kinds = {p.dtype for name, p in parameters.items() if name in adapted.shared}
    return str(kinds.pop()).removeprefix("torch.")


def parameter_counts(network: nn.Module) -> tuple[int, int]:
    """Parameters of a network, and of the adapters and new layers that it has on a base; 0 without one."""
    adapted, sizes = adapted_of(network), {name: p.numel() for name, p in network.named_parameters()}
    if adapted is None:
        return sum(sizes.values()), 0
    base = sum(size for name, size in sizes.items() if name in adapted.shared)
    return base, sum(sizes.values()) - base


def constant_buffers(network: nn.Module) -> list[Tensor]:
    """The buffers that no pass changes, such as tables of positions: those of diffusers' modules and of ours.

    Modules of torch that have buffers, such as batch norms, keep statistics in them. What a module of the
    user's does with its own is not known.
    """
    known = (part for part in network.modules() if type(part).__module__.startswith(_KNOWN))
    return [buffer for part in known for buffer in part.buffers(recurse=False)]


def role_copy(network: Module) -> Module:
    """A copy for another role, which shares what does not change: see :func:`constant_buffers`."""
    still = [p for p in network.parameters() if not p.requires_grad]
    return copy.deepcopy(network, {id(t): t for t in (*still, *constant_buffers(network))})


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copies the buffers that two networks of one architecture, wrapped or not, do not share."""
    for own, other in zip(target.buffers(), source.buffers(), strict=True):
        if own is not other:
            own.copy_(other)


def without_memory(network: nn.Module) -> dict[int, Any]:
    """For a deep copy: parameters on the meta device in the place of a network's, by id."""
    return {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }


def unshared(one: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of two networks of one architecture, wrapped or not, that are not the same objects.

    Of parameters that are shared out among processes these are the shares of this one.
    """
    pairs = [(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a is not b]
    return [local(a) for a, _ in pairs], [local(b) for _, b in pairs]


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The share that this process holds of a tensor, in the same memory; all of it where it is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network without its base: adapters, new layers, buffers that are its own."""
    adapted, state = adapted_of(module), module.state_dict()
    return state if adapted is None else {k: v for k, v in state.items() if k not in adapted.shared}


def load_own_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Restores what :func:`own_state` returned; buffers that earlier versions copied are left out.

    Args:
        module: The network, on its base.
        tensors: Its state.
        source: Where it comes from, for messages.

    Raises:
        UserError: It is that of another architecture.
    """
    adapted = adapted_of(module)
    if adapted is not None:
        state = module.state_dict()
        tensors = {**tensors, **{name: state[name] for name in adapted.shared & state.keys()}}
    load_into(module, tensors, source)


@torch.no_grad()
def fingerprint(network: nn.Module) -> str:
    """The sha256 of names, types, shapes and values of the parameters of a base.

    Args:
        network: The base, or a network with adapters on it; both give the same.
    """
    adapted = adapted_of(network)
    found = {
        name.replace(_WRAPPED, "."): parameter
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if adapted is None or name in adapted.shared
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(found.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
