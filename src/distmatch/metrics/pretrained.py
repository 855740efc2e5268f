"""Feature spaces of pretrained networks, whose values on images are kept on disk by content."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.files import cache_folder
from distmatch.base.progress import quietly
from distmatch.interop.encodings import encoded, key_of
from distmatch.interop.image_encoders import ImageEncoder
from distmatch.metrics.features import Features

_BATCH = 32  # images at a time: more do not make a CPU faster
_MOST_CACHED = 2**31  # bytes of the features of one network on disk
_SAME = 1e-3  # how far rounding may take features, relative to their length


def encoder_features(encoder: ImageEncoder, cache: Path | None = None) -> Features:
    """The features of a pretrained network.

    Samples are rounded to 8 bits first, as images are saved, so that a file of samples and the model that it
    was drawn from have the same features; grey ones are repeated for the three channels.

    Args:
        encoder: The network.
        cache: Folder of features by content, of which each network has its own below it; by default
            ``features`` in :func:`~distmatch.base.files.cache_folder`. One that cannot be read or written
            costs time, never the result.
    """
    networks = {torch.device("cpu"): encoder.network}
    place = (cache_folder() / "features" if cache is None else cache, encoder.fingerprint)
    checked: list[bool] = []

    def features(x: Tensor) -> Tensor:
        network = _on(x.device, networks)
        pixels = _pixels(x)
        compute = partial(_encode, network, pixels)
        try:
            return _cached(*place, pixels, compute, checked)
        except (UserError, OSError):
            return compute(range(len(pixels)))

    fingerprint = encoder.fingerprint[:8]
    about = f"{encoder.name} {fingerprint}, {encoder.about}. The same on every machine, up to rounding"
    return Features(encoder.name, features, fingerprint=fingerprint, about=about, published=encoder.published)


def check_images(shape: Sequence[int]) -> None:
    """Refuses samples that are no grey or colored images.

    Args:
        shape: Of one sample.

    Raises:
        UserError: They are not.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            "pretrained features are of images",
            got=f"samples of shape {tuple(shape)}",
            expected="(1, H, W) or (3, H, W)",
            fix="use --features classifier or pixels",
        )


def _pixels(x: Tensor) -> Tensor:
    """Images in model space as bytes (N, C, H, W)."""
    check_images(x.shape[1:])
    return (x.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8)


@torch.inference_mode()
def _encode(network: nn.Module, pixels: Tensor, rows: Sequence[int]) -> Tensor:
    """Features (len(rows), D) of some of the images, float32."""
    parts = pixels[list(rows)].split(_BATCH)
    return torch.cat([network(part.float().expand(-1, 3, -1, -1)).float() for part in parts])


def _on(device: torch.device, networks: dict[torch.device, nn.Module]) -> nn.Module:
    if device not in networks:
        networks[device] = copy.deepcopy(networks[torch.device("cpu")]).to(device)
    return networks[device]


def _cached(
    folder: Path, fingerprint: str, pixels: Tensor, compute: partial[Tensor], checked: list[bool]
) -> Tensor:
    """Features of images, computed where they are not on disk yet.

    One image is computed in any case, once for each space: features of another version of the package would
    be found under the same name.

    Raises:
        UserError: The folder cannot be written.
    """
    _make_room(folder)
    plain, shape = pixels.cpu().contiguous().numpy(), str(tuple(pixels.shape[1:]))
    keys = [key_of(shape, image.tobytes()) for image in plain]
    with quietly():
        found = encoded(
            folder,
            fingerprint,
            keys,
            lambda rows: {"features": compute(rows)},
            what="images",
            batch=len(keys),
        )
    values = found.index(torch.arange(len(keys)))["features"]
    if not checked:
        first = compute([0])[0].cpu()
        if not (first - values[0]).norm() <= _SAME * first.norm():
            warnings.warn(
                f"the features in {folder} are of another version of this network and are not used: remove "
                f"the folder",
                stacklevel=2,
            )
            raise UserError("cached features are out of date", got=str(folder))
        checked.append(True)
    return values.to(pixels.device)


def _make_room(folder: Path) -> None:
    """Removes the oldest files while there are too many."""
    with contextlib.suppress(OSError):
        files = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in folder.glob("*/*.safetensors"))
        size = sum(size for _, size, _ in files)
        for _, own, file in files:
            if size <= _MOST_CACHED:
                break
            file.unlink()
            size -= own
