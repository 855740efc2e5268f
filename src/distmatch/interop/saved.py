"""Models with networks from elsewhere on disk, and one pair of functions for every kind of model.

A saved model is a folder with ``model.safetensors``, ``config.json`` and a model card, as those of our own
networks; one on latents also has its autoencoder, as diffusers writes it, in ``vae/``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.base.files import (
    atomic_folder,
    atomic_json,
    atomic_write,
    check_model_folder,
    load_into,
    load_tensors,
    read_json,
    save_tensors,
)
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import adapter_files
from distmatch.interop.adapter_files import place_of_base, save_adapters
from distmatch.interop.card import card_of
from distmatch.interop.diffusers_net import MODELS, DiffusersNet
from distmatch.interop.diffusers_parts import load_autoencoder, network_like, scheduler_from
from distmatch.interop.diffusers_teacher import (
    DiffusersSource,
    is_diffusers_folder,
    teacher_from,
)
from distmatch.interop.edm_checkpoint import (
    Preconditioning,
    is_network_pickle,
    loaded_edm,
    network_of,
    read_edm,
)
from distmatch.interop.edm_config import config_dict, config_from
from distmatch.interop.latents import VAEDecoder
from distmatch.interop.own_modules import HandedIn, described_module, null_tensors, rebuilt
from distmatch.interop.pipelines import load_folder
from distmatch.interop.pipelines.steps import metadata_of, warned_of_encoder, with_schedule
from distmatch.interop.text_encoder import TextEncoder
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.saved import (
    CARD,
    EXTRA_TENSORS,
    MODEL_PARTS,
    check_version,
    extra_tensors,
    extra_values,
    load_model,
    save_model,
)
from distmatch.nets.shared import adapted_of

Base = str | os.PathLike[str] | nn.Module
FORMAT = "distmatch-external-model"
VERSION = 1
MODULE_VERSION = 2  # with a module of the user's, which earlier releases cannot read
_TENSORS, _CONFIG, _VAE = "model.safetensors", "config.json", "vae"


def is_external(denoiser: object) -> bool:
    """Whether a denoiser's network comes from elsewhere, so that :func:`save_denoiser` writes this format."""
    if not isinstance(denoiser, nn.Module) or next(denoiser.parameters(), None) is None:
        return False
    config = getattr(getattr(denoiser, "net", None), "config", None)
    return not (isinstance(denoiser, EDMDenoiser) and isinstance(config, (MLPConfig, UNetConfig, DiTConfig)))


