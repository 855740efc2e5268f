"""Folders of images, with one sub-folder for each class."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distmatch.base.errors import UserError
from distmatch.data.arrays import from_arrays
from distmatch.data.bounds import check_bytes
from distmatch.data.classes import from_folder_name, in_order
from distmatch.data.dataset import Dataset
from distmatch.data.images import IMAGE_SUFFIXES, images_below, read_image
from distmatch.data.prompts import captioned_images, has_captions

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder, found and not read.

    Attributes:
        files: The images, class by class, in the order of their names.
        labels: The class of each, or ().
        class_names: The names of the classes, or ().
        captions: A caption for each, or ().
    """

    files: Sequence[Path]
    labels: Sequence[int] = ()
    class_names: Sequence[str] = ()
    captions: Sequence[str] = ()


def load_folder(folder: Path) -> Dataset:
    """Reads all images of a folder, in the order of their names.

    Images are grey when all of them are, else color; alpha is dropped, and the orientation that a camera
    noted is applied.

    Args:
        folder: The folder, see :func:`find_images`.

    Raises:
        UserError: As of :func:`find_images`; or an image cannot be read, or differs in size (the message
            names it).
    """
    found = find_images(folder)
    data = from_arrays(
        _read_all(found.files), found.labels or None, class_names=found.class_names, name=str(folder)
    )
    return dataclasses.replace(data, captions=tuple(found.captions))


def find_images(folder: Path) -> FolderImages:
    """The images of a folder, with their classes and captions.

    Where there are two or more sub-folders with images, each is a class named after it; numbers are in order
    of their value. Other files and names that begin with a dot are passed over. ``metadata.jsonl`` with a
    column ``text``, ``prompt`` or ``caption`` has the captions of all images.

    Args:
        folder: The folder.

    Raises:
        UserError: There is no image; or the sub-folders are parts of the data rather than classes, or hold
            folders themselves; or an image has no caption and others have.
    """
    groups: dict[str, list[Path]] = {}
    depth = len(folder.parts)
    for file in images_below(folder):
        parts = file.parts[depth:]
        groups.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
    if not groups:
        raise UserError(
            f"no images in {folder}",
            expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}, or sub-folders of them",
            fix="check the path",
        )
    _check_layout(folder, groups)
    own = {from_folder_name(name): name for name in groups}
    classes = in_order(list(own))
    files = [file for name in classes for file in groups[own[name]]]
    captions: list[str] = []
    if has_captions(folder):
        known = {file.resolve(): caption for file, caption in captioned_images(folder)}
        captions = [known[file.resolve()] for file in files]
    if len(classes) == 1:  # a single class says nothing
        return FolderImages(files, captions=captions)
    labels = [k for k, name in enumerate(classes) for _ in groups[own[name]]]
    return FolderImages(files, labels, classes, captions)


def _check_layout(folder: Path, groups: dict[str, list[Path]]) -> None:
    """Refuses folders of which it is unclear what the classes are."""
    if "" in groups and len(groups) > 1:
        raise UserError(
            f"{folder} has images both in itself and in sub-folders",
            got=f"{groups[''][0].name} next to the folder {sorted(groups)[1]}",
            expected="all images in one folder, or each in the sub-folder of its class",
            fix="move them",
        )
    parts = sorted(groups)
    # By the first word: val2017, test-images. One of them among others may be a class.
    splits = [name for name in parts if re.split("[^a-z]", name.lower())[0] in _SPLITS]
    if len(splits) > 1:
        raise UserError(
            f"{folder} contains splits of a data set, not classes",
            got=f"the sub-folders {', '.join(splits)}",
            expected="one folder of images, or one with a sub-folder for each class",
            fix=f"pass one of them: {folder / next((n for n in splits if 'train' in n.lower()), splits[0])}",
        )
    for name in parts:
        deep = next((f for f in groups[name] if len(f.parts) > len(folder.parts) + 2), None)
        if deep is not None:
            raise UserError(
                f"{folder} contains nested folders, so the classes are ambiguous",
                got=f"{deep.relative_to(folder).parent}",
                expected="one folder of images, or one with a sub-folder for each class",
                fix=f"pass {folder / name} if its sub-folders are the classes, else move the images up",
            )


def _read_all(files: Sequence[Path]) -> np.ndarray:
    """All images as (N, H, W, 1) when all are grey, else (N, H, W, 3)."""
    first = read_image(files[0])
    check_bytes(files[0].parent, len(files) * first.nbytes)
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for k, file in enumerate(files):
        image = first if k == 0 else read_image(file)
        if image.shape[1:] != first.shape[1:]:
            raise UserError(
                "images differ in size",
                got=f"{file} is {image.shape[2]}x{image.shape[1]} (width x height)",
                expected=f"{first.shape[2]}x{first.shape[1]}, as {files[0]}",
                fix="crop or resize them first",
            )
        if len(image) > pixels.shape[1]:  # the first image in color
            check_bytes(file.parent, 4 * pixels.nbytes)
            pixels = np.repeat(pixels, 3, 1)
        pixels[k] = image
    return np.moveaxis(pixels, 1, -1)
