"""Stores as data sets whose arrays are mapped: only the rows that are used are read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.lock import refuse_in_use
from distmatch.base.progress import progress
from distmatch.data.columns import columns_of
from distmatch.data.dataset import Dataset
from distmatch.data.recorded import Moments, Recorded
from distmatch.data.scaling import Scaling
from distmatch.data.store.layout import (
    ENDS,
    HASH,
    HEADER,
    INDEX,
    TEXT,
    UNFINISHED,
    Field,
    check_file,
    damaged,
    new_hash,
    read_index,
)
from distmatch.diffusion.conditioning import Conditioning

CONDITION = "condition_"
_CHUNK = 2**24


class Texts(Sequence[str]):
    """Captions in a mapped file.

    Args:
        content: Their UTF-8, one after another, uint8.
        ends: Where each ends, (N,) int64.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        begin = int(self._ends[i - 1]) if i else 0
        return self._content[begin : int(self._ends[i])].tobytes().decode(errors="replace")


class RowFile:
    """Rows of an array by reading its file, not its mapping.

    The system then reads a row at once and not page by page, which is ten times as fast where it comes from a
    disk; pages in use do not grow; and a file that is cut short is an error, not the end of the process.

    Args:
        file: The file.
        like: The array.
    """

    def __init__(self, file: Path, like: Tensor) -> None:
        self._file, self._like = file.open("rb", buffering=0), like
        self._row = like[0].nbytes

    def __call__(self, where: Tensor) -> Tensor:
        """The rows of these numbers (B,), in memory of their own.

        Raises:
            UserError: The file ends before.
        """
        found = self._like.new_empty(len(where), *self._like.shape[1:])
        places = memoryview(found.numpy()).cast("B")  # type: ignore[arg-type]
        for k, i in enumerate(where.tolist()):
            place = places[k * self._row : (k + 1) * self._row]
            i = range(len(self._like))[i]
            if os.preadv(self._file.fileno(), [place], HEADER + i * self._row) != self._row:
                file = Path(self._file.name)
                raise damaged(file.parent, f"{file.name} ends before row {i}", "all rows of the index")
        return found


def load_store(folder: Path) -> Dataset:
    """Opens a store as a data set.

    Its arrays are mapped, so that memory does not grow with their size: the system keeps what was used
    lately, and drops it where memory is needed. Statistics come from the index. Headers and sizes of all
    files are checked here, their content by :func:`verify_store`.

    Args:
        folder: The store.

    Raises:
        UserError: It is unfinished, damaged, or of another version.
    """
    values = _finished(folder)
    try:
        samples, fields = values["samples"], [Field.from_dict(field) for field in values["fields"]]
        moments, scaling = Moments.from_dict(values["moments"]), Scaling.from_dict(values["scaling"])
        decoder = str(values["request"].get("latents", ""))
        digest, names = str(values["digest"]), tuple(map(str, values["class_names"]))
        if type(samples) is not int or samples < 2 or not any(field.name == "x" for field in fields):
            raise ValueError(f"{samples} samples of {len(fields)} fields")
        _check_blocks(values["blocks"], fields, samples)
        rows = {field.name: samples for field in fields} | {TEXT: values["blocks"][-1].get("text", 0)}
        if len(moments.low) != (1 if scaling.kind == "image" else len(scaling.center)):
            raise ValueError("moments of other columns than the scaling")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(
            folder, f"{INDEX}: {type(error).__name__} {error}"[:200], "the index of a store"
        ) from error
    arrays = {field.name: _mapped(folder, field, rows[field.name]) for field in fields}
    labels = arrays.get("labels")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < max(len(names), 1):
        raise damaged(folder, f"classes {int(labels.min())} to {int(labels.max())}", f"{len(names)} classes")
    captions = Texts(arrays[TEXT].numpy(), arrays[ENDS].numpy()) if TEXT in arrays else ()
    conditions = {n.removeprefix(CONDITION): v for n, v in arrays.items() if n.startswith(CONDITION)}
    return Dataset(
        arrays["x"],
        labels,
        names,
        str(folder),
        scaling,
        columns_of(values),
        Conditioning(conditions),
        captions,
        recorded=Recorded(digest, moments, RowFile(folder / "x.npy", arrays["x"]), decoder),
    )


def _check_blocks(blocks: list[dict[str, Any]], fields: Sequence[Field], samples: int) -> None:
    """Raises what :func:`load_store` turns into an error, where blocks do not cover all rows."""
    for name, last in (("samples", samples), ("text", None)):
        ends = [block[name] for block in blocks if name == "samples" or name in block]
        rising = all(type(end) is int and end > 0 for end in ends) and sorted(ends) == ends
        if not rising or (last is not None and ends[-1] != last):
            raise ValueError(f"blocks that end at other {name}")
    if not all(type(block[HASH][field.name]) is str for block in blocks for field in fields):
        raise ValueError("blocks without hashes")


def _finished(folder: Path) -> dict[str, Any]:
    """The index of a store that is whole."""
    values = read_index(folder)
    if not (folder / INDEX).exists():
        refuse_in_use(folder)
        source = values.get("request", {}).get("source", "its source")
        number = f"{values['samples']:,}" if "samples" in values else "a part of the"
        got, fix = f"{number} samples of {source}", values.get("continue")
        if bad := values.get("skipped"):
            got += f", and {len(bad):,} of its items cannot be read"
            fix = f"run the same distmatch prepare again with --skip-bad; {folder / UNFINISHED} lists them"
        raise UserError(
            f"the store {folder} is not complete",
            got=got,
            fix=fix or "run the same distmatch prepare again: it continues where it stopped",
        )
    return values


def _mapped(folder: Path, field: Field, rows: int) -> Tensor:
    """A field as a tensor over its file, which nobody may write to."""
    file = check_file(folder, field, rows)
    values = np.memmap(file, field.dtype, "r", HEADER, (rows, *field.shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def verify_store(folder: Path) -> dict[str, Any]:
    """Compares every block of every file with its hash.

    Args:
        folder: The store.

    Returns:
        Its index.

    Raises:
        UserError: It is unfinished or damaged; the message names the file and the block.
    """
    load_store(folder)
    values = _finished(folder)
    fields = [Field.from_dict(field) for field in values["fields"]]
    total = sum((folder / field.file).stat().st_size for field in fields)
    with progress(total, desc="verify", delay=2.0) as bar:
        for field in fields:
            with open(folder / field.file, "rb") as handle:
                handle.seek(HEADER)
                begin = 0
                for number, block in enumerate(values["blocks"]):
                    end = block["text" if field.name == TEXT else "samples"]
                    digest = new_hash()
                    for part in _chunks((end - begin) * field.row):
                        digest.update(handle.read(part))
                        bar.update(part)
                    if digest.hexdigest() != block[HASH][field.name]:
                        what = f"{field.file}, block {number} of {len(values['blocks'])}"
                        raise damaged(folder, f"{what}: another hash", "the bytes that were written")
                    begin = end
    return values


def _chunks(size: int) -> Iterator[int]:
    yield from (min(_CHUNK, size - begin) for begin in range(0, size, _CHUNK))
