"""A denoiser on disk: ``model.safetensors`` and ``config.json``, never a pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.base.files import (
    WEIGHTS,
    atomic_folder,
    atomic_json,
    atomic_write,
    check_model_folder,
    load_into,
    load_tensors,
    read_json,
    save_tensors,
)
from distmatch.diffusion.paths.specs import path_from_dict, path_to_dict
from distmatch.nets.build import build_net
from distmatch.nets.config import blocks, from_dict, to_dict
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.jump import taught_to_jump
from distmatch.nets.path_denoiser import PathDenoiser
from distmatch.nets.split_shortcut import SplitLayer
from distmatch.nets.text import TextInput
from distmatch.nets.words import WordEncoder

FORMAT = "distmatch-model"
VERSION = 1
UNIT_VERSION = 2  # with a unit of noise levels, which earlier releases would not see
TEXT_VERSION = 3  # with a text input, which earlier releases cannot build
EXTRA_TENSORS = "extra.safetensors"
CARD = "README.md"
_SIGMAS = ("sigma_data", "sigma_min", "sigma_max")
_TENSORS, _CONFIG = "model.safetensors", "config.json"
ADAPTERS = "adapter_model.safetensors"
MODEL_PARTS = (_TENSORS, _CONFIG, EXTRA_TENSORS, CARD, "vae", ADAPTERS, "adapter_config.json")
"""The names that a saved model consists of, whatever its kind."""
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")


def save_model(
    folder: str | os.PathLike[str],
    denoiser: EDMDenoiser,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    card: str = "",
) -> None:
    """Writes a denoiser so that a crash leaves the old model or the new one.

    Args:
        folder: The model folder; an earlier model in it is replaced.
        denoiser: What to save. Its network must come from :func:`distmatch.nets.build.build_net`.
        extra: More values to keep, as JSON: class names, the kind of model, where it came from.
        tensors: Further tensors to save; they come back as ``tensors`` among the values.
        card: A description of the model, as Markdown; '' writes none.

    Raises:
        UserError: The folder holds something else, or cannot be written; or the network was rewritten.
    """
    if any(isinstance(module, SplitLayer) for module in denoiser.net.modules()):
        raise UserError(
            "a network with split shortcuts cannot be saved as a model",
            fix="save the network as it was, and call split_shortcuts after loading",
        )
    folder = Path(folder)
    check_model_folder(folder, MODEL_PARTS)
    config = {
        "format": FORMAT,
        "version": _version(denoiser),
        "net": to_dict(denoiser.net.config),  # type: ignore[arg-type]
        "shape": list(denoiser.shape),
        "num_classes": denoiser.num_classes,
        **edm_values(denoiser),
        **_text_values(denoiser),
        "extra": dict(extra or {}),
    }
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / _TENSORS, denoiser.net.state_dict())
        if tensors is not None:
            save_tensors(temporary / EXTRA_TENSORS, tensors)
        if card:
            atomic_write(temporary / CARD, card)
        atomic_json(temporary / _CONFIG, config)


def _version(denoiser: EDMDenoiser) -> int:
    """The lowest version of the format that describes a denoiser."""
    if denoiser.text is not None:
        return TEXT_VERSION
    return VERSION if denoiser.noise_unit == 1 else UNIT_VERSION


def _text_values(denoiser: EDMDenoiser) -> dict[str, Any]:
    """The entries of a config on the text that a denoiser takes, and on the encoder of its prompts."""
    if denoiser.text is None:
        return {}
    values: dict[str, Any] = {"text": denoiser.text.text.to_dict()}
    encoder: Any = denoiser.prompt_encoder
    return values | ({"prompt_encoder": encoder.to_dict()} if encoder is not None else {})


def load_model(folder: str | os.PathLike[str]) -> tuple[EDMDenoiser, dict[str, Any]]:
    """Reads what :func:`save_model` wrote, on the CPU, in eval mode. No random number is drawn.

    Args:
        folder: A model folder, or a run folder, which holds one as ``model/``.

    Returns:
        The denoiser, and the extra values that were saved with it. A prompt encoder that is no vocabulary is
        only described, by the value ``prompt_encoder``.

    Raises:
        UserError: The model is missing, not a distmatch model, damaged, or a pickle (refused).
    """
    folder = _model_folder(Path(folder))
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{folder / _CONFIG} does not describe a model of distmatch",
            got=f"format {config.get('format')!r}" if isinstance(config, dict) else type(config).__name__,
            expected=f"format {FORMAT!r}",
            fix="pass the folder that save_pretrained or a run wrote",
        )
    check_version(folder, config, (VERSION, UNIT_VERSION, TEXT_VERSION))
    tensors = load_tensors(folder / _TENSORS)
    denoiser = _described(folder / _CONFIG, config, len(tensors))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1 and dtypes <= set(WEIGHTS):
        denoiser.to(dtypes.pop())
    load_into(denoiser.net, tensors, str(folder / _TENSORS))
    extra = {**extra_values(folder / _CONFIG, config), **extra_tensors(folder)}
    if denoiser.prompt_encoder is None and "prompt_encoder" in config:
        extra["prompt_encoder"] = config["prompt_encoder"]
    return denoiser.eval(), extra


def check_version(folder: Path, config: Mapping[str, Any], known: tuple[int, ...]) -> None:
    """Refuses a model in a version of its format that is not read."""
    if config.get("version") not in known:
        raise UserError(
            f"{folder} was written in another version of the format",
            got=config.get("version"),
            expected=" or ".join(map(str, known)),
            fix="use the release of distmatch that wrote it, or a newer one",
        )


def extra_values(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The further values in a config, which are those of a dictionary.

    Raises:
        UserError: They are something else.
    """
    extra = config.get("extra") or {}
    if not isinstance(extra, dict) or not isinstance(extra.get("data") or {}, dict):
        raise UserError(f"{source} is damaged", got="an entry extra that is no table of values")
    return extra


