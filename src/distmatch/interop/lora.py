"""LoRA (Hu et al. 2021, arXiv 2106.09685): networks that are a frozen base and adapters of low rank on it.

A network with adapters is a separate module tree around the parameters of its base, which are the same
objects in both. So there is nothing to switch: the teacher is the base, and each role has its own adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.edm2_unet import MPLayer
from distmatch.interop.edm_blocks import Conv
from distmatch.interop.edm_checkpoint import network_of
from distmatch.interop.optional import PEFT
from distmatch.interop.own_modules import copied_module, inner_module
from distmatch.nets.blocks import repeated_blocks
from distmatch.nets.dit import DiT
from distmatch.nets.mlp import MLP
from distmatch.nets.shared import Adapted, adapted_of, constant_buffers, role_copy
from distmatch.nets.unet import UNet

Module = TypeVar("Module", bound=nn.Module)
NAME = "default"
_BARE = (Conv, MPLayer)
"""Layers of EDM and EDM2, which use their weight in ways that peft's own adapters do not know."""
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their layers without calling them, which would bypass adapters."""
AUTO = ("auto",)
BUILT_IN = (MLP, UNet, DiT)
_SHOWN = 8


def network_in(denoiser: nn.Module) -> nn.Module:
    """The network inside a denoiser: the one whose tensors are saved, and whose layers are named."""
    found = network_of(denoiser) or inner_module(denoiser)
    return found.model if isinstance(found, DiffusersNet) else found


def shared_base(teacher: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A teacher as the base of all roles: frozen, on a device, of one type.

    It uses the memory of the given teacher where device and type agree. Its parameters are objects of its
    own, so that ``requires_grad`` of the given ones does not change. Buffers of a teacher that was loaded in
    this type, such as frequencies of positions, keep theirs.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in constant_buffers(teacher)}
    kinds = set()
    for parameter in teacher.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        kinds.add(parameter.dtype == kind)
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device, kind), requires_grad=False)
    base = copied_module(teacher, memo).to(device).eval()
    return base if kinds == {True} else base.to(dtype=dtype)


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by name: linear ones and convolutions.

    Convolutions with groups, dilation or another padding than zeros are left out: peft's adapters ignore
    these.
    """
    return dict(_adaptable(network, ""))


