"""The schedule contract: all that a plain call of diffusers needs to take a student's steps."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmatch.base.files import read_json
from distmatch.base.stack import caller_level
from distmatch.interop.card import GUIDANCE
from distmatch.interop.diffusers_parts import INDEX
from distmatch.nets.shared import adapted_of, dtype_of_base, fingerprint

FILE = "distmatch.json"
FORMAT = "distmatch-schedule"
_SAMPLERS = {"renoise": "stochastic", "jump": "gamma"}  # by their names in saved models


def schedule_contract(denoiser: nn.Module, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a student of a pipeline is sampled, as JSON; None for other models.

    Args:
        denoiser: The student's denoiser.
        about: The description that is saved with it: ``levels``, ``chain``, ``guidance``.

    Returns:
        ``sigmas``, and the same steps as ``times`` on the teacher's path; ``sampler``; ``prediction``,
        ``path`` and ``shift``; ``guidance``, the scale that the student was distilled with, and ``null``, the
        prompt that stands for "unconditional"; ``call``, the arguments of the pipeline's call, with guidance
        off; ``base``, its name on a hub (owner/name) if its folder says one, else that of the folder, and the
        sha256 and the dtype of the base of adapters; ``encoder``, the sha256 of the prompt encoder.
    """
    found: Any = getattr(denoiser, "pipeline", None)
    if found is None or about.get("kind") != "student" or found.schedule.path is None:
        return None
    path, sigmas = found.schedule.path, [float(sigma) for sigma in about["levels"]]
    place, _ = getattr(denoiser, "loaded_from", None) or ("", {})
    chain = str(about.get("chain", "renoise"))
    base = fingerprint(denoiser) if adapted_of(denoiser) is not None else None
    return {
        "format": FORMAT,
        "version": 1,
        "pipeline": type(found.tracer.pipeline).__name__,
        "network": type(found.tracer.network).__name__,
        "decoded": list(found.shape),
        "num_steps": len(sigmas),
        "sigmas": sigmas,
        "times": [times_of(path, sigma) for sigma in sigmas],
        "sampler": _SAMPLERS.get(chain, chain),
        "prediction": found.schedule.prediction,
        "path": path.name,
        "shift": found.shift,
        "guidance": about.get("guidance"),
        **{name: about[name] for name in GUIDANCE if name in about},
        "null": found.null,
        "call": call_options(found),
        "base": {
            "name": _hub_id(found.folder) or Path(place).name,
            "sha256": base,
            "dtype": dtype_of_base(denoiser),
        },
        "encoder": found.fingerprint,
    }


def _hub_id(folder: Path | None) -> str:
    """What the folder of a pipeline says that it was copied from, where that is no path; else ''."""
    file = None if folder is None else Path(folder) / INDEX
    index = read_json(file) if file is not None and file.is_file() else {}
    name = str(index.get("_name_or_path", "")) if isinstance(index, dict) else ""
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists() else ""


def with_schedule(denoiser: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved with a model, for a student of a pipeline with its contract as ``schedule``."""
    contract = schedule_contract(denoiser, about)
    return {**about, **({} if contract is None else {"schedule": contract})}


def warned_of_encoder(
    folder: str | os.PathLike[str], denoiser: Any, about: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A loaded student and its description; warns if its pipeline encodes prompts in another way now."""
    expected = (about.get("schedule") or {}).get("encoder")
    found = getattr(getattr(denoiser, "prompt_encoder", None), "fingerprint", expected)
    if expected is not None and found != expected:
        warnings.warn(
            f"{folder}: its pipeline has other text encoders, or in another dtype, than in training. Prompts "
            f"have other encodings for the student; pass the pipeline that it was trained with as base",
            stacklevel=caller_level(),
        )
    return denoiser, about


def metadata_of(about: Mapping[str, Any]) -> dict[str, str] | None:
    """The metadata of the safetensors of such a model: strings, and the mark that their readers look for."""
    contract = about.get("schedule")
    return None if contract is None else {"format": "pt", "distmatch": json.dumps(contract)}


def times_of(path: Any, sigma: float) -> float:
    """The time of a path at a noise level; its end beyond it."""
    level = torch.tensor([sigma], dtype=torch.float64)
    return float(path.t_of_rho(level).clamp(path.t_min, path.t_max))


def call_options(found: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call besides prompt and steps, as JSON: its size, and guidance off.

    A network that receives the guidance scale is called with the one that it was traced with.
    """
    tracer = found.tracer
    options = {**tracer.options, **tracer.guidance}
    if tracer.embedded and "guidance_scale" not in options:
        options["guidance_scale"] = (
            inspect.signature(type(tracer.pipeline).__call__).parameters["guidance_scale"].default
        )
    plain: dict[str, Any] = json.loads(json.dumps(options))
    return plain
