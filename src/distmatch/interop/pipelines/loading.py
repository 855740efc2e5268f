"""A pipeline from its folder: tensors and configs only, and only classes of diffusers and transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError, cause
from distmatch.base.files import read_json
from distmatch.interop.diffusers_parts import (
    CONFIG,
    INDEX,
    NETWORKS,
    SCHEDULER,
    is_text_part,
    load_component,
    parts_of,
)
from distmatch.interop.finite import check_finite
from distmatch.interop.optional import OptionalPackage, import_diffusers
from distmatch.interop.pipelines.skeleton import without_weights
from distmatch.nets.saved import missing_model

_TRANSFORMERS = OptionalPackage("transformers", "pipelines with text encoders need", "diffusers")
_DROPPED = ("safety_checker", "feature_extractor", "watermark")  # they do not change what is denoised
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WRAP = (
    "use a pipeline without it; or load the network in Python, and pass dm.as_denoiser(net, ..., call=...)"
)
# Networks beside the one that denoises, which a pipeline would call as well.
_SECOND = ("transformer_2", "prior", "controlnet", "image_encoder", "connectors", "refiner")


def needs_tracing(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline that is conditioned on text, which is read by tracing it."""
    root = Path(folder)
    return (root / INDEX).is_file() and any(is_text_part(name) for name in parts_of(root)[1])


