"""Teachers by name: our own runs, exact mixtures, folders of diffusers, network pickles of EDM."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.data import TOY_NAMES, toy
from distmatch.diffusion.conditioning import spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import load_denoiser, load_folder, read_edm
from distmatch.interop.diffusers_teacher import is_diffusers_folder
from distmatch.interop.edm_checkpoint import is_network_pickle
from distmatch.interop.pipelines.loading import needs_tracing
from distmatch.interop.saved import needs_no_network
from distmatch.methods.settings import RoleSettings, Settings
from distmatch.nets.saved import missing_model
from distmatch.training.config_format import read_config
from distmatch.training.known_data import remember

_UNCOMPARED = "not compared with its original, whose code is not run"


def is_from_elsewhere(source: str | os.PathLike[str]) -> bool:
    """Whether a path names a folder of diffusers or a network pickle."""
    path = Path(source)
    return is_network_pickle(path) or (path.is_dir() and is_diffusers_folder(path))


def open_denoiser(source: str | os.PathLike[str], **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model on disk, on the CPU, in eval mode, and what is known of it.

    Args:
        source: A run folder, a model folder, a folder of diffusers, or a network pickle of EDM or EDM2, which
            is read without running it.
        options: For a folder of diffusers, those of :func:`distmatch.interop.load_folder`. For a model
            with a network of the user's, ``network``, and for adapters ``base``: see
            :func:`distmatch.interop.load_denoiser`.

    Returns:
        The denoiser and its description. ``kind`` is ``teacher`` or ``student``; for a converted model,
        ``conversion`` is its difference from the original.

    Raises:
        UserError: There is none that can be used.
    """
    denoiser, info = _opened(Path(source), **options)
    # Adapters on it keep where it was, where all that it was loaded with can be kept.
    kept = {name: os.fspath(v) if isinstance(v, Path) else v for name, v in options.items()}
    plain = all(isinstance(v, (str, int, float, bool)) for name, v in kept.items() if name != "network")
    if (
        plain and getattr(denoiser, "loaded_from", None) is None
    ):  # a student of a pipeline keeps its teacher's
        kept.pop("network", None)
        denoiser.loaded_from = (os.path.abspath(source), kept)
    return denoiser, info


