"""Adapters on disk: what a network adds to its base, and which base that is.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, which peft reads too;
``config.json`` with the base (its place, and the sha256 of its weights); and a model card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.base.files import (
    atomic_folder,
    atomic_json,
    atomic_write,
    check_model_folder,
    load_tensors,
    save_tensors,
)
from distmatch.interop.card import card_of
from distmatch.interop.diffusers_parts import parts_of
from distmatch.interop.lora import NAME, adaptable, network_in, on_base, peft_config, shared_base
from distmatch.interop.pipelines import needs_tracing
from distmatch.interop.pipelines.steps import metadata_of
from distmatch.nets.jump import taught_to_jump
from distmatch.nets.saved import ADAPTERS, CARD, MODEL_PARTS, missing_model
from distmatch.nets.shared import adapted_of, dtype_of_base, fingerprint, load_own_state, own_state

FORMAT = "distmatch-adapters"
VERSION = 1
_CONFIG = "config.json"
_PREFIX = "base_model.model."  # what peft puts before the names of a network
_USES = ("shape", "num_classes", "sigma_data", "sigma_min", "sigma_max", "prediction", "null_class")
_USAGE = """import distmatch as dm

# LoRA adapters: their base is loaded from where it was; pass base="its/folder" if it has moved.
student = dm.Student.from_pretrained("this/folder")
x = student.sample(16, seed=0)
whole = student.merged()  # with weights of its own"""


def save_adapters(
    folder: Path, denoiser: nn.Module, extra: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> None:
    """Writes the adapters of a network and what else it adds to its base, atomically.

    Args:
        folder: The model folder; earlier adapters in it are replaced.
        denoiser: The network.
        extra: More values to keep, as JSON.
        metrics: The content of a run's ``metrics.json``, for the card.

    Raises:
        UserError: The folder holds something else, or cannot be written.
    """
    adapted = adapted_of(denoiser)
    if adapted is None:
        raise ValueError("a network without adapters")
    check_model_folder(folder, MODEL_PARTS)
    place = place_of_base(denoiser, folder)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "base": {
            **place,
            "sha256": fingerprint(denoiser),
            "dtype": dtype_of_base(denoiser),
            "use": _use(denoiser),
        },
        "adapters": adapted.config,
        "jumps": bool(getattr(denoiser, "jumps", False)),
        "extra": dict(extra),
    }
    names, usage = _file_names(denoiser), "" if extra.get("schedule") else _USAGE
    with atomic_folder(folder) as temporary:
        state = {names[name]: tensor for name, tensor in own_state(denoiser).items()}
        save_tensors(temporary / ADAPTERS, state, metadata_of(extra))
        peft_config(adapted.config, place["path"]).save_pretrained(str(temporary))
        atomic_write(temporary / CARD, card_of(denoiser, extra, metrics=metrics, usage=usage))
        atomic_json(temporary / _CONFIG, config)


def place_of_base(denoiser: nn.Module, folder: Path) -> dict[str, Any]:
    """Where the base of a model is, absolute and relative to the model's folder, and its options."""
    path, options = getattr(denoiser, "loaded_from", None) or ("", {})
    relative = os.path.relpath(path, folder.absolute()) if path else ""
    return {"path": path, "relative": relative, "options": options}


