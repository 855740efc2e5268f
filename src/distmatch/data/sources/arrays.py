"""Arrays as sources: a mapped ``.npy`` of images or video, and whatever is in memory already."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.inputs import read_array_header, require_regular_file
from distmatch.data.arrays import check_shape, pixel_tensor
from distmatch.data.dataset import Dataset
from distmatch.data.kinds import Kind
from distmatch.data.sources.core import Form, Part, Rows, Source, fingerprint_of

_PART_BYTES = 2**23


def array_source(file: Path) -> Source | None:
    """An ``.npy`` of images or video, read bit by bit from the disk, of any size; None for all else.

    Raises:
        UserError: It is truncated, no array, or no images.
    """
    if file.suffix.lower() != ".npy" or not file.exists():
        return None
    require_regular_file(file, "an .npy array")
    try:
        with open(file, "rb") as handle:
            header = read_array_header(handle)
            if header.nbytes > file.stat().st_size - handle.tell():
                raise ValueError("it is truncated")
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file} as an .npy array", got=f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if values.dtype.kind not in "biuf":
        return None
    kind = check_shape(values, None, str(file))
    if kind not in ("image", "video"):
        return None
    return Source(
        name=str(file),
        fingerprint=fingerprint_of([file], below=file.parent),
        total=len(values),
        parts=lambda: _parts(len(values), values.nbytes, partial(_pixels, values, kind, str(file))),
    )


def _pixels(values: np.ndarray, kind: Kind, name: str, rows: slice, form: Form | None) -> Rows:
    """Rows of an array of images or video."""
    x = pixel_tensor(values[rows], kind, f"{name}, rows {rows.start} to {rows.stop}").numpy()
    return Rows(Form(x.shape[1:], str(x.dtype)), x)


def dataset_source(data: Dataset) -> Source:
    """A data set as it is, with its labels, captions and conditions."""
    return Source(
        name=data.name,
        fingerprint=data.content_hash,
        total=len(data),
        parts=lambda: _parts(len(data), data.raw.nbytes, partial(_rows, data)),
        class_names=data.class_names,
        scaling=data.scaling,
        columns=data.columns,
    )


def _rows(data: Dataset, rows: slice, form: Form | None) -> Rows:
    x = data.raw[rows].clone().numpy()  # of a store it is mapped, and must not be written to
    return Rows(
        Form(x.shape[1:], str(x.dtype), "" if data.labels is None else "number", bool(data.captions)),
        x,
        () if data.labels is None else data.labels[rows].tolist(),
        [data.captions[i] for i in range(rows.start, rows.stop)] if data.captions else (),
        # What was made of the captions is made of them again in training.
        {n: v[rows].numpy() for n, v in data.conditions.items()} if data.prompt_encoder is None else {},
    )


def _parts(n: int, size: int, load: partial[Rows]) -> Iterator[Part]:
    step = max(1, n * _PART_BYTES // size)
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        yield Part(rows.stop - begin, partial(load, rows))
