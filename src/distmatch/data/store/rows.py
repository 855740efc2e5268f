"""A store of a known number of samples, written in blocks of any order, by one process or several.

Every file has its full size from the beginning. A block is written at its place, and recorded in
``blocks/000012.json`` once it is on the disk: it counts from then on, and what a killed process wrote of
another block is written again. The index is made of the records in the order of the blocks, so that it does
not depend on who wrote them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from distmatch.base.files import atomic_json, guard, read_json
from distmatch.base.lock import LOCK
from distmatch.data.columns import Column
from distmatch.data.recorded import Moments
from distmatch.data.scaling import Scaling
from distmatch.data.store.layout import (
    ENDS,
    HASH,
    HEADER,
    INDEX,
    MARK,
    RECORDS,
    TEXT,
    UNFINISHED,
    VERSION,
    Field,
    check_file,
    damaged,
    new_hash,
)


class Turns:
    """Captions that samples have in turn, so that it is known where that of each one is written.

    Args:
        texts: The captions; sample i has number i modulo how many there are.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text.encode(errors="replace") for text in texts]
        self._ends = [0, *accumulate(map(len, self._texts))]

    def end(self, samples: int) -> int:
        """Bytes of the captions of the first ``samples``."""
        turns, rest = divmod(samples, len(self._texts))
        return turns * self._ends[-1] + self._ends[rest]

    def arrays(self, first: int, count: int) -> dict[str, np.ndarray]:
        """The rows of both fields for some samples."""
        numbers = range(first, first + count)
        text = b"".join(self._texts[i % len(self._texts)] for i in numbers)
        ends = np.array([self.end(i + 1) for i in numbers], dtype=np.int64)
        return {TEXT: np.frombuffer(text, np.uint8), ENDS: ends}