def load_parts(root: Path, dtype: torch.dtype | None = torch.float32) -> tuple[Any, str]:
    """The pipeline in a folder, on the CPU, and the name of its denoising network.

    Nothing is downloaded, no pickle is opened and no code of the folder is run.

    Args:
        root: The folder.
        dtype: The dtype of all parts. None reads no weights: they are on the meta device
            (:mod:`distmatch.interop.pipelines.skeleton`).

    Raises:
        UserError: Something in the folder would need that, is missing or damaged, or the pipeline has two
            networks.
    """
    if not root.is_dir():
        raise missing_model(root, "the folder of a pipeline of diffusers")
    index, listed = parts_of(root)
    code = sorted(str(path.relative_to(root)) for path in root.rglob("*.py"))
    if code:
        raise _refused(root, f"code: {code[0]}", "a pipeline whose code is that of diffusers")
    names = listed - set(_DROPPED)
    networks = [name for name in NETWORKS if name in names]
    others = sorted(name for name in names if name in _SECOND)
    if len(networks) != 1 or others:
        found = ", ".join([*networks, *others]) or "none"
        raise _refused(root, f"networks: {found}", f"one denoising network: {' or '.join(NETWORKS)}")
    with quiet() as diffusers:
        kind = _class(diffusers, index.get("_class_name"), diffusers.DiffusionPipeline, root / INDEX)
        # All are checked before any is loaded.
        kinds = {name: _checked(root, name, index[name]) for name in sorted(names)}
        parts: dict[str, Any] = {name: None for name in _DROPPED if name in index}
        for name, part in kinds.items():
            if part is not None:
                place = root / name
                parts[name] = without_weights(part, place) if dtype is None else _loaded(part, place, dtype)
        try:
            pipeline = kind.from_pretrained(root, local_files_only=True, use_safetensors=True, **parts)
        except MemoryError:
            raise
        except Exception as error:  # a class of another package, and files that may hold anything
            raise UserError(
                f"diffusers cannot load the pipeline {root}", got=cause(error), fix="copy the folder again"
            ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline, networks[0]


def load_part(root: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """One part of a pipeline that has weights, frozen, on the CPU.

    Raises:
        UserError: As for :func:`load_parts`.
    """
    with quiet():
        kind = _checked(root, name, parts_of(root)[0][name])
        found: torch.nn.Module = _loaded(kind, root / name, dtype).eval().requires_grad_(False)
    return found


def _loaded(kind: Any, place: Path, dtype: torch.dtype) -> Any:
    ours = issubclass(kind, import_diffusers().ModelMixin)
    return load_component(place, kind.__name__, dtype) if ours else _text_encoder(kind, place, dtype)


def _checked(root: Path, name: str, entry: Any) -> Any:
    """The class of a part with weights; None for what the pipeline reads itself, such as a tokenizer."""
    library, class_name = entry
    folder = root / name
    if library not in ("diffusers", "transformers"):
        raise _refused(
            root,
            f"{name}: {str(library)[:80]}.{str(class_name)[:80]}",
            "classes of diffusers and transformers",
        )
    if not folder.is_dir():
        raise UserError(
            f"{root} lists a part that is not in it", got=f"no {name}/", fix="copy the folder again, complete"
        )
    if name == "scheduler":
        _class(import_diffusers(), class_name, import_diffusers().SchedulerMixin, root / INDEX)
        if not (folder / SCHEDULER).is_file():
            raise UserError(f"{folder} has no {SCHEDULER}", fix="copy the folder again, complete")
        return None
    files = sorted(file.name for file in folder.iterdir())
    config = read_json(folder / CONFIG) if CONFIG in files else {}
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is damaged", got=f"a {type(config).__name__}")
    if "auto_map" in config:
        raise _refused(root, f"{name}: its config names code (auto_map)", "no code beside the weights")
    if config.get("quantization_config"):
        raise _refused(root, f"{name}: quantized weights", "weights of 16 bits or more")
    if library == "diffusers":
        found: Any = _class(import_diffusers(), class_name, import_diffusers().ModelMixin, root / INDEX)
    else:
        transformers = _TRANSFORMERS.load()
        found = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
        if not isinstance(found, type):
            raise _refused(root, f"{name}: {str(class_name)[:80]}", "a class of transformers")
        if not issubclass(found, transformers.PreTrainedModel):
            return None
    if not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in files if file.endswith(_PICKLES)]
        got = (
            f"{name}/{pickles[0]}, a pickle, which can run any code" if pickles else f"no weights in {name}/"
        )
        raise _refused(
            root, got, "safetensors", "save_pretrained(folder, safe_serialization=True), where you trust it"
        )
    return found


def _text_encoder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    # model.fp16.safetensors and its like, where there is no other: the part in the middle is the variant.
    middle = names[0].removesuffix(".safetensors").split(".")[1:]
    plain = any("." not in name.removesuffix(".safetensors") for name in names)
    try:
        with torch.random.fork_rng(devices=[]):
            model, about = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                variant=None if plain or not middle else middle[0].split("-")[0],
                dtype=dtype,
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"transformers cannot load {folder}", got=cause(error), fix="copy it again"
        ) from error
    missing = sorted(about["missing_keys"])
    if missing:  # they would be random
        raise UserError(
            f"the weights in {folder} are not those of its {CONFIG}",
            got=f"{len(missing)} missing, such as {missing[0]}",
            fix="copy the folder again, with the config that was saved beside the weights",
        )
    check_finite(model, folder)
    return model


def _class(package: Any, name: object, base: type, source: Path) -> Any:
    """A class of a package by its name, if it is of the right kind."""
    found = getattr(package, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{source} names no class that is known",
            got=str(name)[:80],
            expected=f"a {base.__name__} of {package.__name__} {package.__version__}",
            fix="custom pipelines are not run; wrap the network yourself with dm.as_denoiser",
        )
    return found


def _refused(root: Path, got: str, expected: str, fix: str = _WRAP) -> UserError:
    return UserError(
        f"the pipeline in {root} is not loaded",
        got=got,
        expected=expected,
        fix=fix,
    )


@contextmanager
def quiet() -> Iterator[Any]:
    """The package diffusers, without the bars and the warnings on missing packages of both libraries."""
    libraries = [import_diffusers(), _TRANSFORMERS.load()]
    logs = [library.utils.logging for library in libraries]
    before = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield libraries[0]
    finally:
        for log, (shown, verbosity) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if shown:
                log.enable_progress_bar()
