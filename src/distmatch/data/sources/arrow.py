"""Tables of Arrow: Parquet files, and data sets that ``datasets`` of Hugging Face saved to disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError, cause
from distmatch.base.files import read_json
from distmatch.base.inputs import require_regular_file
from distmatch.data.bounds import check_bytes
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

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that ``save_to_disk`` writes for a data set, and for several splits of one."""


@dataclass(frozen=True)
class _Columns:
    """The columns that are read.

    Attributes:
        image: The images: encoded bytes, or records with ``bytes``.
        others: Of numbers and texts.
        class_names: Of a column of classes.
    """

    image: str
    others: Sequence[str]
    class_names: tuple[str, ...]


class _Batch:
    """Rows that are read when the first of them is needed, by whichever thread that is."""

    def __init__(self, read: Callable[[], Any], lock: threading.Lock) -> None:
        self._read, self._lock = read, lock
        self._table: Any = None

    def rows(self, begin: int, end: int) -> list[dict[str, Any]]:
        with self._lock:
            if self._table is None:
                self._table = self._read()
        found: list[dict[str, Any]] = self._table.slice(begin, end - begin).to_pylist()
        return found


def arrow_source(place: Path, reading: Reading) -> Source:
    """The rows of a Parquet file, of all Parquet files of a folder, or of a data set saved to disk.

    Raises:
        UserError: pyarrow is not installed, a file cannot be read, or it is unclear which columns to use.
    """
    saved = place.is_dir() and (place / STATE).is_file()
    if saved:
        files = _saved_files(place)
    else:
        files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    for file in files:
        require_regular_file(file, "a table of Arrow")
    with _reading(files[0]):
        schema = _stream(files[0]).schema if saved else _parquet(files[0]).schema_arrow
    features = _features(place, schema)
    columns = _columns(place, schema, features, reading)
    batches = _stream_batches if saved else _parquet_batches
    below = place if place.is_dir() else place.parent
    with _reading(place):
        total = sum(n for file in files for n, _ in batches(file, columns))
    return Source(
        name=str(place),
        fingerprint=fingerprint_of(files, below=below),
        total=total,
        parts=lambda: (part for file in files for part in _parts(file, batches, columns, reading)),
        class_names=columns.class_names if reading.labels else (),
    )


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that was saved to disk."""
    state = read_json(folder / STATE)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [str(entry.get("filename")) for entry in entries or () if isinstance(entry, dict)]
    if not names or any(Path(name).name != name for name in names):
        raise UserError(
            f"{folder / STATE} does not name the files of a data set",
            got=str(names)[:200],
            fix="save it again: dataset.save_to_disk(folder)",
        )
    return [folder / name for name in names]


class _reading:  # a context manager
    """Turns what a damaged file makes pyarrow raise into a message about the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise UserError(
                f"reading {self._file} needs the package pyarrow, which is not installed",
                got=str(error),
                fix="pip install distmatch[arrow]",
            ) from error
        theirs = (OSError, ValueError, TypeError, KeyError, NotImplementedError)  # what errors of Arrow are
        if isinstance(error, theirs) and not isinstance(error, UserError):
            raise UserError(
                f"cannot read {self._file} as a table of Arrow", got=cause(error), fix="write it again"
            ) from error


def _parquet(file: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file)


def _stream(file: Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))


_Batches = Callable[[Path, _Columns], Iterator[tuple[int, Callable[[], Any]]]]


def _parquet_batches(file: Path, columns: _Columns) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Rows of each row group, and what reads it."""
    table = _parquet(file)
    names = [columns.image, *columns.others]
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        check_bytes(file, about.total_byte_size)
        yield about.num_rows, partial(table.read_row_group, group, columns=names, use_threads=False)


def _stream_batches(file: Path, columns: _Columns) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The same of the record batches of a mapped file, of which nothing is read here."""
    for batch in _stream(file):
        yield batch.num_rows, partial(batch.select, [columns.image, *columns.others])


def _parts(file: Path, batches: _Batches, columns: _Columns, reading: Reading) -> Iterator[Part]:
    first, lock = 0, threading.Lock()  # a file is read by one thread at a time
    with _reading(file):
        for n, read in batches(file, columns):
            batch = _Batch(read, lock)
            for begin in range(0, n, PART_ITEMS):
                end = min(begin + PART_ITEMS, n)
                load = partial(_load, batch, begin, end, f"{file.name} row {{}}", first, columns, reading)
                yield Part(end - begin, load)
            first += n


def _load(
    batch: _Batch,
    begin: int,
    end: int,
    name: str,
    first: int,
    columns: _Columns,
    reading: Reading,
    form: Form | None,
) -> Rows:
    with _reading(Path(name)):
        rows = batch.rows(begin, end)
    names = [name.format(first + begin + k) for k in range(len(rows))]
    items = [(n, partial(_sample, row, n, columns, reading)) for n, row in zip(names, rows, strict=True)]
    return read_samples(items, form)


def _sample(row: Mapping[str, Any], name: str, columns: _Columns, reading: Reading) -> Sample:
    image = row[columns.image]
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise UserError(
            f"{name} has no image", got="a path alone" if isinstance(image, dict) else repr(image)[:80]
        )
    image = reading.image_of(name, content)
    others = {key: value for key, value in row.items() if key != columns.image}
    return Sample(image, label_in(others, reading, name), caption_in(others, reading, name))


def _features(place: Path, schema: Any) -> dict[str, Any]:
    """What ``datasets`` noted on the columns; nothing where it did not write the table."""
    info: Any = {}
    if (place / "dataset_info.json").is_file():
        info = read_json(place / "dataset_info.json")
    elif b"huggingface" in (schema.metadata or {}):
        try:
            info = json.loads(schema.metadata[b"huggingface"]).get("info", {})
        except (ValueError, AttributeError):
            info = {}
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def _columns(place: Path, schema: Any, features: Mapping[str, Any], reading: Reading) -> _Columns:
    """The columns to read.

    Raises:
        UserError: There are no images, or several columns of them, or a column that was named is missing.
    """
    kinds = {field.name: str(field.type) for field in schema}
    for name in (reading.image, reading.label, reading.caption):
        if name and name not in kinds:
            raise UserError(f"{place} has no column {name}", got=", ".join(kinds)[:200])
    images = [n for n, kind in kinds.items() if kind in ("binary", "large_binary") or "bytes: binary" in kind]
    if reading.image in images:
        images = [reading.image]
    if len(images) != 1:
        raise UserError(
            f"{place} has {'several columns' if images else 'no column'} of images",
            got=", ".join(f"{name}: {kind}" for name, kind in kinds.items())[:400],
            expected="one column of encoded images, as bytes",
            fix="name it: --image NAME" if images else "write the images as PNG or JPEG into a column",
        )
    plain = ("string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
    others = [name for name, kind in kinds.items() if kind in plain]
    classes = [
        (name, tuple(map(str, feature["names"])))
        for name, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list) and name in others
    ]
    chosen = reading.label or next((n for n, _ in classes if n in ("label", "labels", "cls")), "")
    return _Columns(images[0], others, dict(classes).get(chosen, ()))
