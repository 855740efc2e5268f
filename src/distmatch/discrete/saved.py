"""A token network on disk: ``model.safetensors`` and ``config.json``, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError, cause
from distmatch.base.files import (
    atomic_folder,
    atomic_json,
    check_model_folder,
    load_into,
    load_tensors,
    read_json,
    save_tensors,
)
from distmatch.discrete.network import NETWORKS, MarginalNet, TokenNet, TokenNetConfig

FORMAT = "distmatch-discrete"
VERSION = 1
_TENSORS, _CONFIG = "model.safetensors", "config.json"


def save_discrete(
    folder: str | os.PathLike[str], model: TokenNet | MarginalNet, extra: Mapping[str, Any] | None = None
) -> None:
    """Writes a network so that a crash leaves the old one or the new one.

    Args:
        folder: The model folder; an earlier model in it is replaced.
        model: What to save.
        extra: More values to keep, as JSON: the alphabet, where it came from.

    Raises:
        UserError: The folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    check_model_folder(folder, (_TENSORS, _CONFIG))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "conditionals" if isinstance(model, TokenNet) else "marginals",
        "net": asdict(model.config),
        "extra": dict(extra or {}),
    }
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / _TENSORS, model.state_dict())
        atomic_json(temporary / _CONFIG, config)


def load_discrete(folder: str | os.PathLike[str]) -> tuple[TokenNet | MarginalNet, dict[str, Any]]:
    """Reads what :func:`save_discrete` wrote, on the CPU, in eval mode. No random number is drawn.

    Returns:
        The network, and the extra values that were saved with it.

    Raises:
        UserError: The model is missing, not a distmatch token network, damaged, or a pickle.
    """
    folder = Path(folder)
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise UserError(
            f"{folder / _CONFIG} does not describe a token network of this version of distmatch",
            expected=f"format {FORMAT!r}, version {VERSION}",
            fix="pass the folder that save_discrete wrote",
        )
    tensors = load_tensors(folder / _TENSORS)
    try:
        net, kind = TokenNetConfig(**config["net"]), NETWORKS[config["kind"]]
        if net.depth > len(tensors):
            raise ValueError(f"{len(tensors)} tensors for {net.depth} blocks")
        with torch.device("meta"):
            model = kind(net)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"{folder / _CONFIG} describes no network that can be built",
            got=cause(error),
            fix="restore it from a copy",
        ) from error
    load_into(model, tensors, str(folder / _TENSORS))
    return model.eval(), dict(config.get("extra") or {})
