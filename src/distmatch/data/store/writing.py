"""Writing a store, block by block: what was written is kept where the process is killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from distmatch.base.errors import UserError, cause
from distmatch.base.files import atomic_json, guard
from distmatch.base.lock import LOCK, take_lock
from distmatch.data.classes import in_order
from distmatch.data.recorded import Moments
from distmatch.data.scaling import Scaling
from distmatch.data.sources.core import Form, Rows, Source
from distmatch.data.store import blocks
from distmatch.data.store.blocks import Blocks
from distmatch.data.store.layout import (
    ENDS,
    HASH,
    HEADER,
    INDEX,
    MARK,
    TEXT,
    UNFINISHED,
    VERSION,
    Field,
    new_hash,
    read_index,
)
from distmatch.data.store.reading import CONDITION
from distmatch.data.store.rows import remove_records

_NAMED = "named_labels"
"""The field of classes in the order in which their names were met; a finished store numbers them in order."""
_MOST_CLASSES = 1000  # more classes than this need as many samples, or they are not class numbers


class StoreWriter:
    """Appends parts of a source to a store, or to what an earlier process left of it.

    Args:
        folder: The folder; it exists.
        request: Names the source and how it is read: what is continued must have the same.
        columns: Whether statistics are taken of each column.
        slow: Whether samples take long to make, so that blocks are to be small.
    """

    def __init__(
        self, folder: Path, request: Mapping[str, Any], *, columns: bool, slow: bool = False
    ) -> None:
        self.folder, self.request, self._columns, self._slow = folder, dict(request), columns, slow
        self._lock: int = guard(lambda: take_lock(folder, MARK), folder)
        try:
            self._take_up(read_index(folder) if (folder / UNFINISHED).exists() else {})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            os.close(self._lock)
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"cannot continue from {folder / UNFINISHED}",
                got=cause(error),
                fix="prepare the data again with --overwrite",
            ) from error
        except BaseException:
            os.close(self._lock)
            raise

    def _take_up(self, values: Mapping[str, Any]) -> None:
        """Begins with what is in ``unfinished.json``, or anew."""
        form = values.get("form")
        self.form = Form(**{**form, "shape": tuple(form["shape"])}) if form else None
        self.parts: int = values.get("parts", 0)
        self.samples: int = values.get("samples", 0)
        self.skipped: list[tuple[str, str]] = [(item, why) for item, why in values.get("skipped", ())]
        self._classes = {name: k for k, name in enumerate(values.get("classes", ()))}
        self._differ: bool = values.get("differ", False)
        self._highest: int = values.get("highest_class", -1)
        self._first: np.ndarray | None = None
        self._blocks = Blocks(
            self.folder,
            [Field.from_dict(field) for field in values.get("fields", ())],
            values.get("blocks", ()),
            Moments.from_dict(values["moments"]) if values.get("moments") else None,
            self._columns,
        )
        self._text: int = self._blocks.ended[-1].get("text", 0) if self._blocks.ended else 0
        if not values.get("format"):
            atomic_json(self.folder / UNFINISHED, self._state())

    def restart(self, form: Form) -> None:
        """Forgets all samples; the next ones have this form."""
        self._blocks.close()
        self._take_up({"form": asdict(form)})

    def discard(self) -> None:
        """Removes all that was written."""
        self._blocks.close()
        remove_store(self.folder)

    def append(self, rows: Rows) -> None:
        """Adds what a part contains.

        Raises:
            UserError: Classes that are none, or a disk that cannot be written.
        """
        self.parts += 1
        self.skipped += rows.bad
        self.form = self.form or rows.form
        if not len(rows.x):
            return
        arrays = self._arrays(rows)
        if not self._blocks.fields:
            for name, value in arrays.items():
                self._blocks.open(Field(name, str(value.dtype), value.shape[1:]))
            self._first = rows.x[:1].copy()
        self._text = int(arrays[ENDS][-1]) if ENDS in arrays else 0
        if not self._differ:
            self._differ = bool((rows.x != self._first_row()).any())
        self.samples += len(rows.x)
        self._blocks.append(arrays)
        if self._blocks.bytes >= blocks.BLOCK_BYTES // (8 if self._slow else 1):
            self._end_block()

    def _first_row(self) -> np.ndarray:
        if self._first is None:
            field = self._blocks.fields[0]
            data = os.pread(self._blocks.files[field.name].fileno(), field.row, HEADER)
            self._first = np.frombuffer(data, field.dtype).reshape(1, *field.shape)
        return self._first

    def _arrays(self, rows: Rows) -> dict[str, np.ndarray]:
        """The rows of each field."""
        arrays = {"x": np.ascontiguousarray(rows.x)}
        if len(rows.labels):
            labels = np.array([self._number(label) for label in rows.labels], dtype=np.int64)
            if int(labels.min()) < 0:
                raise UserError(
                    "labels must not be negative", got=int(labels.min()), expected="class numbers from 0"
                )
            self._highest = max(self._highest, int(labels.max()))
            arrays["labels" if isinstance(rows.labels[0], int) else _NAMED] = labels
        if len(rows.captions):
            texts = [caption.encode(errors="replace") for caption in rows.captions]
            ends = self._text + np.cumsum([len(text) for text in texts], dtype=np.int64)
            arrays |= {TEXT: np.frombuffer(b"".join(texts), np.uint8), ENDS: ends}
        return arrays | {f"{CONDITION}{name}": value for name, value in rows.conditions.items()}

    def _number(self, label: int | str) -> int:
        return label if isinstance(label, int) else self._classes.setdefault(label, len(self._classes))

    def _end_block(self) -> None:
        """Brings all that was appended to the disk, and says so in ``unfinished.json``."""
        state = self._state()

        def commit(moments: Moments | None) -> None:
            about = {"blocks": self._blocks.ended, "moments": moments.to_dict() if moments else None}
            atomic_json(self.folder / UNFINISHED, {**state, **about})

        self._blocks.end({"samples": self.samples, **({"text": self._text} if self._text else {})}, commit)

    def _state(self) -> dict[str, Any]:
        """All of ``unfinished.json`` but blocks and moments."""
        return {
            "format": MARK,
            "version": VERSION,
            "request": self.request,
            "samples": self.samples,
            "parts": self.parts,
            "form": asdict(self.form) if self.form else None,
            "fields": [field.to_dict() for field in self._blocks.fields],
            "classes": list(self._classes),
            "differ": self._differ,
            "highest_class": self._highest,
            "skipped": list(self.skipped),
        }

    def pause(self) -> None:
        """Keeps all parts that were appended, for a later continuation."""
        self._end_block()
        self._blocks.wait()

    def finish(self, source: Source) -> dict[str, Any]:
        """Writes the index, which makes the folder a store.

        Args:
            source: What was read: names of classes, scaling, columns.

        Returns:
            The index.

        Raises:
            UserError: Too few samples, samples that are all the same, or of a range that is unclear.
        """
        self.pause()
        moments, files = self._blocks.moments, self._blocks.files
        if self.samples < 2:
            raise UserError(f"{source.name}: too few samples", got=self.samples, expected="2 or more")
        if not self._differ or moments is None:
            raise UserError(
                f"{source.name}: all samples are the same", got=f"{self.samples:,} copies of one sample"
            )
        names = self._class_names(source)
        fields = [
            self._in_order(field, names) if field.name == _NAMED else field for field in self._blocks.fields
        ]
        for field in fields:
            rows = self._text if field.name == TEXT else self.samples
            handle = files[field.name]
            handle.seek(0)
            handle.write(field.header(rows))
            handle.flush()
            os.fsync(handle.fileno())
        scaling = source.scaling or Scaling.of_range(
            float(moments.low[0]), float(moments.high[0]), fields[0].dtype == "uint8"
        )
        index = {
            "format": MARK,
            "version": VERSION,
            "samples": self.samples,
            "digest": hashlib.sha256(str(self._blocks.ended).encode()).hexdigest(),
            "fields": [field.to_dict() for field in fields],
            "class_names": names,
            "scaling": scaling.to_dict(),
            "columns": [column.to_dict() for column in source.columns],
            "moments": moments.to_dict(),
            "request": self.request,
            "skipped": self.skipped,
            "blocks": self._blocks.ended,
        }
        atomic_json(self.folder / INDEX, index)
        # Writing unfinished.json may have been cut in the middle.
        cut = self.folder.glob(f".{UNFINISHED}.*.tmp")
        for leftover in (self.folder / UNFINISHED, self.folder / f"{_NAMED}.npy", *cut):
            leftover.unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        return index

    def _class_names(self, source: Source) -> list[str]:
        """The names of the classes; none without labels.

        Raises:
            UserError: Class numbers that are none.
        """
        if self._highest < 0:
            return []
        names = in_order(list(self._classes)) or list(source.class_names)
        most = len(names) or max(self.samples, _MOST_CLASSES)
        if self._highest >= most:
            raise UserError(
                f"{source.name}: labels must be class numbers",
                got=f"{self._highest}, for {self.samples:,} samples",
                expected=f"numbers from 0 to {most - 1}",
            )
        return names or [str(k) for k in range(self._highest + 1)]

    def _in_order(self, field: Field, names: list[str]) -> Field:
        """The field of classes by their numbers in order, in a file of its own: it may be written again."""
        own = Field("labels", field.dtype, field.shape)
        places = np.array([names.index(name) for name in self._classes], dtype=np.int64)
        begin, handle = 0, (self.folder / own.file).open("w+b")
        self._blocks.files[own.name] = handle
        handle.seek(HEADER)
        for block in self._blocks.ended:
            size = field.row * (block["samples"] - begin)
            data = os.pread(self._blocks.files[field.name].fileno(), size, HEADER + field.row * begin)
            labels = places[np.frombuffer(data, np.int64)].tobytes()
            handle.write(labels)
            del block[HASH][field.name]
            block[HASH][own.name] = new_hash(labels).hexdigest()
            begin = block["samples"]
        return own

    def close(self) -> None:
        """Gives files and lock back."""
        self._blocks.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_store(folder: Path) -> None:
    """Removes the files of a store, its index first, and nothing else."""
    (folder / INDEX).unlink(missing_ok=True)
    for file in [*folder.glob("*.npy"), *folder.glob(f".{UNFINISHED}.*.tmp")]:
        file.unlink()
    remove_records(folder)
    for name in (UNFINISHED, LOCK):
        (folder / name).unlink(missing_ok=True)