def save_denoiser(
    folder: str | os.PathLike[str],
    denoiser: nn.Module,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes any trainable denoiser so that a crash leaves the old model or the new one.

    Args:
        folder: The model folder; an earlier model in it is replaced.
        denoiser: A denoiser with parameters: a teacher or a student of it. Its network may be any module; one
            that is neither of distmatch nor of diffusers or EDM is needed again to load it.
        extra: More values to keep, as JSON.
        tensors: Further tensors to save; they come back as ``tensors`` among the values.
        metrics: The content of a run's ``metrics.json``, for the model card.

    Raises:
        UserError: The folder holds something else or cannot be written, or the denoiser cannot be saved.
    """
    about = vars(denoiser).get("trained_on")
    if about and "data" not in (extra or {}):
        extra = {**(extra or {}), "data": about}
    extra = with_schedule(denoiser, extra or {})
    if adapted_of(denoiser) is not None:
        save_adapters(Path(folder), denoiser, extra, metrics)
        return
    if not is_external(denoiser):
        if not isinstance(denoiser, EDMDenoiser):
            raise UserError("a denoiser of this kind cannot be saved", got=type(denoiser).__name__)
        save_model(folder, denoiser, extra, tensors, card_of(denoiser, extra, metrics=metrics))
        return
    folder = Path(folder)
    check_model_folder(folder, MODEL_PARTS)
    net, described = _described(denoiser)
    decoder = getattr(denoiser, "decoder", None)
    version = MODULE_VERSION if described["kind"] == "module" else VERSION
    if getattr(denoiser, "pipeline", None) is not None:  # the rest of which is not saved
        described["base"] = place_of_base(denoiser, folder)
    config = {"format": FORMAT, "version": version, **described, "extra": extra}
    with atomic_folder(folder) as temporary:
        state = {**net.state_dict(), **null_tensors(denoiser)}
        save_tensors(temporary / _TENSORS, state, metadata_of(extra))
        if tensors is not None:
            save_tensors(temporary / EXTRA_TENSORS, tensors)
        if isinstance(decoder, VAEDecoder):
            decoder.vae.save_pretrained(temporary / _VAE, safe_serialization=True)
            config["latents"] = decoder.to_dict()
        handed = described["kind"] == "module" and "library" not in described["module"]
        network = described["module"]["class"] if handed else ""
        atomic_write(temporary / CARD, card_of(denoiser, extra, metrics=metrics, network=network))
        atomic_json(temporary / _CONFIG, config)


def load_denoiser(
    folder: str | os.PathLike[str], network: HandedIn | None = None, base: Base | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads what :func:`save_denoiser` wrote, on the CPU, in eval mode.

    Args:
        folder: A model folder, or a run folder, which holds one as ``model/``.
        network: For a model with a network of the user's: the module, whose weights are replaced in a copy;
            its class, or a function that makes one; or a denoiser around it.
        base: For adapters or the network of a pipeline: the teacher or its folder; None looks where it was.

    Returns:
        The denoiser, and the extra values that were saved with it.

    Raises:
        UserError: The model is missing, not a distmatch model, damaged, or a package is missing.
    """
    adapters = _folder_of(Path(folder), adapter_files.FORMAT)
    if adapters is not None:
        config = read_json(adapters / _CONFIG)
        check_version(adapters, config, (adapter_files.VERSION,))
        on = partial(adapter_files.adapters_on, adapters, config)
        adapted = adapter_files.on_its_base(adapters, config, base, on, _base_at, network)
        return warned_of_encoder(folder, adapted, extra_values(adapters / _CONFIG, config))
    found = _folder_of(Path(folder), FORMAT)
    if base is not None and (found is None or "base" not in read_json(found / _CONFIG)):
        raise UserError(f"{folder} contains a full network, not adapters", fix="omit base")
    if found is not None:
        return warned_of_encoder(folder, *_load(found, network, base))
    if network is not None:
        raise needs_no_network(folder)
    denoiser, extra = load_model(folder)
    if (encoder := extra.pop("prompt_encoder", None)) is not None:
        denoiser.prompt_encoder = TextEncoder.from_dict(encoder)
    return denoiser, extra


def needs_no_network(folder: str | os.PathLike[str]) -> UserError:
    """The error for a network argument with a model that determines its network."""
    return UserError(
        f"{folder} already determines its network",
        got="a network argument",
        fix="omit network",
    )


def load_external(source: str | os.PathLike[str], **options: Any) -> Denoiser | None:
    """A teacher from elsewhere, or None when ``source`` is none.

    Args:
        source: A folder of diffusers, a folder that :func:`save_denoiser` wrote (or a run with one), or a
            network pickle of EDM or EDM2, which is read without running it.
        options: For a folder of diffusers, those of :func:`load_folder`; for a distmatch model,
            ``network``, see :func:`load_denoiser`.

    Raises:
        UserError: It is one and cannot be used.
    """
    path = Path(source)
    if is_network_pickle(path):
        return read_edm(path)[0]
    found = _folder_of(path, FORMAT)
    if found is not None:
        return _load(found, options.get("network"))[0]
    if path.is_dir() and is_diffusers_folder(path):
        return load_folder(path, **options)
    return None


def convert_edm(
    pickle: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    license: str = "",
) -> Denoiser:
    """Turns a network pickle of EDM or EDM2 into a folder of safetensors.

    Args:
        pickle: The ``.pkl``; nothing in it is run.
        folder: The model folder to write.
        vae: Folder of diffusers with the autoencoder that EDM2's latents are from, sd-vae-ft-mse.
        license: The licence that the model card states; '' where it is not known.

    Returns:
        The denoiser that was written.

    Raises:
        UserError: The pickle cannot be read, the folder cannot be written.
    """
    teacher, info = read_edm(pickle)
    if vae is not None:
        latents = info.get("latents")
        if latents is None:
            raise UserError("this network works on pixels and needs no autoencoder", fix="omit vae")
        teacher.decoder = _decoder(Path(vae), latents, teacher.shape)  # type: ignore[assignment]
    licence = {"license": license} if license else {}
    about = {"kind": "teacher", "converted_from": Path(pickle).name, **info, **licence}
    save_denoiser(folder, teacher, about)
    return teacher


def _described(denoiser: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The network whose tensors are kept, and how to build it again."""
    net = network_of(denoiser)
    if net is not None and (isinstance(denoiser, EDMDenoiser) or hasattr(denoiser, "preconditioning")):
        how = getattr(denoiser, "preconditioning", None) or Preconditioning()
        if isinstance(denoiser, EDMDenoiser):
            ends = {key: getattr(denoiser, key) for key in ("sigma_data", "sigma_min", "sigma_max")}
            how = dataclasses.replace(how, kind="edm", **ends)
        return net, {
            "kind": "edm",
            "network": config_dict(net.config),
            "preconditioning": dataclasses.asdict(how),
        }
    wrapped, source = getattr(denoiser, "net", None), getattr(denoiser, "source", None)
    if not isinstance(wrapped, DiffusersNet) or not isinstance(source, DiffusersSource):
        return described_module(denoiser)
    return wrapped.model, {
        "kind": "diffusers",
        "network": json.loads(wrapped.model.to_json_string()),
        "scheduler": json.loads(source.scheduler.to_json_string()),
        "options": source.options,
    }


def _folder_of(path: Path, form: str) -> Path | None:
    """The model folder in a format at ``path`` or in its ``model/``; None when there is none."""
    for candidate in (path, path / "model"):
        if (candidate / _CONFIG).is_file():
            config = read_json(candidate / _CONFIG)
            return candidate if isinstance(config, dict) and config.get("format") == form else None
    return None


def _base_at(path: Path, options: Mapping[str, Any], network: HandedIn | None) -> nn.Module:
    found = load_external(path, **options, **({} if network is None else {"network": network}))
    whole: Any = load_model(path)[0] if found is None else found
    if not isinstance(whole, nn.Module):
        raise UserError(f"{path} contains no network")
    return whole


def _load(
    folder: Path, network: HandedIn | None = None, base: Base | None = None
) -> tuple[Any, dict[str, Any]]:
    config = read_json(folder / _CONFIG)
    check_version(folder, config, (VERSION, MODULE_VERSION))
    if network is not None and config.get("kind") != "module":
        raise needs_no_network(folder)
    tensors = load_tensors(folder / _TENSORS)
    try:
        if config["kind"] == "module":
            on = partial(rebuilt, config, tensors, source=str(folder / _TENSORS))
            find = "base" in config and network is None
            denoiser: Any = (
                adapter_files.on_its_base(folder, config, base, on, _base_at) if find else on(network)
            )
        elif config["kind"] == "edm":
            how = Preconditioning(**config["preconditioning"])
            net_config = config_from(config["network"])
            denoiser = loaded_edm(net_config, how, tensors, str(folder / _TENSORS))
        else:
            model = network_like(config["network"], MODELS, tensors, str(folder / _TENSORS))
            scheduler = scheduler_from(config["scheduler"])
            denoiser = teacher_from(model, scheduler, **config["options"])
            load_into(model, tensors, str(folder / _TENSORS))
        latents = config.get("latents")
        if latents is not None:
            denoiser.decoder = _decoder(folder / _VAE, latents, denoiser.shape)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{folder / _CONFIG} is damaged",
            got=cause(error),
            fix="restore it from a copy",
        ) from error
    return denoiser.eval(), {**extra_values(folder / _CONFIG, config), **extra_tensors(folder)}


def _decoder(folder: Path, latents: Mapping[str, Any], shape: tuple[int, ...]) -> VAEDecoder:
    return VAEDecoder(
        load_autoencoder(folder),
        latents["scale"],
        latents["shift"],
        (shape[1], shape[2]),
        unit_pixels=latents["pixels"] == "0 to 1",
    )
