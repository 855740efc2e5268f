"""Reads what a tracker has of a run: scalars as {name: {step: [values]}}, and the names of pictures."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Scalars = dict[str, dict[int, list[float]]]


def read_tensorboard(run: Path) -> tuple[Scalars, set[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars: Scalars = {}
    for name in found.Tags()["scalars"]:
        for point in found.Scalars(name):
            scalars.setdefault(name, {}).setdefault(point.step, []).append(point.value)
    return scalars, {f"{name}@{p.step}" for name in found.Tags()["images"] for p in found.Images(name)}


def read_wandb(run: Path) -> tuple[Scalars, set[str]]:
    """From the one transaction log of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    scalars: Scalars = {}
    pictures: set[str] = set()
    until = time.monotonic() + 60
    records: list[Any] = []
    while all(record.WhichOneof("record_type") != "exit" for record in records):  # another process writes it
        assert time.monotonic() < until
        time.sleep(0.02)
        files = list((run / "wandb").glob("offline-run-*/*.wandb"))
        records = [Record.FromString(content) for f in files for content in _records(f.read_bytes())]
    (file,) = files
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row["_step",]
            for (name, *inner), value in row.items():
                if inner == ["path"]:
                    assert (file.parent / "files" / value).is_file()
                    pictures.add(f"{name}@{step}")
                elif not inner and not name.startswith("_"):
                    scalars.setdefault(name, {}).setdefault(step, []).append(value)
    return scalars, pictures


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB: chunks with headers of 7 bytes, in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def read_trackio(project: str) -> tuple[Scalars, set[str]]:
    """From the only run of a project in the local database."""
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs(project)
    scalars: Scalars = {}
    pictures: set[str] = set()
    for row in SQLiteStorage.get_logs(project, name):
        for key, value in row.items():
            if isinstance(value, dict):
                pictures.add(f"{key}@{row['step']}")
            elif key not in ("step", "timestamp"):
                scalars.setdefault(key, {}).setdefault(row["step"], []).append(value)
    return scalars, pictures
