"""Samples of any number, drawn and written in parts into a store, which can be continued at any time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.base.files import guard
from distmatch.base.lock import contents, refuse_in_use, take_lock
from distmatch.base.memory import free_memory, out_of_memory
from distmatch.base.progress import progress, quietly, tell
from distmatch.base.ranks import Ranks
from distmatch.data.columns import Column
from distmatch.data.scaling import Scaling
from distmatch.data.store.blocks import BLOCK_BYTES
from distmatch.data.store.layout import INDEX, MARK, Field, is_store, read_index
from distmatch.data.store.rows import RowStore, Turns
from distmatch.data.store.writing import remove_store
from distmatch.interop import decoder_of
from distmatch.training.models import Model

_LEAST_BLOCKS, _MOST_BLOCKS = 64, 4096  # the one for progress and sharing out, the other for the index
_LARGEST = 4096  # samples in a batch that is tried
_NUMBERS = 2**24  # of the samples that are drawn at a time: fewer would not be worth a jump to their noise
_WORTH = 1.1  # how much faster the next size must be
_TIMED = 0.05  # seconds for which a size is timed at least
_SETTLED = ("batch", "block")  # of the request: found at the first start

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Drawing:
    """Samples as rows of a store.

    Attributes:
        draw: The rows of samples (first, count, batch) by field.
        samples: Number of samples.
        request: All that they depend on besides the size of their batches, as JSON.
        scaling: Of the samples.
        class_names: Names of the classes; () without labels.
        columns: Of vectors.
        captions: The captions, which samples have in turn.
    """

    draw: Callable[[int, int, int], Arrays]
    samples: int
    request: Mapping[str, Any]
    scaling: Scaling
    class_names: Sequence[str] = ()
    columns: Sequence[Column] = ()
    captions: Sequence[str] = ()


def check_store(folder: Path, samples: int, *, resume: bool, overwrite: bool) -> None:
    """Refuses a place where no store can be begun, or none can be continued, before anything is loaded.

    Raises:
        UserError: It is one.
    """
    if samples < 2:
        raise UserError("a store has two samples or more", got=f"--n {samples}")
    if resume and overwrite:
        raise UserError("--resume keeps what --overwrite removes", got="both", fix="omit one of them")
    if resume:
        if not is_store(folder):
            raise UserError(f"there are no samples to continue in {folder}", fix="omit --resume")
        return
    if is_store(folder):
        if not overwrite:
            whole = (folder / INDEX).exists()
            raise UserError(
                f"{folder} holds {'samples already' if whole else 'a part of its samples'}",
                fix=f"{'choose another --out' if whole else 'continue with --resume'}, or replace them with "
                "--overwrite",
            )
        refuse_in_use(folder)
    elif folder.exists() and (not folder.is_dir() or contents(folder)):
        raise UserError(
            f"{folder} holds something else and was left alone",
            expected="a new folder",
            fix="choose another --out",
        )


def sample_store(
    folder: Path,
    drawing: Drawing,
    *,
    batch: int | None,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    continued_by: str,
) -> tuple[dict[str, Any], float]:
    """Draws samples into a store, block by block, all processes together.

    Args:
        folder: The folder of the store, after :func:`check_store`.
        drawing: The samples.
        batch: Samples of a call; None finds it, or takes that of the store that is continued.
        ranks: The processes, which have the same folder.
        resume: Continue what is there.
        overwrite: Replace a store.
        continued_by: What the user does to continue.

    Returns:
        The index, and samples a second of all processes together (0 where nothing was left to do).

    Raises:
        UserError: Another process writes there, the store is of other samples, or the disk cannot be written.
    """
    ranks.require_same("model and samples", json.dumps(drawing.request, sort_keys=True))
    before = read_index(folder)["request"] if resume else {}
    _check_same(folder, before, {**drawing.request, **({"batch": batch} if batch else {})})
    if (folder / INDEX).exists() and resume:
        return read_index(folder), 0.0
    size = before.get("batch") or batch or _shared_batch(drawing, ranks)
    with quietly():
        form = drawing.draw(0, 1, 1)
    fields = tuple(Field(name, str(v.dtype), v.shape[1:]) for name, v in form.items())
    block = before.get("block") or _block(drawing.samples, size, sum(field.row for field in fields))
    request = {**drawing.request, "batch": size, "block": block}
    turns = Turns(drawing.captions) if drawing.captions else None
    store = RowStore(folder, fields, drawing.samples, block, turns)
    lock = None
    ranks.wait()
    try:
        if ranks.main:
            guard(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
            lock = guard(lambda: take_lock(folder, MARK), folder)
            if overwrite and is_store(folder):
                remove_store(folder)
            if not store.begun:
                store.begin(request, continued_by)
        ranks.wait()
        rate = _write_all(store, drawing, size, ranks)
        if ranks.main:
            store.finish(request, drawing.class_names, drawing.scaling, drawing.columns)
        ranks.wait()
    finally:
        if lock is not None:
            os.close(lock)
    return read_index(folder), rate


def _write_all(store: RowStore, drawing: Drawing, batch: int, ranks: Ranks) -> float:
    """Writes the blocks that are missing, one of each rank at a time; returns samples a second."""
    written = torch.zeros(store.blocks, dtype=torch.int64)
    if ranks.main:
        written[store.done()] = 1
    ranks.broadcast([written])
    missing = (written == 0).nonzero()[:, 0].tolist()
    done = store.samples - sum(len(store.rows(number)) for number in missing)
    if done:
        tell(f"continuing after {done:,} of {store.samples:,} samples")
    began = time.monotonic()
    left = store.samples - done
    row = next(math.prod(field.shape) for field in store.fields if field.name == "x")
    part = batch * max(1, _NUMBERS // (batch * row))
    with progress(store.samples, initial=done, desc="samples") as bar:

        def parts(number: int) -> Iterator[Arrays]:
            rows = store.rows(number)
            for first in range(rows.start, rows.stop, part):
                count = min(part, rows.stop - first)
                with quietly():
                    arrays = drawing.draw(first, count, batch)
                yield arrays
                if ranks.size == 1:
                    shown(count)

        def shown(count: int) -> None:
            rate = (bar.step + count - done) / max(time.monotonic() - began, 1e-9)
            bar.update(count, rate=f"{rate:,.4g}/s")

        for start in range(0, len(missing), ranks.size):
            own = missing[start + ranks.index : start + ranks.index + 1]
            for number in own:
                store.write(number, parts(number))
            count = int(ranks.sum(torch.tensor(sum(len(store.rows(number)) for number in own))))
            if ranks.size > 1:
                shown(count)
    return left / max(time.monotonic() - began, 1e-9) if left else 0.0


def _check_same(folder: Path, before: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Refuses to continue a store of other samples.

    Raises:
        UserError: They are.
    """
    known = {key: value for key, value in before.items() if key not in _SETTLED or key in request}
    if not before or known == dict(request):
        return
    names = sorted(key for key in {*known, *request} if known.get(key) != request.get(key))
    raise UserError(
        f"{folder} holds samples of another model or other options",
        got=", ".join(f"{name} {_short(request.get(name))}" for name in names),
        expected=", ".join(f"{name} {_short(known.get(name))}" for name in names),
        fix="resume with the model and the options that it was begun with, or choose another --out",
    )