def extra_tensors(folder: Path) -> dict[str, Any]:
    """The further tensors in a model folder, under the name ``tensors``; nothing where there are none."""
    file = folder / EXTRA_TENSORS
    return {"tensors": load_tensors(file)} if file.is_file() else {}


def edm_values(denoiser: EDMDenoiser) -> dict[str, Any]:
    """The entries of a config on how a denoiser uses its network, besides its shape and classes."""
    said: dict[str, Any] = {name: getattr(denoiser, name) for name in _SIGMAS}
    if isinstance(denoiser, PathDenoiser):
        said |= {
            "path": path_to_dict(denoiser.path),
            "prediction": denoiser.prediction,
            "remainder": denoiser.remainder,
        }
    if denoiser.pfgm_dims:
        said["pfgm_dims"] = denoiser.pfgm_dims
    if denoiser.noise_unit != 1:
        said["noise_unit"] = denoiser.noise_unit
    if denoiser.jumps:
        said["jumps"] = True
    return said


def parametrized(net: nn.Module, config: Mapping[str, Any]) -> EDMDenoiser:
    """The denoiser of :func:`edm_values`, ``shape`` and ``num_classes``, around a network of one level."""
    options: dict[str, Any] = {name: float(config[name]) for name in _SIGMAS}
    options |= {"shape": tuple(config["shape"]), "num_classes": config["num_classes"]}
    options["pfgm_dims"] = float(config.get("pfgm_dims", 0.0))
    if "prediction" in config:
        remainder = bool(config.get("remainder", False))
        path = path_from_dict(config["path"])
        return PathDenoiser(net, path, config["prediction"], remainder=remainder, **options)
    return EDMDenoiser(net, noise_unit=float(config.get("noise_unit", 1.0)), **options)


# An owner and a name, as model hubs write them.
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def missing_model(path: str | os.PathLike[str], expected: str) -> UserError:
    """The error for a model that is not there; one that looks like the id on a hub gets that advice."""
    fix = "check the path"
    if _HUB_ID.fullmatch(os.fspath(path)) and not Path(path).parent.exists():
        fix = "distmatch does not download. If it is an id on a model hub, get its files first, for example "
        fix += f"with: hf download {path} --local-dir FOLDER. Then pass FOLDER"
    return UserError(f"{path} does not exist", expected=expected, fix=fix)


def _model_folder(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise UserError(
                f"{path} is a pickle or a torch archive and was not opened: loading one can run any code",
                expected=f"a folder with {_TENSORS} and {_CONFIG}",
                fix="convert it in an environment where you trust it",
            )
        raise UserError(f"{path} is a file", expected="a model folder or a run folder", fix="give its folder")
    if not path.exists():
        raise missing_model(path, "a model folder or a run folder")
    for candidate in (path, path / "model"):
        if (candidate / _CONFIG).is_file():
            return candidate
    raise UserError(
        f"{path} contains no model",
        expected=f"{_CONFIG} and {_TENSORS} in it or in its folder model/",
        fix="a run writes its model at its end: let it finish, or pass another folder",
    )


def _described(source: Path, config: dict[str, Any], tensors: int) -> EDMDenoiser:
    """The denoiser that a config describes, on the meta device: it has shapes and no memory yet.

    A network with more blocks than there are ``tensors`` is not built.
    """
    try:
        denoiser = _one_level(config, tensors)
        return taught_to_jump(denoiser) if config.get("jumps", False) else denoiser
    except UserError as error:
        raise UserError(f"{source} describes no model that can be built", got=str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{source} is damaged",
            got=cause(error),
            expected="the fields net, shape, num_classes, sigma_data, sigma_min, sigma_max",
            fix="restore it from a copy",
        ) from error


def _one_level(config: dict[str, Any], tensors: int) -> EDMDenoiser:
    """The denoiser of a config, its network of one noise level."""
    shape, num_classes = tuple(config["shape"]), config["num_classes"]
    net_config = from_dict(config["net"])
    if blocks(net_config) > tensors:
        raise UserError(
            "it belongs to another architecture",
            got=f"{tensors} tensors for a network of {blocks(net_config)} blocks",
            fix="use the config that was saved with the tensors",
        )
    text = TextInput(**config["text"]) if "text" in config else None
    with torch.device("meta"):
        net = build_net(net_config, shape, num_classes, text)
    denoiser = parametrized(net, config)
    encoder = config.get("prompt_encoder")
    if encoder is not None and "words" in encoder:
        denoiser.prompt_encoder = WordEncoder.from_dict(encoder)
    return denoiser
