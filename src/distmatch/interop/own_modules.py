"""Denoisers around modules of the user's on disk: what a file stores of them, and what must be passed again.

A file never names code that is then run. It keeps the tensors, how the denoiser calls its module and reads
its output, and for the reader's sake the class of the module. Loading needs the module or its class again;
only networks of diffusers and of distmatch are built again from a config.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.base.files import load_into
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import PLAIN, CalledNet, module_of
from distmatch.diffusion.conditioning import Conditioning, FieldSpec
from distmatch.diffusion.denoiser import is_denoiser
from distmatch.diffusion.paths.specs import path_from_dict, path_to_dict
from distmatch.interop.diffusers_parts import network_like
from distmatch.interop.optional import import_diffusers
from distmatch.nets.build import build_net
from distmatch.nets.config import blocks, from_dict, to_dict
from distmatch.nets.dit import DiT
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.mlp import MLP
from distmatch.nets.saved import edm_values, parametrized
from distmatch.nets.unet import UNet

Module = TypeVar("Module", bound=nn.Module)
_NULL = "null/"  # in front of the names of tensors that are not the module's
HandedIn = nn.Module | Callable[..., nn.Module]
"""A module, whose weights are replaced in a copy; its class or a function that makes one; or a denoiser."""


def copied_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy.

    Args:
        module: The module.
        memo: As for :func:`copy.deepcopy`: what takes the place of objects, by their id.

    Raises:
        UserError: Something in the module cannot be copied.
    """
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"a {type(module).__name__} cannot be copied, and a student starts as a copy of its teacher",
            got=cause(error),
            fix="keep open files, locks, generators and results of earlier calls out of the module",
        ) from error


def inner_module(denoiser: nn.Module) -> nn.Module:
    """The module whose tensors are kept: the given network, or the denoiser if it is one."""
    if isinstance(denoiser, (EDMDenoiser, PredictionDenoiser)):
        found = module_of(denoiser.net)
        if isinstance(found, nn.Module):
            return found
    return denoiser