def _adaptable(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_children():
        full = prefix + name
        if isinstance(part, _BARE):
            if part.weight is not None:
                yield full, part
        elif isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if part.groups == 1 and set(part.dilation) == {1} and part.padding_mode == "zeros":
                yield full, part
        elif isinstance(part, nn.Linear):
            yield full, part
        elif not isinstance(part, _FUSED):
            yield from _adaptable(part, f"{full}.")


def chosen_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the layers that get adapters.

    Args:
        network: The network.
        targets: Regular expressions for whole names or what follows a dot in them; none for all layers.
            "auto": the layers in :func:`~distmatch.nets.blocks.repeated_blocks` of a network from elsewhere.

    Raises:
        UserError: There is no layer to adapt, an expression is none or fits no layer, or the network has
            adapters already.
    """
    if adapters_of(network):
        raise UserError(
            "the teacher has adapters already", fix="merge them into its weights first: merge_and_unload()"
        )
    known = list(adaptable(network))
    some = ", ".join(known[:_SHOWN]) + (f", ... ({len(known)} in all)" if len(known) > _SHOWN else "")
    if not known:
        raise UserError(
            "this network has no layer that LoRA can adapt",
            got=type(network).__name__,
            expected="linear layers or convolutions that are called as modules",
            fix="use --train full",
        )
    if tuple(targets) == AUTO:
        parts = {} if isinstance(network, BUILT_IN) else repeated_blocks(network)
        blocks = tuple(f"{name}." for name in parts)
        return [name for name in known if name.startswith(blocks)] or known
    found: list[str] = []
    targets = (targets,) if isinstance(targets, str) else targets
    for target in targets or (".*",):
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        except re.error as error:
            raise UserError("--lora-targets takes regular expressions", got=f"{target}: {error}") from error
        here = [name for name in known if pattern.fullmatch(name)]
        if not here:
            raise UserError(
                f"--lora-targets {target} fits no layer of the network that can have an adapter",
                expected=some,
                fix="pass the end of a name, such as " + known[0].rsplit(".", 1)[-1],
            )
        found += [name for name in here if name not in found]
    return found


def full_rank(layer: Any) -> int:
    """The largest rank that the weight of a layer can have, as a matrix of its outputs by all else."""
    weight: Tensor = layer.weight
    return min(len(weight), weight[0].numel())


@contextmanager
def watched(network: nn.Module, layers: Sequence[str]) -> Iterator[set[str]]:
    """Collects the names of those layers that are called within it."""
    called: set[str] = set()
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name in layers
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def with_adapters(
    base: Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (),
    seed: int = 0,
    extend: Callable[[Module], Any] | None = None,
) -> Module:
    """A trainable network on a frozen base: adapters with no effect yet, and the layers that are added.

    Args:
        base: The base; it is frozen, and otherwise not changed.
        rank: Of the adapters.
        alpha: Their scaling times the rank.
        targets: See :func:`chosen_layers`.
        seed: Seed of the first factor of each adapter; the second is zero.
        extend: Adds layers that the base lacks. They are trained in full.

    Raises:
        UserError: peft is not installed, or as for :func:`chosen_layers`.
    """
    chosen = chosen_layers(network_in(base), targets)
    return on_base(base, {"r": rank, "lora_alpha": alpha, "targets": chosen}, seed=seed, extend=extend)


def peft_config(config: Mapping[str, Any], base: str = "") -> Any:
    """The configuration of peft for a rank ``r``, ``lora_alpha`` and the names of layers, ``targets``."""
    layers = "|".join(re.escape(name) for name in config["targets"])
    return PEFT.load().LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        target_modules=layers,
        base_model_name_or_path=base or None,
    )


def on_base(
    base: Module,
    config: dict[str, Any],
    *,
    seed: int = 0,
    extend: Callable[[Module], Any] | None = None,
) -> Module:
    """As :func:`with_adapters`, of what :func:`peft_config` takes."""
    peft = PEFT.load()
    from distmatch.interop.low_rank_weight import LowRankWeight

    shell = role_copy(base.requires_grad_(False))
    if extend is not None:
        extend(shell)
    known = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    settings = peft_config(config)
    settings._register_custom_module(dict.fromkeys(_BARE, LowRankWeight))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # which LowRankWeight is for
        torch.manual_seed(stream_seed(seed, "adapters"))
        peft.inject_adapter_in_model(settings, network_in(shell), NAME)
    shared = {n for n, buffer in shell.named_buffers(remove_duplicate=False) if id(buffer) in known}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        if id(parameter) in known:
            shared.add(name)
        else:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    shell.adapted = Adapted(frozenset(shared), config)  # type: ignore[assignment]
    return shell.eval()


def adapters_of(module: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


@torch.no_grad()
def merged(denoiser: Module, *, adapters: bool = True) -> Module:
    """An ordinary network in float32, whose weights are the sum of base and adapters.

    Args:
        denoiser: A network with adapters, which is not changed; any other is returned as it is.
        adapters: Whether they are added. Without them it is the base, as the adapters were trained on it.
    """
    if adapted_of(denoiser) is None:
        return denoiser
    whole = copied_module(denoiser).float()
    for name, layer in adapters_of(whole).items():
        plain = layer.get_base_layer()
        if adapters:
            delta: Tensor = layer.get_delta_weight(NAME)
            plain.weight = nn.Parameter(plain.weight + delta.to(plain.weight.dtype), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, plain)
    del whole.adapted
    vars(network_in(whole)).pop("peft_config", None)
    return whole
