"""The arrays of a store while they are written: one thread hashes, another one writes."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.files import guard
from distmatch.data.recorded import Moments
from distmatch.data.store.layout import HASH, HEADER, TEXT, UNFINISHED, Field, new_hash

BLOCK_BYTES = 2**28
"""A block ends with the part of the source that reaches this size."""
_DIRTY_BYTES = 2**25  # that wait in memory for the disk: it is busy while the next samples are read
_TASKS_WAITING = 4  # two for each part


class Blocks:
    """Files that are appended to, and divided into blocks with hashes.

    Errors of the threads are raised by the calls that follow.

    Args:
        folder: Where the files are.
        fields: The arrays that there are already, and whose rows beyond the last block are cut off.
        ended: The blocks that there are.
        moments: Their statistics.
        columns: Whether statistics are taken of each column.
    """

    def __init__(
        self,
        folder: Path,
        fields: Sequence[Field],
        ended: Sequence[dict[str, Any]],
        moments: Moments | None,
        columns: bool,
    ) -> None:
        self.folder, self.ended, self.moments = folder, list(ended), moments
        self.files: dict[str, IO[bytes]] = {}
        self.fields: list[Field] = []
        self.bytes = 0
        """Bytes since the last block ended."""
        self._dirty = 0
        self._columns, self._hashes = columns, dict[str, Any]()
        self._hasher, self._disk = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "disk")
        self._running: deque[Future[None]] = deque()
        try:
            for field in fields:
                self.open(field)
        except BaseException:
            self.close()
            raise

    def open(self, field: Field) -> None:
        """Opens the file of a field behind its last block.

        Raises:
            UserError: It is shorter than that.
        """
        last = self.ended[-1] if self.ended else {}
        rows = last.get("text" if field.name == TEXT else "samples", 0)
        end, file = HEADER + rows * field.row, self.folder / field.file
        handle = guard(lambda: file.open("r+b" if rows else "w+b"), file)
        self.files[field.name] = handle
        if os.fstat(handle.fileno()).st_size < end and rows:
            raise UserError(
                f"{file} is shorter than {UNFINISHED} says",
                expected=f"{end:,} bytes",
                fix="prepare the data again with --overwrite",
            )
        handle.truncate(end)
        handle.seek(end)
        self.fields.append(field)
        self._hashes[field.name] = new_hash()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends rows to each file."""
        self.wait(_TASKS_WAITING)
        self.bytes += sum(value.nbytes for value in arrays.values())
        self._running.append(self._hasher.submit(self._hash, arrays))
        self._running.append(self._disk.submit(self._write, arrays))

    def _hash(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, value in arrays.items():
            self._hashes[name].update(_bytes(value))
        new = Moments.of(arrays["x"], columns=self._columns)
        self.moments = new if self.moments is None else self.moments.with_more(new)

    def _write(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, value in arrays.items():
            self.files[name].write(_bytes(value))
            self._dirty += value.nbytes
        if self._dirty >= _DIRTY_BYTES:
            self._sync()

    def _sync(self) -> None:
        """Brings what was written to the disk."""
        self._dirty = 0
        for handle in self.files.values():
            handle.flush()
            os.fdatasync(handle.fileno())

    def end(self, rows: Mapping[str, int], commit: Callable[[Moments | None], None]) -> None:
        """Ends a block, in which the rows so far are brought to the disk.

        Args:
            rows: ``samples`` and, with captions, ``text``: rows of all blocks together.
            commit: Called in the end, with the statistics of all blocks.
        """
        block, self.bytes = self.bytes > 0, 0
        sealed = self._hasher.submit(self._seal)
        self._running.append(self._disk.submit(self._end, dict(rows) if block else {}, sealed, commit))

    def _seal(self) -> tuple[dict[str, str], Moments | None]:
        found = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        self._hashes = {name: new_hash() for name in found}
        return found, self.moments

    def _end(
        self,
        rows: dict[str, int],
        sealed: Future[tuple[dict[str, str], Moments | None]],
        commit: Callable[[Moments | None], None],
    ) -> None:
        self._sync()
        digests, moments = sealed.result()
        if rows:
            self.ended.append({**rows, HASH: digests})
        commit(moments)

    def wait(self, left: int = 0) -> None:
        """Waits until at most so many tasks are left, and raises what went wrong in a thread."""
        while len(self._running) > left:
            guard(self._running.popleft().result, self.folder)

    def close(self) -> None:
        """Ends the threads and closes the files."""
        for pool in (self._hasher, self._disk):
            pool.shutdown(cancel_futures=True)
        for handle in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which was raised already
                handle.close()


def _bytes(values: np.ndarray) -> memoryview | bytes:
    return values.data.cast("B") if values.size else b""
