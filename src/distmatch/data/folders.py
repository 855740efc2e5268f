"""Folders of images, with one sub-folder for each class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from distmatch.base.errors import UserError
from distmatch.data.arrays import from_arrays
from distmatch.data.dataset import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F")  # 16 and 32 bits: Pillow would clip them to 255 without a word


def load_folder(folder: Path) -> Dataset:
    """Reads all images of a folder, in the order of their names.

    Where there are two or more sub-folders with images, each is a class named after it, and whatever lies
    deeper belongs to it. Other files and names that begin with a dot are passed over. Images are grey when
    all of them are, else colour; alpha is dropped, and the orientation that a camera noted is applied.

    Args:
        folder: The folder.

    Raises:
        UserError: There is no image, one cannot be read, or one differs in size (the message names it).
    """
    groups: dict[str, list[Path]] = {}
    for file in _images_below(folder):
        parts = file.relative_to(folder).parts
        groups.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
    if not groups:
        raise UserError(
            f"no images in {folder}",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}, or sub-folders of them",
            fix="check the path",
        )
    if "" in groups and len(groups) > 1:
        raise UserError(
            f"{folder} has images both in itself and in sub-folders",
            got=f"{groups[''][0].name} beside the folder {sorted(groups)[1]}",
            expected="all images in one folder, or each in the sub-folder of its class",
            fix="move them",
        )
    classes = sorted(groups)
    files = [file for name in classes for file in groups[name]]
    labels = np.repeat(np.arange(len(classes)), [len(groups[name]) for name in classes])
    labelled = len(classes) > 1  # a single class says nothing
    return from_arrays(
        _read_all(files),
        labels if labelled else None,
        class_names=classes if labelled else (),
        name=str(folder),
    )


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, inner, names in os.walk(folder, onerror=_refuse):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        found += [
            Path(place, n) for n in names if not n.startswith(".") and n.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot look into {error.filename}", got=error.strerror, fix="check its permissions")


def _read_all(files: list[Path]) -> np.ndarray:
    """All images as (N, H, W) when all are grey, else (N, H, W, 3)."""
    first = _read(files[0])
    pixels = [first]
    for file in files[1:]:
        image = _read(file)
        if image.shape[:2] != first.shape[:2]:
            raise UserError(
                "images differ in size",
                got=f"{file} is {image.shape[1]}x{image.shape[0]} (width x height)",
                expected=f"{first.shape[1]}x{first.shape[0]}, as {files[0]}",
                fix="crop or resize them first",
            )
        pixels.append(image)
    if any(image.ndim == 3 for image in pixels):
        pixels = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in pixels]
    return np.stack(pixels)


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(_DEEP):
                raise UserError(
                    f"{file} has more than 8 bits a channel",
                    got=f"mode {opened.mode}",
                    fix="convert it to 8 bits",
                )
            image = ImageOps.exif_transpose(opened)
            return np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{file} does not fit into memory") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the image {file}",
            got=f"{type(error).__name__}: {error}",
            fix="it may be truncated or damaged: replace or remove it",
        ) from error
