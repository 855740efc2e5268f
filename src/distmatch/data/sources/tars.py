"""WebDataset: tar files in which consecutive members with the same name form a sample.

The tars are not unpacked: their headers are read for where members begin, and threads read them there.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError, cause
from distmatch.base.inputs import LARGEST_TEXT, parse_json, require_regular_file
from distmatch.data.images import IMAGE_SUFFIXES
from distmatch.data.sources.core import (
    PART_ITEMS,
    Form,
    Part,
    Reading,
    Rows,
    Sample,
    Source,
    caption_in,
    fingerprint_of,
    label_in,
    read_samples,
)

_LARGEST_IMAGE = 2**30
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class _Member:
    """A file in a tar: where it begins and how long it is."""

    begin: int
    size: int


_Members = dict[str, _Member]  # by what follows the first dot of their names


def tar_source(place: Path, reading: Reading) -> Source:
    """The samples of a tar file, or of all tar files of a folder in the order of their names.

    A sample is an image, and where there are any a caption (``.txt``, or ``text``, ``prompt`` or ``caption``
    in ``.json``) and a class (``.cls``, or ``label`` or ``cls`` in ``.json``; a number or a name).

    Raises:
        UserError: A file is compressed.
    """
    files = sorted(place.glob("*.tar")) if place.is_dir() else [place]
    for file in files:
        require_regular_file(file, "a tar file")
        with open(file, "rb") as handle:
            if handle.read(6).startswith(_PACKED):
                raise UserError(
                    f"{file} is compressed, so that its samples cannot be found without reading all of it",
                    fix=f"decompress it: gunzip, unxz or unzstd < {file.name} > plain.tar",
                )
    below = place if place.is_dir() else place.parent
    return Source(
        name=str(place),
        fingerprint=fingerprint_of(files, below=below),
        total=sum(file.stat().st_size for file in files),
        parts=lambda: (part for file in files for part in _parts(file, reading)),
    )


def _parts(file: Path, reading: Reading) -> Iterator[Part]:
    """The parts of a tar; one that is damaged further on ends there, with a last part that says so."""
    done, total = 0, file.stat().st_size
    waiting: list[tuple[str, _Members]] = []

    def part(end: int, bad: Sequence[tuple[str, str]] = ()) -> Part:
        nonlocal done, waiting
        weight, items = end - done, waiting
        done, waiting = end, []
        return Part(weight, partial(_load, file, items, bad, reading))

    bad = []
    try:
        for key, members, end in _samples(file):
            waiting.append((key, members))
            if len(waiting) == PART_ITEMS:
                yield part(end)
    except (tarfile.TarError, OSError, ValueError) as error:
        bad.append((file.name, f"it is damaged after {done:,} bytes or more ({cause(error)})"))
    yield part(total, bad)


def _samples(file: Path) -> Iterator[tuple[str, _Members, int]]:
    """Name, members and end of each sample of a tar."""
    key, found, end = "", _Members(), 0
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
            folder, _, name = member.name.rpartition("/")
            if not member.isreg() or member.sparse or name.startswith("."):
                continue
            stem, _, extension = name.partition(".")
            own = f"{folder}/{stem}" if folder else stem
            if own != key and found:
                yield key, found, end
                found = {}
            key, end = own, member.offset_data + member.size
            found[extension.lower()] = _Member(member.offset_data, member.size)
    if found:
        yield key, found, end


def _load(
    file: Path,
    items: Sequence[tuple[str, _Members]],
    bad: Sequence[tuple[str, str]],
    reading: Reading,
    form: Form | None,
) -> Rows:
    with open(file, "rb", buffering=0) as handle:
        descriptor = handle.fileno()
        rows = read_samples(
            [
                (f"{file.name}/{key}", partial(_sample, descriptor, f"{file.name}/{key}", members, reading))
                for key, members in items
            ],
            form,
        )
    rows.bad += bad
    return rows


def _sample(descriptor: int, name: str, members: _Members, reading: Reading) -> Sample:
    """A sample from its members.

    Raises:
        UserError: It has no image or several, or a member cannot be read.
    """
    images = [extension for extension in members if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if reading.image:
        images = [extension for extension in images if extension == reading.image.lower()]
    if len(images) != 1:
        what = "several images: choose with --image" if images else "no image"
        raise UserError(f"{name} has {what}", got=", ".join(images or members)[:200])
    image = reading.image_of(name, _content(descriptor, name, members[images[0]]))
    about = _about(descriptor, name, members)
    return Sample(image, label_in(about, reading, name), caption_in(about, reading, name))


def _about(descriptor: int, name: str, members: Mapping[str, _Member]) -> dict[str, Any]:
    """What the members besides the image say: their text by extension, and the fields of the JSON."""
    found: dict[str, Any] = {}
    for extension, member in members.items():
        if extension not in ("json", "txt", "text", "caption", "cls"):
            continue
        content = _content(descriptor, name, member, LARGEST_TEXT)
        if extension == "json":
            values = parse_json(content, f"{name}.json")
            found = {**values, **found} if isinstance(values, dict) else found
            continue
        try:
            text = content.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}.{extension} is not text in UTF-8", got=cause(error)) from error
        if extension == "cls":
            found["cls"] = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text
        else:
            found["text" if extension == "txt" else extension] = text
    return found


def _content(descriptor: int, name: str, member: _Member, most: int = _LARGEST_IMAGE) -> bytes:
    if member.size > most:
        raise UserError(f"{name} is too large", got=f"{member.size:,} bytes", expected=f"at most {most:,}")
    content = os.pread(descriptor, member.size, member.begin)
    if len(content) < member.size:
        raise UserError(f"{name} is cut off", got=f"{len(content):,} of {member.size:,} bytes")
    return content
