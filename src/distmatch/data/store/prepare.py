"""From a source to a store: threads read, one writes, in the order of the source."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.files import guard
from distmatch.base.inputs import checked_path
from distmatch.base.lock import contents, refuse_in_use
from distmatch.base.progress import Progress, progress, tell
from distmatch.data.scaling import Scaling
from distmatch.data.sources import Reading, open_source
from distmatch.data.sources.core import OTHER_SIZE, ColorFoundError, Part, Rows, Source
from distmatch.data.store.layout import INDEX, UNFINISHED, is_store, read_index
from distmatch.data.store.writing import StoreWriter, remove_store

_IN_FLIGHT = 2**29  # bytes of samples that were read and wait to be written
_SHOWN = 10  # reasons in a message


@dataclass(frozen=True)
class Latents:
    """What images are encoded by before they are written.

    Attributes:
        shape: Shape of the images that the autoencoder takes.
        fingerprint: Equal ones make equal latents; '' where it is not known.
        encode: Images (n, *shape) in [-1, 1] to latents.
    """

    shape: tuple[int, ...]
    fingerprint: str
    encode: Callable[[Tensor], Tensor]

    def of(self, rows: Rows, source: Source) -> Rows:
        """The latents of rows of a source.

        Raises:
            UserError: They are not of the shape of the images, or of a range that is not known yet.
        """
        if not len(rows.x):
            return rows
        if rows.x.shape[1:] != self.shape or (rows.x.dtype != np.uint8 and source.scaling is None):
            raise UserError(
                f"{source.name} cannot be encoded by the teacher's autoencoder",
                got=f"{rows.x.dtype} of shape {rows.x.shape[1:]}",
                expected=f"uint8 of shape {self.shape}",
                fix="resize the images and save them as uint8",
            )
        scaling = source.scaling or Scaling.for_images(0, 255, "uint8")
        return replace(rows, x=self.encode(scaling.to_model(torch.from_numpy(rows.x))).numpy())


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    labels: bool = True,
    image: str = "",
    label: str = "",
    caption: str = "",
    latents: Latents | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Reads a source into a store, which ``--data`` and :func:`distmatch.data.load_data` open.

    What was written when the process ended is kept: the same call continues with the block where it stopped.
    The store does not depend on the number of workers.

    Args:
        source: Name or path of the data.
        out: The folder of the store.
        size: Height and width to which image files are resized, after their largest part of this shape around
            the center was cropped; None keeps their size.
        labels: Whether classes are read.
        image: Which column, or extension in tar files, is the image; '' takes the only one.
        label: Which is the class; '' takes ``label``, ``labels`` or ``cls``.
        caption: Which is the caption; '' takes ``text``, ``prompt`` or ``caption``.
        latents: Encodes the images; None writes them as they are.
        skip_bad: Whether a store is made without the items that cannot be read.
        workers: Threads that read; None takes the processors of this process.
        overwrite: Replace a store in ``out``.

    Returns:
        The index of the store.

    Raises:
        UserError: Source or folder cannot be used; or items cannot be read and are not to be skipped.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    check_count("--workers", workers, 1)
    folder = checked_path(out).expanduser().resolve()
    _check_out(folder, overwrite)
    if Path(source).expanduser().resolve() == folder and folder.exists():
        raise UserError("a store cannot be made of itself", got=str(folder), fix="choose another --out")
    reading = Reading(size, labels, image, label, caption, latents.shape if latents else None)
    found = open_source(source, reading)
    request = {"source": found.name, "fingerprint": found.fingerprint, **asdict(reading)}
    if latents is not None:
        request["latents"] = latents.fingerprint
    request = json.loads(json.dumps(request))  # as it will be read again
    if overwrite and is_store(folder):
        refuse_in_use(folder)
        remove_store(folder)
    _check_request(folder, request)
    made = not folder.exists()
    guard(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    try:
        columns = found.scaling is not None and found.scaling.kind == "vector"
        with StoreWriter(folder, request, columns=columns, slow=latents is not None) as writer:
            return _write(found, writer, workers, skip_bad, latents)
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _check_out(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a store already, or anything else.

    Raises:
        UserError: It does; or a store that this version cannot read.
    """
    if not folder.exists() or (is_store(folder) and overwrite):
        return
    if (folder / INDEX).exists():
        read_index(folder)  # one of another version cannot be used
        raise UserError(
            f"{folder} holds a store already",
            fix=f"use it: --data {folder}; or replace it with --overwrite",
        )
    held = contents(folder)
    if not folder.is_dir() or (held and not is_store(folder)):
        raise UserError(
            f"{folder} is not empty, and not a store",
            got=", ".join(held[:5]) or "a file",
            expected="a new folder",
            fix="choose another folder with --out",
        )