def check_storable(denoiser: nn.Module) -> None:
    """Refuses a network with a state that is not made of tensors.

    Raises:
        UserError: It has one.
    """
    module = inner_module(denoiser)
    odd = [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(
            f"the state of a {type(module).__name__} cannot be saved, as it contains more than tensors",
            got=odd[0],
            fix="omit the folder, or remove get_extra_state from the module",
        )


def described_module(denoiser: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The module whose tensors are kept, and how to make the denoiser again, as JSON."""
    check_storable(denoiser)
    module = inner_module(denoiser)
    kind = type(module)
    said: dict[str, Any] = {"class": f"{kind.__module__}:{kind.__qualname__}"}
    if getattr(denoiser, "arguments", None) is not None:
        said["arguments"] = denoiser.arguments
    to_json: Any = getattr(module, "to_json_string", None)
    if isinstance(module, (MLP, UNet, DiT)):
        said |= {"library": "distmatch", "config": to_dict(module.config)}
    elif kind.__module__.startswith("diffusers.") and to_json is not None:
        said |= {"library": "diffusers", "config": json.loads(to_json())}
    return module, {"kind": "module", "module": said, "denoiser": _denoiser_values(denoiser)}


def _denoiser_values(denoiser: nn.Module) -> dict[str, Any]:
    """How a denoiser uses its module; ``missing`` names what no file can hold."""
    own: Any = denoiser
    common = {"shape": list(own.shape), "num_classes": own.num_classes}
    if isinstance(denoiser, EDMDenoiser):
        return {"kind": "edm", **common, **edm_values(denoiser)}
    if not isinstance(denoiser, PredictionDenoiser):
        return {"kind": "own", **common}
    missing = []
    values: dict[str, Any] = {
        "kind": "prediction",
        **common,
        "prediction": denoiser.prediction,
        "sigma_data": denoiser.sigma_data,
        "sigma_min": denoiser.sigma_min,
        "sigma_max": denoiser.sigma_max,
        "levels": denoiser.levels,
        "null_class": denoiser.null_class,
        "reverse_time": denoiser.reverse_time,
        "shift": denoiser.shift,
    }
    try:
        values["path"] = path_to_dict(denoiser.path)
    except UserError:
        missing.append("path")
    if denoiser.by_name:
        values["conditioning"] = {
            name: [list(field.shape), str(field.dtype).removeprefix("torch."), field.classes]
            for name, field in denoiser.conditioning_spec.items()
        }
    called = denoiser.net if isinstance(denoiser.net, CalledNet) else None
    call = PLAIN if called is None else called.call
    if called is not None and called.features:
        values["features"] = list(called.features)
    for name, value, plain in (
        ("time", denoiser.time, not callable(denoiser.time)),
        ("call", call, isinstance(call, str)),
    ):
        if plain:
            values[name] = value
        else:
            missing.append(name)
    return {**values, "missing": missing}


def null_tensors(denoiser: nn.Module) -> dict[str, Tensor]:
    """The null conditioning, as tensors besides those of the module."""
    null = denoiser.null if isinstance(denoiser, PredictionDenoiser) else None
    return {_NULL + name: value for name, value in (null or {}).items()}


def rebuilt(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], network: HandedIn | None, source: str
) -> nn.Module:
    """The denoiser that :func:`described_module` described, with weights in ``tensors``.

    Args:
        config: The description.
        tensors: The state of its module.
        network: The user's argument; None where the file has the config of a library.
        source: The file, for messages.

    Raises:
        UserError: It is missing, or does not match.
    """
    said, values = config["module"], config["denoiser"]
    null = Conditioning({n.removeprefix(_NULL): v for n, v in tensors.items() if n.startswith(_NULL)})
    tensors = {name: value for name, value in tensors.items() if not name.startswith(_NULL)}
    given = _given(said, network) if network is not None else _of_library(said, values, tensors, source)
    denoiser = given if is_denoiser(given) else _around(given, said, values, null or None)
    _check_use(_denoiser_values(denoiser), values, source)
    load_into(inner_module(denoiser), tensors, source)
    return denoiser


def _check_use(found: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuses a denoiser that uses its network in another way than the one that was saved."""
    found = json.loads(json.dumps(found))
    # What the saved one kept and the other does not, or the other way round, are functions.
    both = found.keys() & values.keys() - {"missing"}
    other = sorted(name for name in both if found[name] != values[name])
    if other:
        raise UserError(
            f"{source} belongs to another denoiser than the given one",
            got="; ".join(f"{name} {found[name]}" for name in other),
            expected="; ".join(f"{name} {values[name]}" for name in other),
            fix="create it with the same arguments as before, or pass only the network",
        )


def _given(said: Mapping[str, Any], network: HandedIn) -> nn.Module:
    """The given module, or one built by its class."""
    if isinstance(network, nn.Module):
        return copied_module(network)
    if not callable(network):
        raise UserError(
            "a network must be a module, its class, or a denoiser with it",
            got=f"a {type(network).__name__}",
        )
    arguments = said.get("arguments") or {}
    try:
        with torch.random.fork_rng(devices=[]):  # loading draws no random number
            made = network(**arguments)
    except Exception as error:
        raise UserError(
            f"{getattr(network, '__name__', network)} cannot build the network with the arguments in "
            f"the file",
            got=cause(error),
            expected=f"arguments {json.dumps(arguments)}" if arguments else "a call without arguments",
            fix="pass a module: network=YourNetwork(...)",
        ) from error
    if not isinstance(made, nn.Module):
        raise UserError(
            "the given class or function does not return a module", got=f"a {type(made).__name__}"
        )
    return made


def _of_library(
    said: Mapping[str, Any], values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> nn.Module:
    """The module that a config of a library describes."""
    library, config = said.get("library"), said.get("config")
    if library == "distmatch" and isinstance(config, dict):
        net_config = from_dict(config)
        if blocks(net_config) > len(tensors):
            raise UserError(f"{source} has too few tensors for its config", got=len(tensors))
        with torch.device("meta"):
            return build_net(net_config, values["shape"], values["num_classes"])
    if library == "diffusers" and isinstance(config, dict):
        diffusers, name = import_diffusers(), config.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
            raise UserError(f"{source} names no network of diffusers", got=str(name)[:80])
        built: nn.Module = network_like(config, [found.__name__], tensors, source)
        return built
    raise UserError(
        f"{source} contains a network that cannot be built from its file",
        got=f"a network of the class {said['class']!s:.120}",
        expected="the network, as no code is loaded from a file",
        fix="in Python: dm.Student.from_pretrained(folder, network=YourNetwork), or load_teacher, with the "
        "module, its class, or a denoiser around it; on the command line --network MODULE:NAME",
    )


def _around(
    module: nn.Module, said: Mapping[str, Any], values: Mapping[str, Any], null: Conditioning | None
) -> nn.Module:
    """The denoiser around a module."""
    kind, missing = values["kind"], list(values.get("missing", ()))
    if kind == "own" or missing:
        raise UserError(
            "the file does not contain how this denoiser uses its network",
            got=f"a module; {', '.join(missing) or 'the denoiser'} of the saved one is code",
            expected="the denoiser",
            fix="pass the denoiser instead, made with the same arguments as before: network="
            "dm.as_denoiser(...), or for a pipeline of diffusers network=dm.load_teacher(FOLDER, ...)",
        )
    if kind == "edm":
        return parametrized(module, values)
    options = {name: values[name] for name in ("sigma_data", "sigma_min", "sigma_max", "levels")}
    options |= {name: values[name] for name in ("null_class", "reverse_time", "time")}
    options["shift"] = values.get("shift")
    if "conditioning" in values:
        options["conditioning"] = {
            name: FieldSpec(tuple(shape), _dtype(dtype), classes)
            for name, (shape, dtype, classes) in values["conditioning"].items()
        }
    else:
        options["num_classes"] = values["num_classes"]
    options["null"] = null
    features = values.get("features", ())
    net = module if values["call"] == PLAIN and not features else CalledNet(module, values["call"], features)
    denoiser = PredictionDenoiser(
        net, path_from_dict(values["path"]), values["prediction"], shape=values["shape"], **options
    )
    denoiser.arguments = said.get("arguments")
    return denoiser


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name}")
    return found
