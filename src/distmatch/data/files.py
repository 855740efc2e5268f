"""Data from files: NumPy arrays, and folders of images. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.inputs import read_array_header, require_regular_file
from distmatch.data.arrays import from_arrays
from distmatch.data.bounds import check_bytes
from distmatch.data.columns import Column
from distmatch.data.dataset import Dataset
from distmatch.data.folders import load_folder
from distmatch.data.images import IMAGE_SUFFIXES
from distmatch.data.kinds import KINDS, Kind
from distmatch.data.store.layout import is_store
from distmatch.data.store.reading import load_store
from distmatch.data.tables import ONE_HOT, load_table
from distmatch.diffusion.conditioning import LABEL, Conditioning

_SAMPLE_KEYS = ("x", "images", "x_train")
_LABEL_KEYS = ("labels", "y")
CONDITION = "condition_"
"""In front of the names of conditions among the arrays of a file."""
_KIND = "kind"
_TABLES = (".csv", ".tsv")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")
# What NumPy and the zip module are known to raise on damaged files.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    RuntimeError,  # encrypted; and, by its sub-class NotImplementedError, an unknown compression
    OverflowError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    tokenize.TokenError,
)


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes NumPy raise into a message about the file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{path} does not fit into memory",
            got=str(error) or "more than the available memory",
            fix="use a part of it",
        ) from error
    except _DAMAGE as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path} contains Python objects and was not opened",
                expected="arrays of numbers: unpickling objects can run any code",
                fix="save plain arrays of one shape, for example np.savez(path, x=np.stack(samples))",
            ) from error
        raise UserError(
            f"cannot read {path} as {what}",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="a complete file",
            fix="it may be truncated or damaged: copy or write it again",
        ) from error


class Archive(Mapping[str, np.ndarray]):
    """The arrays of an ``.npz`` file, each read only when it is accessed.

    Raises:
        UserError: The file cannot be opened, is damaged, or the requested array contains objects.
    """

    def __init__(self, path: Path) -> None:
        require_regular_file(path, "an .npz archive")
        self.path = path
        with self._open() as archive:
            self.names = tuple(archive.files)

    @contextlib.contextmanager
    def _open(self) -> Iterator[np.lib.npyio.NpzFile]:
        with _reading(self.path, "an .npz archive"):
            if not zipfile.is_zipfile(self.path):
                raise zipfile.BadZipFile("this is not a zip archive")
            with np.load(self.path, allow_pickle=False) as archive:
                yield archive

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.names:
            raise KeyError(key)
        with self._open() as archive:
            self._check(archive.zip, key)
            value = archive[key]
            if not isinstance(value, np.ndarray):
                raise ValueError(f"{key} is not an array")
            return value

    def _check(self, archive: zipfile.ZipFile | None, key: str) -> None:
        """Refuses an array by its header, before memory is taken for it."""
        if archive is None:
            raise RuntimeError("the archive is closed")
        name = key if key in archive.namelist() else f"{key}.npy"
        packed = archive.getinfo(name).compress_size
        with archive.open(name) as member:
            check_bytes(self.path, read_array_header(member).nbytes, packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def data_path(spec: str | os.PathLike[str]) -> tuple[Path, bool]:
    """The file or folder that is named, and whether its words are to be encoded (``table.csv:one-hot``).

    Raises:
        UserError: Another option than that, or that one for something else than a table.
    """
    text = os.fspath(spec)
    option = re.fullmatch(r"(.+\.[ct]sv):([^/]*)", text, re.IGNORECASE | re.DOTALL)
    if option and option[2] != ONE_HOT:
        raise unknown_name("option of a table", option[2], [ONE_HOT])
    if not option and text.endswith(f":{ONE_HOT}"):
        raise UserError(
            f":{ONE_HOT} is for tables",
            got=text,
            expected="a .csv or .tsv file before it",
            fix=f"leave it out: {text.removesuffix(f':{ONE_HOT}')}",
        )
    return Path(os.path.expanduser(option[1] if option else spec)), option is not None


def load_file(
    path: str | os.PathLike[str], *, labels: bool = True, columns: Sequence[Column] = ()
) -> Dataset:
    """Reads data from a file or a folder.

    ``.npz``: the samples are under ``x``, ``images`` or ``x_train``, or are the only array; labels may be
    under ``labels`` or ``y`` (``y_train`` for ``x_train``), names of the classes under ``class_names``,
    further conditions of the samples under ``condition_NAME``; a word under ``kind`` says what the samples
    are where their axes do not: ``"sequence"`` or ``"video"``.
    ``.npy``: the samples. A folder: a store (:func:`distmatch.data.store.prepare.prepare`), or images, see
    :func:`distmatch.data.folders.find_images`. ``.csv`` or ``.tsv``: see
    :func:`distmatch.data.tables.load_table`; ``table.csv:one-hot`` encodes columns of text.

    Args:
        path: The file or folder.
        labels: Whether to read labels where there are any.
        columns: Of other data: a table must have the same.

    Raises:
        UserError: The file is missing or is not as described.
    """
    file, one_hot = data_path(path)
    try:
        is_folder, exists = file.is_dir(), file.exists()
    except (OSError, ValueError) as error:
        raise UserError("this is not a path", got=f"{str(path)[:80]!r} ({error})") from error
    if not exists:
        raise UserError(
            f"{file} does not exist",
            got=f"no such file or folder, relative to {Path.cwd()}",
            expected="an .npz, .npy or .csv file or a folder of images",
            fix="check the path",
        )
    if is_folder:
        data = load_store(file) if is_store(file) else load_folder(file)
        return data if labels else data.without_labels()
    require_regular_file(file, "a file of data")
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _from_npz(file, labels)
    if suffix in _TABLES:
        return load_table(file, one_hot=one_hot, labels=labels, like=columns)
    if suffix == ".npy":
        return from_arrays(_read_npy(file), name=str(file))
    if suffix in _PICKLES:
        raise UserError(
            f"{file} is a pickle by its name and was not opened",
            expected=".npz, .npy or a folder of images: unpickling can run any code",
            fix="save its arrays with np.savez(path, x=..., labels=...), where you trust it",
        )
    if suffix in IMAGE_SUFFIXES:
        raise UserError(
            f"{file} is a single image",
            expected="a folder of images, or an .npz",
            fix="pass the folder with the images; a grid of samples cannot be split: draw them again "
            "with --out samples.npz, or into a folder",
        )
    raise UserError(
        f"data of type {suffix or 'unknown'} cannot be read",
        got=str(file),
        expected="an .npz, .npy or .csv file or a folder of images (" + ", ".join(IMAGE_SUFFIXES) + ")",
        fix="save the samples with np.savez(path, x=..., labels=...)",
    )


def _read_npy(file: Path) -> np.ndarray:
    with _reading(file, "an .npy array"):
        with open(file, "rb") as handle:
            size = read_array_header(handle).nbytes
            check_bytes(file, size)
            if size > file.stat().st_size - handle.tell():
                raise EOFError("it is truncated")
        value: np.ndarray = np.load(file, allow_pickle=False)
        return value


def _from_npz(file: Path, labeled: bool) -> Dataset:
    archive = Archive(file)
    known = (*_LABEL_KEYS, "y_train", "y_test", "class_names", _KIND)
    rest = [k for k in archive if k not in known and not k.startswith(CONDITION)]
    key = next((k for k in _SAMPLE_KEYS if k in archive), rest[0] if len(rest) == 1 else None)
    if key is None:
        raise UserError(
            f"{file}: it is unclear which array holds the samples",
            got=f"arrays {', '.join(archive)}" if len(archive) else "no arrays",
            expected=f"one of them called {', '.join(_SAMPLE_KEYS)}, or only one besides the labels",
            fix="np.savez(path, x=..., labels=...)",
        )
    label_keys = ("y_train", *_LABEL_KEYS) if key == "x_train" else _LABEL_KEYS
    label_key = next((k for k in label_keys if k in archive), None) if labeled else None
    names: tuple[str, ...] = ()
    if "class_names" in archive and label_key is not None:
        names = tuple(str(v) for v in np.atleast_1d(archive["class_names"]))
    labels = None if label_key is None else archive[label_key]
    kind = _stated_kind(archive)
    data = from_arrays(archive[key], labels, kind=kind, class_names=names, name=str(file))
    conditions = _conditions(archive, len(data)) if labeled else None
    return dataclasses.replace(data, conditions=Conditioning(conditions)) if conditions else data


def load_conditioning(path: str | os.PathLike[str]) -> Conditioning:
    """What samples are to be conditioned on, from an ``.npz`` with one row for each of them.

    The arrays are named as in a file of data: class labels ``labels`` or ``y``, further fields
    ``condition_NAME``. Other arrays are not read, so that a file of data can be given.

    Args:
        path: The file.

    Raises:
        UserError: It is no such file, has none of these arrays, or they have different numbers of rows.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(
            f"{file} does not exist", got=f"no such file, relative to {Path.cwd()}", fix="check the path"
        )
    archive = Archive(file)
    label_key = next((k for k in _LABEL_KEYS if k in archive), None)
    keys = [*([label_key] if label_key else []), *(k for k in archive if k.startswith(CONDITION))]
    rows = [archive[k] for k in keys]
    if not rows or rows[0].ndim == 0 or len(rows[0]) == 0:
        raise UserError(
            f"{file} contains no conditions",
            got=f"arrays {', '.join(archive)}" if len(archive) else "no arrays",
            expected="labels, or condition_NAME for each field, with one row for each sample",
            fix="np.savez(path, condition_NAME=...)",
        )
    found = _conditions(archive, len(rows[0]))
    if label_key is not None:
        labels = rows[0]
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UserError(
                f"{file}: {label_key} must be the numbers of classes",
                got=f"{labels.shape}, {labels.dtype}",
                expected="integers of shape (n,), -1 for no class",
            )
        found = {LABEL: torch.from_numpy(labels.astype(np.int64)), **found}
    return Conditioning(found)


