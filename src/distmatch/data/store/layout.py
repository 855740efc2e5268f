r"""The files of a store, and its index.

A store is a folder with an array of NumPy's format for each field, a row for each sample: ``x.npy``, and
where there are any ``labels.npy`` and ``condition_NAME.npy``. Captions are in ``captions.npy``, their UTF-8
one after another, and ``caption_ends.npy``, where each ends. The rows are divided into blocks, whose hashes
are in the index, ``store.json``. It is written last: a folder without it is no store yet, and
``unfinished.json`` says how far it is.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distmatch.base.errors import UserError
from distmatch.base.files import read_json
from distmatch.base.inputs import read_array_header

INDEX = "store.json"
UNFINISHED = "unfinished.json"
RECORDS = "blocks"
"""Folder of the records of blocks, of a store that several processes write."""
MARK = "distmatch store"
"""What the lock file of a store begins with."""
VERSION = 2
HASH = "xxh3_128"
"""The hash of blocks: it finds damage at the speed of memory, and is no proof against forgery."""
new_hash = xxhash.xxh3_128
HEADER = 128
"""Bytes in front of the values of an array."""
TEXT, ENDS = "captions", "caption_ends"
_DTYPES = ("uint8", "float32", "float64", "int64")


@dataclass(frozen=True)
class Field:
    """An array of a store.

    Attributes:
        name: Its name; the file is ``NAME.npy``.
        dtype: Type of its values.
        shape: Shape of a row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.name}.npy"

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def header(self, rows: int) -> bytes:
        """What is in front of the values in the file."""
        shape = (rows, *self.shape)
        text = f"{{'descr': '{np.dtype(self.dtype).str}', 'fortran_order': False, 'shape': {shape}}}"
        version, length = b"\x01\x00", (HEADER - 10).to_bytes(2, "little")
        return b"\x93NUMPY" + version + length + text.ljust(HEADER - 11).encode() + b"\n"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Field:
        """Reads the JSON form.

        Raises:
            KeyError: A part is missing.
            ValueError: A part is not what it should be.
        """
        name, dtype, shape = values["name"], values["dtype"], values["shape"]
        plain = isinstance(name, str) and name.replace("_", "a").replace("-", "a").isalnum()
        if not plain or dtype not in _DTYPES or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"this is no array of a store: {str(values)[:200]}")
        return cls(name, dtype, tuple(shape))


def check_file(folder: Path, field: Field, rows: int) -> Path:
    """The file of a field, once it is known to have as many rows as the index says.

    Raises:
        UserError: It is missing, or is another array.
    """
    file = folder / field.file
    expected = f"{rows:,} rows of {field.dtype} {field.shape}"
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            header = read_array_header(handle)
            found = f"{header.dtype} {header.shape}, {size:,} bytes"
            right = handle.tell() == HEADER and size == HEADER + rows * field.row
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{field.file}: {error}", expected) from error
    if not right or header.shape != (rows, *field.shape) or header.dtype != np.dtype(field.dtype):
        raise damaged(folder, f"{field.file}: {found}", expected)
    return file


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a store, or what there is of an unfinished one.

    Raises:
        UserError: It is not an index of this version.
    """
    name = INDEX if (folder / INDEX).exists() else UNFINISHED
    values = read_json(folder / name)
    if not isinstance(values, dict) or values.get("format") != MARK:
        raise UserError(f"{folder / name} is not the index of a store", fix=f"make it anew: {_maker(folder)}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{folder} was written by another version of distmatch",
            got=f"version {values.get('version')} of the format",
            expected=VERSION,
            fix=f"make it anew: {_maker(folder)}",
        )
    return values


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, finished or not."""
    return (folder / INDEX).is_file() or (folder / UNFINISHED).is_file()


def damaged(folder: Path, got: str, expected: str) -> UserError:
    """The error for a store that is not as it was written."""
    return UserError(
        f"the store {folder} is damaged",
        got=got,
        expected=expected,
        fix=f"copy it again, or make it anew: {_maker(folder)}",
    )


def _maker(folder: Path) -> str:
    """The command that writes a store in place of this one, with the options that it was written with."""
    made: Any = None
    with suppress(UserError, TypeError, KeyError):
        made = read_json(folder / (INDEX if (folder / INDEX).exists() else UNFINISHED))["request"]
    drawn = isinstance(made, dict) and "model" in made
    return f"distmatch {'sample MODEL' if drawn else 'prepare SOURCE'} --out {folder} --overwrite"