@dataclass(frozen=True)
class RowStore:
    """The files of such a store.

    Attributes:
        folder: The folder.
        fields: Its arrays; those of captions are added.
        samples: Number of samples.
        block: Samples in a block; the last one may have fewer.
        captions: The captions, or None.
    """

    folder: Path
    fields: tuple[Field, ...]
    samples: int
    block: int
    captions: Turns | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.block)

    @property
    def columns(self) -> bool:
        """Whether statistics are taken of each column: of vectors and sequences."""
        return next(len(field.shape) < 3 for field in self.fields if field.name == "x")

    def rows(self, number: int) -> range:
        """The samples of a block."""
        return range(number * self.block, min((number + 1) * self.block, self.samples))

    def all_fields(self) -> list[Field]:
        """The arrays with those of captions."""
        text = [Field(TEXT, "uint8", ()), Field(ENDS, "int64", ())] if self.captions else []
        return [*self.fields, *text]

    def _start(self, field: Field, sample: int) -> int:
        """The row of a field where a sample begins."""
        return self.captions.end(sample) if self.captions and field.name == TEXT else sample

    @property
    def begun(self) -> bool:
        """Whether all files were made."""
        return (self.folder / UNFINISHED).is_file() and (self.folder / RECORDS).is_dir()

    def begin(self, request: Mapping[str, Any], continued_by: str) -> None:
        """Makes the files, in a folder that exists.

        Args:
            request: What the samples depend on.
            continued_by: What the user does to continue an unfinished store.
        """
        about = {"format": MARK, "version": VERSION, "request": dict(request), "continue": continued_by}
        atomic_json(self.folder / UNFINISHED, about)
        for field in self.all_fields():
            guard(partial(self._make, field), self.folder / field.file)
        guard(lambda: (self.folder / RECORDS).mkdir(exist_ok=True), self.folder)

    def _make(self, field: Field) -> None:
        rows = self._start(field, self.samples)
        with open(self.folder / field.file, "wb") as file:
            file.write(field.header(rows))
            file.truncate(HEADER + rows * field.row)
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> list[int]:
        """The blocks that are written.

        Raises:
            UserError: A file is not as it was made, or a record is damaged.
        """
        for field in self.all_fields():
            check_file(self.folder, field, self._start(field, self.samples))
        numbers = [k for k in range(self.blocks) if self._record(k).exists()]
        for k in numbers:
            self._read_record(k)
        return numbers

    def _record(self, number: int) -> Path:
        return self.folder / RECORDS / f"{number:06d}.json"

    def _read_record(self, number: int) -> tuple[dict[str, str], Moments]:
        file = self._record(number)
        try:
            values = read_json(file)
            digests = {field.name: str(values[HASH][field.name]) for field in self.all_fields()}
            return digests, Moments.from_dict(values["moments"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"{RECORDS}/{file.name}: {type(error).__name__} {error}"[:200]
            raise damaged(self.folder, what, "the record of a block") from error

    def write(self, number: int, parts: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Writes a block.

        Args:
            number: The block.
            parts: The rows of its samples in order, some at a time, by field.

        Raises:
            UserError: The disk cannot be written.
        """
        guard(lambda: self._write(number, parts), self.folder)

    def _write(self, number: int, parts: Iterable[Mapping[str, np.ndarray]]) -> None:
        first, digests = self.rows(number).start, {}
        moments: Moments | None = None
        with ExitStack() as stack:
            files = {}
            for field in self.all_fields():
                files[field.name] = stack.enter_context(open(self.folder / field.file, "r+b"))
                files[field.name].seek(HEADER + field.row * self._start(field, first))
                digests[field.name] = new_hash()
            for part in parts:
                count = len(part["x"])
                arrays = {**part, **(self.captions.arrays(first, count) if self.captions else {})}
                for name, values in arrays.items():
                    content = np.ascontiguousarray(values).tobytes()
                    files[name].write(content)
                    digests[name].update(content)
                found = Moments.of(arrays["x"], columns=self.columns)
                moments = found if moments is None else moments.with_more(found)
                first += count
            for file in files.values():
                file.flush()
                os.fdatasync(file.fileno())
        if moments is None or first != self.rows(number).stop:
            raise RuntimeError(f"block {number} ends at sample {first}")
        hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        atomic_json(self._record(number), {HASH: hashes, "moments": moments.to_dict()})

    def finish(
        self, request: Mapping[str, Any], names: Sequence[str], scaling: Scaling, columns: Sequence[Column]
    ) -> dict[str, Any]:
        """Writes the index of a store whose blocks are all there, and returns it.

        Args:
            request: As for :meth:`begin`.
            names: Names of the classes.
            scaling: That of the samples.
            columns: Of vectors.
        """
        ended: list[dict[str, Any]] = []
        moments: Moments | None = None
        for number in range(self.blocks):
            digests, found = self._read_record(number)
            moments = found if moments is None else moments.with_more(found)
            end = self.rows(number).stop
            text = {"text": self.captions.end(end)} if self.captions else {}
            ended.append({"samples": end, **text, HASH: digests})
        if moments is None:
            raise RuntimeError("a store without blocks")
        index = {
            "format": MARK,
            "version": VERSION,
            "samples": self.samples,
            "digest": hashlib.sha256(str(ended).encode()).hexdigest(),
            "fields": [field.to_dict() for field in self.all_fields()],
            "class_names": list(names),
            "scaling": scaling.to_dict(),
            "columns": [column.to_dict() for column in columns],
            "moments": moments.to_dict(),
            "request": dict(request),
            "skipped": [],
            "blocks": ended,
        }
        atomic_json(self.folder / INDEX, index)
        remove_records(self.folder)
        for leftover in (UNFINISHED, LOCK):
            (self.folder / leftover).unlink(missing_ok=True)
        return index


def remove_records(folder: Path) -> None:
    """Removes the records of blocks."""
    for file in (folder / RECORDS).glob("*.json"):
        file.unlink()
    if (folder / RECORDS).is_dir():
        (folder / RECORDS).rmdir()