def _short(value: Any) -> str:
    return str(value)[:40]


def _block(samples: int, batch: int, row: int) -> int:
    """Samples in a block: whole batches, of about 64 MiB, and neither few nor very many blocks."""
    fit = BLOCK_BYTES // (batch * max(row, 1))
    low, high = (-(-samples // (batch * blocks)) for blocks in (_MOST_BLOCKS, _LEAST_BLOCKS))
    return batch * max(1, low, min(fit, high))


def _shared_batch(drawing: Drawing, ranks: Ranks) -> int:
    """The size of batches that the first process finds, for all."""
    found, said = 0, ""
    if ranks.main:
        with quietly():
            found, said = find_batch(lambda n: drawing.draw(0, n, n), min(drawing.samples, _LARGEST))
        tell(said)
    return ranks.largest(found)


def find_batch(draw: Callable[[int], Any], most: int) -> tuple[int, str]:
    """The size of batches from which on larger ones are no faster, or do not fit into memory.

    It is doubled from 1. On a CPU it also ends where the next size may take more memory than is free, as
    far as the growth of the last one says; on an accelerator where memory has ended.

    Args:
        draw: Draws so many samples.
        most: The largest size.

    Returns:
        The size, and a sentence that says why.
    """
    draw(1)
    best, rate, size = 1, 0.0, 1
    while True:
        peak = _peak()
        try:
            found = _rate(draw, size)
        except Exception as error:
            if size == 1 or out_of_memory(error) is None:
                raise
            _free_cache()
            why = f"{size} do not fit into memory"
            break
        if found < _WORTH * rate:
            why = f"{size} are no faster"
            break
        best, rate = size, found
        if size >= most:
            why = "the largest that is tried"
            break
        free = free_memory()
        if free is not None and 4 * (_peak() - peak) > free:
            why = f"{2 * size} may not fit into memory"
            break
        size = min(2 * size, most)
    return best, f"batch {best}: {rate:,.4g} samples/s; {why} (--batch sets it)"


def _rate(draw: Callable[[int], Any], size: int) -> float:
    """Samples a second in batches of a size."""
    calls, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < _TIMED or not calls:
        draw(size)
        calls += 1
    return calls * size / seconds


def _peak() -> int:
    """Bytes that this process had at most, where the system counts them."""
    try:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:
        return 0


def _free_cache() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def fingerprint(model: Model) -> str:
    """A sha256 (hex) of the weights of a model and of what it says of itself."""
    inner: Any = model.student if model.student is not None else model.teacher
    about = model.student.description() if model.student is not None else {"shape": list(inner.shape)}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    denoiser = model.student.denoiser if model.student is not None else inner
    for part in (inner, decoder_of(denoiser)):
        if not isinstance(part, nn.Module):
            digest.update(model.name.encode() if part is inner else b"")
            continue
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_stored(x: np.ndarray) -> np.ndarray:
    """Exported samples with channels first, as a store has them."""
    if x.dtype != np.uint8:
        return x
    return x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)


def stored_scaling(scaling: Scaling) -> Scaling:
    """That of exported samples: pixels are bytes."""
    return Scaling.for_images(0, 255, "uint8 images, 0..255") if scaling.kind == "image" else scaling
