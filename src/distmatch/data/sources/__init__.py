"""What ``distmatch prepare`` reads: arrays, folders of images, tars, Parquet, ``datasets`` on disk."""

from __future__ import annotations

import os
from pathlib import Path

from distmatch.base.errors import UserError
from distmatch.base.inputs import checked_path
from distmatch.data import DATA_NAMES, load_data
from distmatch.data.sources.arrays import array_source, dataset_source
from distmatch.data.sources.arrow import SPLITS, STATE, arrow_source
from distmatch.data.sources.core import Reading, Source
from distmatch.data.sources.folders import folder_source
from distmatch.data.sources.tars import tar_source
from distmatch.data.store.layout import is_store

__all__ = ["Reading", "Source", "open_source"]


def open_source(spec: str | os.PathLike[str], reading: Reading) -> Source:
    """The source that a name or path means; nothing but lists and headers is read.

    Args:
        spec: All that :func:`distmatch.data.load_data` takes.
        reading: How it is to be read.

    Raises:
        UserError: There is no such source, or it cannot be read in this way.
    """
    path = checked_path(Path(spec).expanduser())
    named = isinstance(spec, str) and spec in DATA_NAMES
    if not named and path.exists() and not is_store(path):
        if (path / SPLITS).is_file():
            raise UserError(
                f"{path} holds several splits of a data set",
                expected="one of them",
                fix=f"name its folder, for example {path / 'train'}",
            )
        if (path / STATE).is_file() or path.suffix == ".parquet" or _holds(path, "*.parquet"):
            return arrow_source(path, reading)
        if path.suffix == ".tar" or _holds(path, "*.tar"):
            return tar_source(path, reading)
        if path.is_dir() and not reading.fields:
            return folder_source(path, reading)
    if reading.fields:
        raise UserError(
            "--image, --label and --caption choose fields of tar files and tables of images",
            got=f"{reading.fields}, and {os.fspath(spec)}",
            fix="omit them",
        )
    if reading.size is not None:
        raise UserError(
            "--size crops and resizes image files, and these are arrays",
            got=os.fspath(spec),
            fix="omit it, or resize the arrays first",
        )
    streamed = None if named else array_source(path)
    return streamed or dataset_source(load_data(spec, labels=reading.labels))


def _holds(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and next(folder.glob(pattern), None) is not None
