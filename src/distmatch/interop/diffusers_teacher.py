"""Teachers of diffusers: a folder, or a network and a scheduler at hand, as a denoiser."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.files import read_json
from distmatch.diffusion.adapters import PredictionFeatureDenoiser
from distmatch.interop.conversion import Conversion, check_conversion
from distmatch.interop.diffusers_net import MODELS, DiffusersNet
from distmatch.interop.diffusers_reference import DiffusersReference
from distmatch.interop.diffusers_schedule import SCHEDULERS, read_schedule
from distmatch.interop.latents import VAEDecoder, vae_scaling
from distmatch.interop.optional import import_diffusers
from distmatch.nets.edm import EDMDenoiser

Teacher = PredictionFeatureDenoiser | EDMDenoiser

_CONFIG, _SCHEDULER, _INDEX = "config.json", "scheduler_config.json", "model_index.json"
_NETWORKS = ("unet", "transformer")
# A converted teacher that differs by more than rounding in float32 was not understood.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DiffusersSource:
    """What a teacher of diffusers was made of, beside its network: enough to save it and to compare it.

    Attributes:
        scheduler: Its scheduler, as diffusers has it.
        options: The options of :func:`teacher_from` that were given.
    """

    scheduler: Any
    options: dict[str, Any]


def teacher_from(
    model: Any,
    scheduler: Any,
    *,
    vae: Any = None,
    size: int | tuple[int, int] | None = None,
    null_class: int | None = None,
    sigma_data: float | None = None,
    features: Sequence[str] | None = None,
    levels: Literal["interpolate", "snap"] = "interpolate",
) -> Teacher:
    """A denoiser around a network of diffusers and its scheduler.

    Args:
        model: A ``UNet2DModel`` or ``DiTTransformer2DModel``; it is used, not copied.
        scheduler: The scheduler that it was trained with: it tells the noise levels and what is predicted.
        vae: The ``AutoencoderKL`` whose latents the network was trained on; ``denoiser.decoder`` uses it.
        size: Height and width of a sample; by default the network's ``sample_size``.
        null_class: The label that stands for "no condition". A transformer's own is known.
        sigma_data: Standard deviation of what it was trained on; by default what the scheduler states, or 1
            for latents and 0.5 for images.
        features: Names of the modules whose outputs are lent as features; by default the middle.
        levels: Whether a network of 1000 times is told times between them, or the nearest one.

    Returns:
        A denoiser with ``with_features``, ``decoder`` (or None) and ``source``.

    Raises:
        UserError: A network, scheduler or option that is not understood.
    """
    schedule = read_schedule(scheduler)
    net = DiffusersNet(
        model, sign=-1.0 if schedule.prediction == "-edm" else 1.0, null_class=null_class, features=features
    )
    side = model.config.sample_size if size is None else size
    if side is None:
        raise UserError("the network does not say how large its images are", fix="pass size, in pixels")
    height, width = (int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1]))
    shape = (net.channels, height, width)
    spread = sigma_data or schedule.sigma_data or (1.0 if vae is not None else 0.5)
    teacher: Teacher
    if schedule.path is None:
        low, high = schedule.ends or (0.002, 80.0)
        teacher = EDMDenoiser(
            net, shape=shape, num_classes=net.num_classes, sigma_data=spread, sigma_min=low, sigma_max=high
        )
    else:
        if getattr(model.config, "time_embedding_type", None) == "learned":
            levels = "snap"  # a table of times has no row between two of them
        teacher = PredictionFeatureDenoiser(
            net,
            schedule.path,
            schedule.prediction,
            shape=shape,
            num_classes=net.num_classes,
            sigma_data=spread,
            time=schedule.time,
            levels=levels if schedule.family == "discrete" else "interpolate",
        )
    decoder = VAEDecoder(vae, *vae_scaling(vae.config), size=(height, width)) if vae is not None else None
    if decoder is not None and int(vae.config.latent_channels) != net.channels:
        raise UserError(
            "network and autoencoder do not belong together",
            got=f"{net.channels} channels and latents of {vae.config.latent_channels}",
        )
    options = {
        "size": [height, width],
        "null_class": null_class,
        "sigma_data": spread,
        "features": list(net.features),
        "levels": levels,
    }
    teacher.decoder = decoder  # type: ignore[assignment]
    teacher.source = DiffusersSource(scheduler, options)  # type: ignore[assignment]
    return teacher.eval()


def check_teacher(
    teacher: Teacher, *, points: int = 8, seed: int = 0, tolerance: float | None = None
) -> Conversion:
    """How far a teacher of :func:`teacher_from` is from what diffusers computes with the same network.

    Args:
        teacher: The teacher.
        points: Number of random points.
        seed: Their seed.
        tolerance: Largest acceptable difference, relative to the largest value; None: any.

    Raises:
        UserError: It is no teacher of diffusers, or too far off.
    """
    source, net = getattr(teacher, "source", None), getattr(teacher, "net", None)
    if not isinstance(source, DiffusersSource) or not isinstance(net, DiffusersNet):
        raise UserError(
            "only a teacher of diffusers can be compared with diffusers", got=type(teacher).__name__
        )
    reference = DiffusersReference(net, source.scheduler, teacher.shape, teacher.num_classes)
    return check_conversion(teacher, reference, points=points, seed=seed, tolerance=tolerance)


def load_diffusers(
    folder: str | os.PathLike[str],
    *,
    scheduler: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | bool = True,
    check: bool = True,
    **options: Any,
) -> Teacher:
    """A teacher from a folder of diffusers: a whole pipeline, or a network beside its scheduler.

    Only ``safetensors`` files are read, and nothing is downloaded.

    Args:
        folder: A pipeline's folder (``model_index.json``), or that of a network (``config.json``).
        scheduler: Folder of the scheduler, when it is neither in the pipeline nor beside the network.
        vae: Folder of an autoencoder; True takes that of the pipeline, if any; False leaves it out.
        check: Compare a few predictions with diffusers; ``teacher.conversion`` holds the result.
        options: The other options of :func:`teacher_from`.

    Raises:
        UserError: Not such a folder, files missing, weights that are pickles, something not understood.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder", expected="a folder that diffusers saved", fix="check the path"
        )
    network = _part(root, _NETWORKS, _CONFIG)
    if network is None:
        raise UserError(
            f"{root} holds no network of diffusers",
            expected=f"{' or '.join(_NETWORKS)} with {_CONFIG}, or {_CONFIG} itself",
            fix="give the folder that save_pretrained wrote",
        )
    package = import_diffusers()
    model = _load(package, network, MODELS)
    plan = _part(Path(scheduler), ("scheduler",), _SCHEDULER) if scheduler is not None else None
    if scheduler is None:
        places = (root, root.parent) if network == root else (root,)
        plan = next((p for p in (_part(r, ("scheduler",), _SCHEDULER) for r in places) if p), None)
    if plan is None:
        raise UserError(
            f"no {_SCHEDULER} for {root}",
            expected="a folder scheduler/ in it or beside it",
            fix="the scheduler tells the noise levels: pass its folder as scheduler",
        )
    decoder = None
    if vae is not False:
        place = _part(root, ("vae",), _CONFIG, alone=False) if vae is True else Path(str(vae))
        decoder = load_autoencoder(place) if place is not None else None
    teacher = teacher_from(model, _scheduler(package, plan), vae=decoder, **options)
    if check:
        found = check_teacher(teacher, points=4, tolerance=_TOLERANCE)
        teacher.conversion = found  # type: ignore[assignment]
    return teacher


