"""Teachers of diffusers: a folder, or a network and a scheduler, as a denoiser."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distmatch.base.errors import UserError
from distmatch.base.files import read_json
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.interop.conversion import Conversion, check_conversion
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.diffusers_parts import (
    CONFIG,
    INDEX,
    NETWORKS,
    SCHEDULER,
    check_components,
    decoder_folder,
    load_autoencoder,
    load_network,
    load_scheduler,
    part,
)
from distmatch.interop.diffusers_reference import DiffusersReference
from distmatch.interop.diffusers_schedule import read_schedule
from distmatch.interop.latents import VAEDecoder, vae_scaling
from distmatch.interop.optional import import_diffusers
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.saved import missing_model

Teacher = PredictionDenoiser | EDMDenoiser

# A converted teacher that differs by more than rounding in float32 was not understood.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DiffusersSource:
    """The components of a diffusers teacher besides its network: enough to save it and to compare it.

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
        scheduler: The scheduler that it was trained with: it determines the noise levels and the prediction
            type.
        vae: The ``AutoencoderKL`` or ``VQModel`` on whose latents the network was trained; ``decoder`` of the
            denoiser uses it.
        size: Height and width of a sample; by default the network's ``sample_size``.
        null_class: The label that means "unconditional". A transformer's own is known.
        sigma_data: Standard deviation of what it was trained on; by default what the scheduler states, or 1
            for latents and 0.5 for images.
        features: Names of the modules whose outputs are its features; by default the middle.
        levels: Whether a network of 1000 timesteps receives fractional timesteps, or rounded ones.

    Returns:
        A denoiser with features, ``decoder`` (or None) and ``source``.

    Raises:
        UserError: A network, scheduler or option that is not understood.
    """
    schedule = read_schedule(scheduler)
    if sigma_data is not None and schedule.sigma_data not in (None, sigma_data):
        raise UserError(
            "sigma_data is a part of how this network was trained, and its scheduler states it",
            got=sigma_data,
            expected=schedule.sigma_data,
            fix="leave it out",
        )
    net = DiffusersNet(
        model, sign=-1.0 if schedule.prediction == "-edm" else 1.0, null_class=null_class, features=features
    )
    side = model.config.sample_size if size is None else size
    if side is None:
        raise UserError("the image size of the network is not known", fix="pass size, in pixels")
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
        teacher = PredictionDenoiser(
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
            "network and autoencoder do not match",
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
    """A teacher from a folder of diffusers: a pipeline, or a network next to its scheduler.

    Only ``safetensors`` files are read, and nothing is downloaded.

    Args:
        folder: A pipeline's folder (``model_index.json``), or that of a network (``config.json``).
        scheduler: Folder of the scheduler, if it is neither in the pipeline nor next to the network.
        vae: Folder of an autoencoder; True takes that of the pipeline, if any; False leaves it out.
        check: Compare a few predictions with diffusers; ``teacher.conversion`` holds the result.
        options: The other options of :func:`teacher_from`.

    Raises:
        UserError: Not such a folder, files missing, weights that are pickles, something not understood.
    """
    root = Path(folder)
    if not root.exists():
        raise missing_model(folder, "a folder that diffusers saved")
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder", expected="a folder that diffusers saved", fix="check the path"
        )
    network = part(root, NETWORKS, CONFIG)
    if network is None:
        raise UserError(
            f"{root} contains no network of diffusers",
            expected=f"{' or '.join(NETWORKS)} with {CONFIG}, or {CONFIG} itself",
            fix="pass the folder that save_pretrained wrote",
        )
    import_diffusers()
    if network != root:
        check_components(root)
    model = load_network(network)
    plan = part(Path(scheduler), ("scheduler",), SCHEDULER) if scheduler is not None else None
    if scheduler is None:
        places = (root, root.parent) if network == root else (root,)
        plan = next((p for p in (part(r, ("scheduler",), SCHEDULER) for r in places) if p), None)
    if plan is None:
        raise UserError(
            f"no {SCHEDULER} for {root}",
            expected="a folder scheduler/ in it or next to it",
            fix="the scheduler determines the noise levels: put both into one pipeline folder with "
            "model_index.json, or in Python pass its folder: load_teacher(folder, scheduler=...)",
        )
    decoder = None
    if vae is not False:
        place = decoder_folder(root) if vae is True else Path(str(vae))
        decoder = load_autoencoder(place) if place is not None else None
    teacher = teacher_from(model, load_scheduler(plan), vae=decoder, **options)
    if check:
        found = check_teacher(teacher, points=4, tolerance=_TOLERANCE)
        teacher.conversion = found  # type: ignore[assignment]
    return teacher


def is_diffusers_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by diffusers: a pipeline or a network."""
    root = Path(folder)
    if (root / INDEX).is_file():
        return True
    if not (root / CONFIG).is_file():
        return False
    config = read_json(root / CONFIG)
    return isinstance(config, dict) and "_diffusers_version" in config
