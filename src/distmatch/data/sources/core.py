"""Sources by parts: what threads read at the same time, and what all samples of a source have in common."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data.columns import Column
from distmatch.data.images import copy_pixels, decode
from distmatch.data.prompts import COLUMNS as CAPTIONS
from distmatch.data.scaling import Scaling

_LABELS = ("label", "labels", "cls")
OTHER_SIZE = "pixels (width x height), and the first image has"
"""In the reason for an image that has another size than the first."""
PART_ITEMS = 32
"""Image files in a part: enough to make the cost of a part small, few enough to fit into memory."""


class ColorFoundError(Exception):
    """An image is in color, and those before were grey.

    Args:
        form: Theirs.
    """

    def __init__(self, form: Form) -> None:
        self.form = form


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        size: Height and width to which image files are cropped and resized; None keeps theirs.
        labels: Whether classes are read.
        image: Which field of a record is the image; '' takes the only one.
        label: Which is the class; '' takes ``label``, ``labels`` or ``cls``.
        caption: Which is the caption; '' takes ``text``, ``prompt`` or ``caption``.
        shape: The shape that all samples are to have, (3, H, W): image files are made so.
    """

    size: tuple[int, int] | None = None
    labels: bool = True
    image: str = ""
    label: str = ""
    caption: str = ""
    shape: tuple[int, ...] | None = None

    def image_of(self, file: Path | str, content: bytes | None = None) -> Image.Image:
        """An image file, cropped and resized as requested."""
        if self.shape is not None:
            return decode(file, (self.shape[1], self.shape[2]), color=True, content=content)
        return decode(file, self.size, content=content)

    @property
    def fields(self) -> str:
        """The options that choose fields of a record."""
        named = {"--image": self.image, "--label": self.label, "--caption": self.caption}
        return " ".join(f"{option} {name}" for option, name in named.items() if name)


@dataclass(frozen=True)
class Sample:
    """One item of a source.

    Attributes:
        image: Of mode "L" or "RGB".
        label: Its class, by number or name.
        caption: Its caption.
    """

    image: Image.Image
    label: int | str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Form:
    """What all samples of a store have, set by the first one.

    Attributes:
        shape: Shape of a sample as it is stored.
        dtype: Its type.
        label: ``""``, ``"number"`` or ``"name"``: how classes are named.
        captioned: Whether there are captions.
    """

    shape: tuple[int, ...]
    dtype: str
    label: str = ""
    captioned: bool = False

    @classmethod
    def of(cls, sample: Sample) -> Form:
        """That of an image."""
        image, captioned = sample.image, sample.caption is not None
        shape = (len(image.mode), image.height, image.width)
        return cls(shape, "uint8", _label_kind(sample.label), captioned)

    def difference(self, sample: Sample) -> str:
        """In words, how an image differs from this form; '' where it does not."""
        width, height = sample.image.size
        if (height, width) != self.shape[1:]:
            usual = f"{self.shape[2]}x{self.shape[1]}"
            return f"{width}x{height} {OTHER_SIZE} {usual}"
        kind, captioned = _label_kind(sample.label), sample.caption is not None
        if kind != self.label:
            forms = {"": "no class", "number": "a class number", "name": "the name of a class"}
            return f"{forms[kind]}, and the first image has {forms[self.label]}"
        if captioned != self.captioned:
            return "a caption, and the first image has none" if captioned else "no caption"
        return ""


def _label_kind(label: int | str | None) -> str:
    return "" if label is None else "number" if isinstance(label, int) else "name"


