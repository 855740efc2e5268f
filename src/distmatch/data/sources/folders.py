"""A folder of images as a source."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from distmatch.data.folders import FolderImages, find_images
from distmatch.data.prompts import METADATA
from distmatch.data.sources.core import (
    PART_ITEMS,
    Part,
    Reading,
    Sample,
    Source,
    fingerprint_of,
    read_samples,
)


def folder_source(folder: Path, reading: Reading) -> Source:
    """The images of a folder, see :func:`distmatch.data.folders.find_images`.

    Raises:
        UserError: There are none, or their classes or captions are unclear.
    """
    found = find_images(folder)
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    return Source(
        name=str(folder),
        fingerprint=fingerprint_of([*found.files, *metadata], below=folder),
        total=len(found.files),
        parts=lambda: _parts(folder, found, reading),
        class_names=tuple(found.class_names) if reading.labels else (),
    )


def _parts(folder: Path, found: FolderImages, reading: Reading) -> Iterator[Part]:
    labeled, depth = bool(found.labels) and reading.labels, len(folder.parts)

    def sample(i: int) -> Sample:
        return Sample(
            reading.image_of(found.files[i]),
            found.labels[i] if labeled else None,
            found.captions[i] if found.captions else None,
        )

    for begin in range(0, len(found.files), PART_ITEMS):
        rows = range(begin, min(begin + PART_ITEMS, len(found.files)))
        items = [("/".join(found.files[i].parts[depth:]), partial(sample, i)) for i in rows]
        yield Part(len(rows), partial(read_samples, items))