def _places_of_base(folder: Path, config: Mapping[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """Where the base of saved adapters may be, the likeliest first, and the options to load it with."""
    said = config.get("base")
    if not (isinstance(said, dict) and isinstance(said.get("options"), dict)):
        raise _damaged(folder, "no entry base")
    path, relative = str(said.get("path", "")), str(said.get("relative", ""))
    places = [Path(os.path.normpath(folder.absolute() / relative))] if relative else []
    places += [Path(path)] if path and Path(path) not in places else []
    return places, said["options"]


def on_its_base(
    folder: Path,
    config: Mapping[str, Any],
    base: str | os.PathLike[str] | nn.Module | None,
    build: Callable[[nn.Module], nn.Module],
    load: Callable[[Path, Mapping[str, Any], Any], nn.Module],
    network: Any = None,
) -> nn.Module:
    """A model on the base that is given, or on the one that is found where it was.

    Args:
        folder: The folder of the model.
        config: Its ``config.json``.
        base: The base or its folder; None looks where it was.
        build: Makes the model from its base.
        load: Loads a base: ``load(folder, options, network)``.
        network: For a base with a network of the user's.

    Raises:
        UserError: There is no base, or another one.
    """
    if isinstance(base, nn.Module) and network is None:
        return build(base)
    if base is not None and not isinstance(base, (str, os.PathLike)):
        raise UserError(
            "the base of a model is a folder, or a teacher that is a module and needs no network",
            got=type(base).__name__ + ("" if network is None else ", and a network"),
            fix="omit network, or pass the folder of the base together with it",
        )
    places, options = _places_of_base(folder, config)
    if base is not None:
        if not Path(base).exists():
            raise missing_model(
                base, f"--base, in Python base=: the teacher that {folder} was distilled from"
            )
        _check_family(folder, config, Path(base))
        options = options if needs_tracing(base) else {}  # a pipeline needs its size
        return build(load(Path(base), options, network))
    why: list[str] = []
    for place in places:
        try:
            if place.exists():
                return build(load(place, options, network))
            why.append(f"{place} does not exist")
        except (UserError, TypeError) as error:  # the second, of options that it does not take
            if isinstance(error, UserError) and len(places) == 1:
                raise
            why.append(str(error))
    raise _missing_base(folder, config, why)


def _check_family(folder: Path, config: Mapping[str, Any], base: Path) -> None:
    """Refuses a pipeline of another class before it is loaded, with options that it may not take."""
    expected = ((config.get("extra") or {}).get("schedule") or {}).get("pipeline")
    found = parts_of(base)[0].get("_class_name")
    if expected and found and found != expected:
        raise UserError(
            f"{base} is not the base of {folder}: it is a pipeline of another family",
            got=f"a {str(found)[:80]}",
            expected=f"a {expected}, the teacher that the student was distilled from",
            fix="pass its folder: --base FOLDER, in Python base=",
        )


def _missing_base(folder: Path, config: Mapping[str, Any], why: list[str]) -> UserError:
    """The error for adapters whose base is not found, or a student whose pipeline is not."""
    sha256, adapters = config["base"].get("sha256"), config.get("format") == FORMAT
    return UserError(
        f"{folder} contains "
        + (
            "adapters without their base network"
            if adapters
            else "the network of a pipeline, without the pipeline"
        ),
        got="; ".join(why) or "a base that was loaded from no folder, or with options that no file keeps",
        expected=f"a network whose weights have the sha256 {sha256}" if adapters else "the teacher's folder",
        fix="pass its folder: --base FOLDER, in Python base=, which takes the loaded teacher too",
    )


def adapters_on(folder: Path, config: Mapping[str, Any], base: nn.Module) -> nn.Module:
    """The network of saved adapters on a base, on the CPU, in eval mode.

    Args:
        folder: The folder of the adapters.
        config: Its ``config.json``.
        base: The base; it is not changed, and its memory is used where it has the type of the saved one.

    Raises:
        UserError: The base is another one, or the adapters are damaged.
    """
    tensors = load_tensors(folder / ADAPTERS)
    try:
        said, adapters = config["base"], config["adapters"]
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[said["dtype"]]
        base = shared_base(base, torch.device("cpu"), dtype)
        if (found := fingerprint(base)) != said["sha256"]:
            raise UserError(
                f"{folder} contains adapters for another network",
                got=f"a base with weights of sha256 {found}",
                expected=f"sha256 {said['sha256']}",
                fix="pass the network that they were trained on: --base FOLDER, in Python base=",
            )
        used, wanted = _use(base), dict(said["use"])
        if other := sorted(n for n in used.keys() | wanted.keys() if used.get(n) != wanted.get(n)):
            raise UserError(
                f"{folder} contains adapters for a denoiser that uses its network differently",
                got="; ".join(f"{name} {used.get(name)}" for name in other),
                expected="; ".join(f"{name} {wanted.get(name)}" for name in other),
                fix="make the base with the same arguments as before",
            )
        rank, targets = adapters["r"], adapters["targets"]
        _check_adapters(rank, targets, tensors, base)
        config_of = {"r": rank, "lora_alpha": float(adapters["lora_alpha"]), "targets": targets}
        extend: Any = taught_to_jump if config.get("jumps") else None
        denoiser = on_base(base, config_of, extend=extend)
        names = {there: name for name, there in _file_names(denoiser).items()}
        own = {names.get(there, there): tensor for there, tensor in tensors.items()}
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, cause(error)) from error
    load_own_state(denoiser, own, str(folder / ADAPTERS))
    return denoiser.requires_grad_(False)


def _check_adapters(rank: Any, targets: Any, tensors: Mapping[str, Tensor], base: nn.Module) -> None:
    """Checks before adapters are created that the tensors match: a config may ask for any rank."""
    firsts = [t for name, t in tensors.items() if name.endswith(".lora_A.weight")]
    if type(rank) is not int or not firsts or any(len(t) != rank for t in firsts):
        raise ValueError(f"rank {rank!r:.40} beside tensors of another")
    if unknown := set(targets) - adaptable(network_in(base)).keys():
        raise ValueError(f"no layer {min(unknown)!s:.80} in the base")


def _file_names(denoiser: nn.Module) -> dict[str, str]:
    """The names in the file, which are those of peft, by the names in the denoiser.

    Among them are those of buffers of the base, which earlier versions saved.
    """
    adapted, weights = adapted_of(denoiser), {n for n, _ in denoiser.named_parameters(remove_duplicate=False)}
    base = adapted.shared & weights if adapted is not None else frozenset()
    inner = network_in(denoiser)
    prefix = next(name for name, part in denoiser.named_modules() if part is inner)
    prefix += "." if prefix else ""
    found = {}
    for name in denoiser.state_dict().keys() - base:
        plain = re.sub(rf"\.(lora_\w+)\.{NAME}\.", r".\1.", name)
        found[name] = _PREFIX + plain.removeprefix(prefix) if name.startswith(prefix) else plain
    return found


def _use(denoiser: Any) -> dict[str, Any]:
    """How a denoiser uses its network, as far as numbers and names say it."""
    said = {name: getattr(denoiser, name, None) for name in _USES}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in said.items() if v is not None}


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder / _CONFIG} is damaged", got=what, fix="restore it from a copy")