@dataclass
class Rows:
    """What a part contains.

    Attributes:
        form: That of its samples; None where none could be read.
        x: The samples (n, *shape).
        labels: Their classes, or ().
        captions: Their captions, or ().
        conditions: Further conditions by name, n rows each.
        bad: Items that cannot be read: name and reason.
    """

    form: Form | None
    x: np.ndarray
    labels: Sequence[int | str] = ()
    captions: Sequence[str] = ()
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Consecutive items.

    Attributes:
        weight: Its share of the ``total`` of its source.
        load: Reads them, in any thread, once the form of the samples is known or for the first time.
    """

    weight: int
    load: Callable[[Form | None], Rows]


@dataclass(frozen=True)
class Source:
    """A source of samples.

    Attributes:
        name: What messages call it.
        fingerprint: sha256 (hex) of names, sizes and times of its files, or of its content.
        total: Sum of the weights of its parts, for the progress.
        parts: The parts, in the order of the samples.
        class_names: The names of its classes, where they are known; class numbers count in them.
        scaling: The scaling of the samples, where it is known.
        columns: Of a table.
    """

    name: str
    fingerprint: str
    total: int
    parts: Callable[[], Iterator[Part]]
    class_names: tuple[str, ...] = ()
    scaling: Scaling | None = None
    columns: tuple[Column, ...] = ()


def read_samples(items: Sequence[tuple[str, Callable[[], Sample]]], form: Form | None) -> Rows:
    """Reads images by name; those that cannot be read are listed.

    Args:
        items: Name and loader of each.
        form: The form of the samples; None takes that of the first.

    Raises:
        ColorFoundError: One is in color, and the form is grey.
    """
    bad: list[tuple[str, str]] = []
    labels: list[int | str] = []
    captions: list[str] = []
    x = np.empty(0, np.uint8) if form is None else np.empty((len(items), *form.shape), form.dtype)
    kept = 0
    for name, load in items:
        try:
            sample = load()
        except UserError as error:
            bad.append((name, reason(error, name)))
            continue
        if form is None:
            form = Form.of(sample)
            x = np.empty((len(items), *form.shape), form.dtype)
        if wrong := form.difference(sample):
            bad.append((name, wrong))
            continue
        if len(sample.image.mode) > form.shape[0]:
            raise ColorFoundError(form)
        copy_pixels(sample.image, x[kept])
        if sample.label is not None:
            labels.append(sample.label)
        if sample.caption is not None:
            captions.append(sample.caption)
        kept += 1
    return Rows(form, x[:kept], labels, captions, bad=bad)


def caption_in(record: Mapping[str, Any], reading: Reading, name: str) -> str | None:
    """The caption in a record; None where there is none.

    Raises:
        UserError: It is no text, or there are several.
    """
    found = _only(record, reading.caption, CAPTIONS, "caption", name)
    if found is not None and not isinstance(found, str):
        raise UserError(f"the caption of {name} is no text", got=repr(found)[:80])
    return found


def label_in(record: Mapping[str, Any], reading: Reading, name: str) -> int | str | None:
    """The class in a record, by number or name; None where there is none, which -1 stands for too.

    Raises:
        UserError: It is neither, or there are several.
    """
    if not reading.labels:
        return None
    found = _only(record, reading.label, _LABELS, "label", name)
    if found is None or (found == -1 and type(found) is int):
        return None
    if not isinstance(found, (int, str)) or isinstance(found, bool):
        raise UserError(f"the class of {name} is neither a number nor a name", got=repr(found)[:80])
    return found


def _only(record: Mapping[str, Any], chosen: str, usual: Sequence[str], what: str, name: str) -> Any:
    names = [chosen] if chosen else [n for n in usual if record.get(n) is not None]
    if len(names) > 1:
        raise UserError(
            f"{name} has several fields that may be its {what}: choose with --{what}", got=", ".join(names)
        )
    if chosen and record.get(chosen) is None:
        raise UserError(f"{name} has no {chosen}", got=", ".join(record)[:200])
    return record.get(names[0]) if names else None


def reason(error: UserError, name: str) -> str:
    """What is wrong with an item, in one line, without its name."""
    place, got = rf"\S*{re.escape(name)}", error.parts.get("got", "")
    what = re.sub(place, "it", re.sub(f" {place}$", "", error.parts["what"]))
    return f"{what} ({got})" if got else what


def fingerprint_of(files: Iterable[Path], *, below: Path) -> str:
    """A hash of the names, sizes and times of change of files: another one means that they may differ.

    Raises:
        UserError: One is missing.
    """
    digest, depth = hashlib.sha256(), len(below.parts)
    for file in files:
        try:
            about = os.stat(file)
        except OSError as error:
            raise UserError(f"cannot open {file}", got=error.strerror) from error
        name = os.fsencode("/".join(file.parts[depth:]))
        digest.update(b"%d %d %d " % (len(name), about.st_size, about.st_mtime_ns) + name)
    return digest.hexdigest()