def load_autoencoder(folder: str | os.PathLike[str]) -> Any:
    """The ``AutoencoderKL`` in a folder of diffusers, from safetensors.

    Raises:
        UserError: There is none that can be read.
    """
    place = Path(folder)
    if not (place / _CONFIG).is_file():
        raise UserError(f"{place} holds no autoencoder", expected=f"{_CONFIG} and safetensors")
    return _load(import_diffusers(), place, ("AutoencoderKL",))


def is_diffusers_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by diffusers: a pipeline or a network."""
    root = Path(folder)
    if (root / _INDEX).is_file():
        return True
    if not (root / _CONFIG).is_file():
        return False
    config = read_json(root / _CONFIG)
    return isinstance(config, dict) and "_diffusers_version" in config


def _part(root: Path, names: Sequence[str], file: str, *, alone: bool = True) -> Path | None:
    """The folder of one part of a pipeline: a subfolder, or the root itself."""
    for name in names:
        if (root / name / file).is_file():
            return root / name
    return root if alone and (root / file).is_file() else None


def _class_of(path: Path, known: Sequence[str]) -> str:
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in known:
        raise unknown_name(f"class in {path}", name, known)
    return str(name)


def _load(package: Any, folder: Path, known: Sequence[str]) -> Any:
    """A model of diffusers from safetensors, in float32."""
    name = _class_of(folder / _CONFIG, known)
    files = sorted(f.name for f in folder.iterdir())
    safe = [f for f in files if f.endswith(".safetensors")]
    if not safe:
        pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} is a pickle and was not opened: loading one can run any code",
                expected="diffusion_pytorch_model.safetensors",
                fix="save it with save_pretrained(folder, safe_serialization=True) where you trust it",
            )
        raise UserError(f"{folder} has no weights", expected="diffusion_pytorch_model.safetensors", got=files)
    # diffusion_pytorch_model.fp16.safetensors and its like: the part in the middle is the variant.
    middle = safe[0].removesuffix(".safetensors").split(".")[1:]
    variant = (
        middle[0].split("-")[0] if middle and "diffusion_pytorch_model.safetensors" not in safe else None
    )
    try:
        # It fills the network with random numbers first; those of the caller stay as they were.
        with torch.random.fork_rng(devices=[]):
            model, found = getattr(package, name).from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                variant=variant,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"diffusers cannot load {folder}", got=error, fix="it may be cut off: copy it again"
        ) from error
    # diffusers would leave missing tensors at random values, with a warning.
    for what in ("missing_keys", "unexpected_keys"):
        if found[what]:
            raise UserError(
                f"the weights in {folder} are not those of its {_CONFIG}",
                got=f"{len(found[what])} {what.replace('_', ' ')}, such as {sorted(found[what])[0]}",
                fix="copy the folder again, with the config that was saved beside the weights",
            )
    # diffusers leaves the weights in the mapped file, where they begin at any byte. Kernels choose their way
    # by alignment: a resumed run would not repeat the first one bit for bit.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _scheduler(package: Any, folder: Path) -> Any:
    name = _class_of(folder / _SCHEDULER, SCHEDULERS)
    try:
        return getattr(package, name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"diffusers cannot read {folder / _SCHEDULER}", got=error) from error