def _conditions(archive: Archive, n: int) -> dict[str, Tensor]:
    """The further conditions of ``n`` samples in a file, by name."""
    return {
        k.removeprefix(CONDITION): _condition(archive[k], f"{archive.path}: {k}", n)
        for k in archive
        if k.startswith(CONDITION)
    }


def _stated_kind(archive: Archive) -> Kind | None:
    """What a file says its samples are; an array called ``kind`` that is no single word says nothing."""
    value = archive.get(_KIND)
    if value is None or value.ndim != 0 or value.dtype.kind != "U":
        return None
    word = str(value)
    for kind in KINDS:
        if word == kind:
            return kind
    raise unknown_name(f"{archive.path}: kind of samples", word, KINDS)


def _condition(values: np.ndarray, name: str, n: int) -> Tensor:
    """Values that samples are conditioned on, float32 or int64.

    Raises:
        UserError: They are no numbers, not all finite, or not one row for each of ``n`` samples.
    """
    if values.dtype.kind not in "fiub":
        raise UserError(f"{name} must contain numbers", got=str(values.dtype))
    if values.ndim == 0 or len(values) != n:
        raise UserError(f"{name} must have one row for each sample", got=values.shape, expected=f"({n}, ...)")
    whole = values.dtype.kind != "f"
    found = torch.from_numpy(values.astype(np.int64 if whole else np.float32))
    if not bool(found.isfinite().all()):
        raise UserError(f"{name} contains NaN or infinity", fix="remove these samples")
    return found