def _check_request(folder: Path, request: dict[str, Any]) -> None:
    """Refuses to continue a store of other data.

    Raises:
        UserError: They are.
    """
    if not (folder / UNFINISHED).exists():
        return
    before = read_index(folder).get("request", {})
    if before != request:
        names = [name for name in request if before.get(name) != request[name]]
        raise UserError(
            f"{folder} holds an unfinished store of other data or options",
            got=", ".join(f"{name} {before.get(name)}" for name in names),
            expected=", ".join(f"{name} {request[name]}" for name in names),
            fix="begin anew with --overwrite, or choose another folder",
        )


def _write(
    source: Source, writer: StoreWriter, workers: int, skip_bad: bool, latents: Latents | None
) -> dict[str, Any]:
    """All parts that are missing, and the index."""
    if writer.samples:
        tell(f"continuing after {writer.samples:,} samples")
    try:
        while True:
            try:
                _append_all(source, writer, workers, latents)
                break
            except ColorFoundError as found:  # all images before were grey: they are written again, as color
                writer.restart(replace(found.form, shape=(3, *found.form.shape[1:])))
    except KeyboardInterrupt as stop:
        stop.args = ("the same command continues where it stopped",)
        raise
    writer.pause()
    bad = writer.skipped
    if bad and not skip_bad:
        sizes = any(OTHER_SIZE in why for _, why in bad)
        resize = "make all one size with --size and --overwrite; or " if sizes else ""
        raise UserError(
            f"{len(bad):,} of {len(bad) + writer.samples:,} items of {source.name} cannot be read",
            got=_reasons(bad),
            fix=f"{resize}repair or remove them, and begin anew with --overwrite; or leave them out: the "
            f"same command with --skip-bad, which need not read the others again. All are listed in "
            f"{writer.folder / UNFINISHED}",
        )
    if latents is not None:
        source = replace(source, scaling=Scaling.for_images(-1.0, 1.0, "latents, as they are"))
    return _or_nothing(writer, lambda: writer.finish(source))


def _reasons(bad: Sequence[tuple[str, str]]) -> str:
    """Why items cannot be read: each reason once, with its first item and the number of others."""
    items: dict[str, list[str]] = {}
    for item, why in bad:
        items.setdefault(why, []).append(item)
    shown = [
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {why}"
        for why, names in itertools.islice(items.items(), _SHOWN)
    ]
    left = sum(map(len, itertools.islice(items.values(), _SHOWN, None)))
    return "; ".join([*shown, *([f"and {left:,} more"] if left else [])])


def _or_nothing(writer: StoreWriter, action: Any) -> Any:
    """Runs what a useless source makes fail; then nothing is left of the store. A full disk leaves it."""
    try:
        return action()
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            writer.discard()
        raise


def _append_all(source: Source, writer: StoreWriter, workers: int, latents: Latents | None) -> None:
    parts = source.parts()
    done = sum(part.weight for part in itertools.islice(parts, writer.parts))
    began, before = time.monotonic(), writer.samples
    with (
        progress(source.total, initial=done, desc="prepare") as bar,
        ThreadPoolExecutor(workers, "read") as pool,
    ):
        try:
            for part, rows in _read(parts, writer, pool, workers):
                if latents is not None:
                    rows = _or_nothing(writer, partial(latents.of, rows, source))
                _or_nothing(writer, partial(writer.append, rows))
                _show(bar, part, writer.samples, (writer.samples - before) / (time.monotonic() - began))
        finally:
            pool.shutdown(cancel_futures=True)


def _show(bar: Progress, part: Part, samples: int, rate: float) -> None:
    bar.update(part.weight, samples=samples, rate=f"{rate:,.0f}/s")


def _read(
    parts: Iterator[Part], writer: StoreWriter, pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[Part, Rows]]:
    """Parts in their order, read ahead as far as memory allows."""
    waiting: deque[tuple[Part, Future[Rows]]] = deque()
    size = 0
    for part in parts:
        form = writer.form
        waiting.append((part, pool.submit(part.load, form)))
        # The first part says what samples are; the others are read at the same time.
        while waiting and (form is None or len(waiting) > workers + 1 or size * len(waiting) > _IN_FLIGHT):
            first, future = waiting.popleft()
            rows = _or_nothing(writer, future.result)
            size = rows.x.nbytes
            yield first, rows
            form = writer.form
    for part, future in waiting:
        yield part, _or_nothing(writer, future.result)