def _opened(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    network, base = options.pop("network", None), options.pop("base", None)
    if network is not None and is_from_elsewhere(path):
        raise needs_no_network(path)
    if base is not None and is_from_elsewhere(path):
        raise UserError(f"{path} contains a full network, not adapters", fix="omit base")
    if path.is_dir() and is_diffusers_folder(path):
        teacher = load_folder(path, **options)
        compared = getattr(teacher, "conversion", None)
        return teacher, {"kind": "teacher", "conversion": str(compared) if compared else "not compared"}
    if options and path.exists():
        raise takes_no_options(path, options)
    if is_network_pickle(path):
        teacher, info = read_edm(path)
        return teacher, {"kind": "teacher", "conversion": _UNCOMPARED, **info}
    if not path.exists():
        expected = f"a run or model folder, a folder of diffusers, a .pkl of EDM, or {', '.join(TOY_NAMES)}"
        raise missing_model(path, expected)
    _refuse_unfinished(path)
    _refuse_exported(path)
    denoiser, info = load_denoiser(path, network, base)
    remember(denoiser, info.get("data") or {})
    # Read by guidance: a network trained without label dropout has no unconditional prediction.
    denoiser.saw_no_class = info.get("label_dropout", 0.1) != 0
    return denoiser, info


def _refuse_unfinished(path: Path) -> None:
    """Refuses a run without a model, with the command that continues it."""
    models = (path / "config.json", path / "model" / "config.json")
    if not (path / "config.toml").is_file() or any(model.is_file() for model in models):
        return
    verb = read_config(path / "config.toml").get("verb")
    if verb in ("train", "distill"):
        raise UserError(
            f"{path} is a run that has not finished",
            got="no model in it",
            expected="the model that a run writes when it ends",
            fix=f"continue it: distmatch {verb} --resume --out {shlex.quote(str(path))}",
        )


def _refuse_exported(path: Path) -> None:
    """Refuses adapters for diffusers or peft, which are no model of distmatch."""
    found = next((name for name in _EXPORTED if (path / name).is_file()), None)
    if found is not None and not (path / "config.json").is_file():
        raise UserError(
            f"{path} contains adapters for diffusers or peft alone",
            got=found,
            expected="a run or model folder of distmatch",
            fix="pass the run that they were exported from; diffusers samples them, for exports of distmatch "
            "with the code in their README.md",
        )


_EXPORTED = ("pytorch_lora_weights.safetensors", "adapter_config.json")
_FLAGS = {"height": " (--size)", "num_frames": " (--frames)", "max_sequence_length": " (--max-tokens)"}
"""Where an option of the command line has another name than the argument."""


def takes_no_options(source: str | os.PathLike[str], options: Mapping[str, Any]) -> UserError:
    """The error for options of a folder of diffusers with a model that is none."""
    return UserError(
        "these options are for folders of diffusers",
        got=f"{', '.join(name + _FLAGS.get(name, '') for name in options)} for {source}",
        fix="omit them: other models do not need them",
    )


def open_teacher(source: str | os.PathLike[str], **options: Any) -> tuple[Denoiser, dict[str, Any]]:
    """A teacher from anything that :func:`open_denoiser` reads, or the exact one of a toy distribution.

    Returns:
        The frozen teacher and its description.

    Raises:
        UserError: There is none, or it is a student.
    """
    if str(source) in TOY_NAMES:
        if options:
            raise takes_no_options(source, options)
        return toy(str(source)), {"kind": "teacher", "data": {"spec": str(source)}}
    denoiser, info = open_denoiser(source, **options)
    if info.get("kind") == "student":
        raise UserError(f"{source} is a student, not a teacher", fix="pass the folder of a teacher")
    return denoiser.requires_grad_(False), info


def dtype_of_base(source: str, settings: Settings) -> dict[str, str]:
    """The option that loads a pipeline in the dtype in which adapters share its weights; none for others."""
    if not isinstance(settings, RoleSettings) or settings.train == "full" or not needs_tracing(source):
        return {}
    return {} if settings.base_dtype == "float32" else {"dtype": settings.base_dtype}


def describe_teacher(source: str | os.PathLike[str], **options: Any) -> dict[str, str]:
    """What a teacher takes and predicts, in words.

    Args:
        source: As for :func:`open_teacher`.
        options: As for :func:`open_denoiser`.

    Raises:
        UserError: There is none that can be used.
    """
    denoiser, info = open_teacher(source, **options)
    teacher: Any = denoiser
    pipeline = getattr(teacher, "pipeline", None)
    if pipeline is not None:
        found: dict[str, str] = pipeline.describe()
        if open_ended := [name for name, field in spec_of(teacher).items() if -1 in field.shape]:
            found["prompts"] = (
                f"any number of tokens in {', '.join(open_ended)}: distill with --tokens N, which pads all "
                "prompts to one length, or --encode live"
            )
    else:
        path = getattr(teacher, "path", None)
        fields = {name: f"{field.shape} {field.dtype}" for name, field in spec_of(teacher).items()}
        found = {
            "network": type(getattr(teacher, "net", teacher)).__name__,
            "sample": str(tuple(teacher.shape)),
            "conditioning": "; ".join(f"{name} {said}" for name, said in fields.items()) or "none",
            "classes": str(teacher.num_classes or "none"),
            "prediction": str(getattr(teacher, "prediction", "x0")),
            "path": "none: x0 + sigma eps" if path is None else path.name,
        }
    found |= {"sigma": f"{teacher.sigma_min:.4g} to {teacher.sigma_max:.4g}"}
    return found | ({"check": info["conversion"]} if info.get("conversion") else {})


def load_teacher(source: str | os.PathLike[str], **options: Any) -> Denoiser:
    """The teacher of :func:`open_teacher`, alone."""
    return open_teacher(source, **options)[0]
