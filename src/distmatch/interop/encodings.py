"""Encodings on disk: what a model made of prompts or images, once, found again by content.

A folder holds the encodings of one encoder, in files of safetensors that are whole or absent. Each names the
encoder's fingerprint and the keys of its rows, so that nothing of another encoder is taken, and what was
interrupted continues with the rows that are missing. Several processes may write at once: they write
different files, or equal ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import guard, save_tensors
from distmatch.base.progress import progress, tell
from distmatch.diffusion.conditioning import Conditioning

_SHARD_ROWS, _SHARD_BYTES, _SHARD_SECONDS = 1024, 2**28, 60.0  # a file is written when one is reached
_KEPT_FREE = 2**30  # bytes that are left on the disk
_DIGITS = 32  # of the keys, hexadecimal

Compute = Callable[[list[int]], Mapping[str, Tensor]]
"""Encodes the items of these numbers: named tensors, a row each."""


Remarks = dict[str, set[int]]
"""Items by their numbers, by what there is to say of them."""


class EncodedRows:
    """Rows of encodings in mapped files: only what is asked for is read.

    Args:
        files: Tensors by name for each file.
        places: File and row of each of ours, (n, 2) int64.
    """

    def __init__(self, files: Sequence[Mapping[str, Tensor]], places: Tensor) -> None:
        self._files, self._places = files, places

    def __len__(self) -> int:
        return len(self._places)

    def index(self, rows: Tensor) -> Conditioning:
        """The rows of these numbers (B,), in memory of their own."""
        places = self._places[rows.cpu()]
        first = self._files[int(places[0, 0])]
        found = {name: value.new_empty(len(places), *value.shape[1:]) for name, value in first.items()}
        for file in places[:, 0].unique().tolist():
            here = places[:, 0] == file
            for name, value in self._files[file].items():
                found[name][here] = value[places[here, 1]]
        return Conditioning(found)


def key_of(*parts: str | bytes) -> str:
    """The key of an item: a hash of its content."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:_DIGITS]


def encoded(
    folder: Path,
    fingerprint: str,
    keys: Sequence[str],
    compute: Compute,
    *,
    what: str,
    batch: int = 16,
    remarks: Remarks | None = None,
) -> EncodedRows:
    """Encodings of items, computed where they are not on disk yet.

    Args:
        folder: Where they are kept; each encoder has a folder of its own below it.
        fingerprint: The encoder's: equal ones make equal encodings.
        keys: A key for each item, see :func:`key_of`; equal ones are encoded once.
        compute: Encodes items.
        what: What they are, in the plural, for messages.
        batch: Items that are encoded at a time.
        remarks: What ``compute`` notes on items by their numbers, such as prompts that were cut off; it is
            kept with them, and here in the end for all items.

    Raises:
        UserError: The disk has no room for them, or cannot be written.
    """
    place, remarks = folder / fingerprint[:_DIGITS], {} if remarks is None else remarks
    known, remarked = _known(place, fingerprint)
    missing: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key not in known:
            missing.setdefault(key, i)
    if missing:
        _encode(place, fingerprint, keys, list(missing.values()), compute, what, batch, remarks)
        known, remarked = _known(place, fingerprint)
    for words, those in remarked.items():
        if rows := {i for i, key in enumerate(keys) if key in those}:
            remarks[words] = rows
    files = list(dict.fromkeys(known[key][0] for key in keys))
    number = {file: i for i, file in enumerate(files)}
    places = torch.tensor([(number[known[key][0]], known[key][1]) for key in keys], dtype=torch.int64)
    return EncodedRows([_mapped(file) for file in files], places)


def _encode(
    place: Path,
    fingerprint: str,
    keys: Sequence[str],
    missing: list[int],
    compute: Compute,
    what: str,
    batch: int,
    remarks: Remarks,
) -> None:
    """Encodes the items that are missing; whatever ends it, what was encoded is kept."""
    parts: list[Mapping[str, Tensor]] = []
    waiting: list[str] = []
    began = time.monotonic()

    def write() -> None:
        nonlocal began
        if waiting:
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            here = set(waiting)
            noted = {words: sorted(here & {keys[i] for i in rows}) for words, rows in remarks.items()}
            about = {"encoder": fingerprint, "keys": "\n".join(waiting), "remarks": json.dumps(noted)}
            save_tensors(place / f"{key_of(*waiting)}.safetensors", tensors, about)
        parts.clear()
        waiting.clear()
        began = time.monotonic()

    with progress(len(missing), desc=f"encode {what}") as bar:
        try:
            for begin in range(0, len(missing), batch):
                chosen = missing[begin : begin + batch]
                found = {name: value.detach().cpu() for name, value in compute(chosen).items()}
                size = sum(value.nbytes for value in found.values()) // len(chosen)
                if begin == 0:
                    number = f"{len(missing):,} {what}" if len(missing) > 1 else f"1 {what.removesuffix('s')}"
                    _require_room(place, size * len(missing), number)
                parts.append(found)
                waiting.extend(keys[i] for i in chosen)
                late = time.monotonic() - began > _SHARD_SECONDS
                if late or len(waiting) >= _SHARD_ROWS or size * len(waiting) >= _SHARD_BYTES:
                    write()
                bar.update(len(chosen))
        except KeyboardInterrupt as stop:
            kept = f"the {bar.step:,} {what} that were encoded are kept"
            stop.args = (f"{kept}, and the same command continues",)
            raise
        finally:
            write()


def _require_room(place: Path, size: int, what: str) -> None:
    """Says how much will be written, and where; refuses where the disk would be full.

    Raises:
        UserError: It would be.
    """
    guard(lambda: place.mkdir(parents=True, exist_ok=True), place)
    free = shutil.disk_usage(place).free - _KEPT_FREE
    if size > free:
        raise UserError(
            f"the encodings of {what} do not fit on the disk of {place}",
            got=f"{size / 2**30:,.1f} GiB",
            expected=f"at most {max(free, 0) / 2**30:,.1f} GiB, which leaves one free",
            fix="name a folder on another disk with --cache, use fewer prompts, or encode them in training: "
            "--encode live",
        )
    tell(f"encoding {what}: {size / 2**20:,.1f} MiB in {place}")


def _known(place: Path, fingerprint: str) -> tuple[dict[str, tuple[Path, int]], dict[str, set[str]]]:
    """File and row of every key, and keys by remark; files of others and damaged ones are passed over."""
    found: dict[str, tuple[Path, int]] = {}
    remarked: dict[str, set[str]] = {}
    for file in sorted(place.glob("[!.]*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                about = handle.metadata() or {}
        except (SafetensorError, OSError, ValueError):
            continue
        if about.get("encoder") == fingerprint:
            found |= {key: (file, row) for row, key in enumerate(about.get("keys", "").split("\n"))}
            for words, keys in json.loads(about.get("remarks", "{}")).items():
                remarked.setdefault(words, set()).update(keys)
    return found, remarked


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of it."""
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
