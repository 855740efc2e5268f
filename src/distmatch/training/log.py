"""The event log of a run: one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from distmatch.base.files import guard


class EventLog:
    """An append-only file of JSON lines ``{"event", "step", "time", ...}``; ``time`` is in Unix seconds.

    Every line is one write to the operating system, so a killed process loses no line that was written and
    readers never see two lines mixed. Opening a file whose last line was cut short ends that line first: that
    one does not parse, and all later ones do.

    Args:
        path: The file; it and its folder are made if they are missing.
        follow: Gets each event, as JSON values, once it is in the file.

    Raises:
        UserError: The file cannot be opened or written.
    """

    def __init__(
        self, path: str | os.PathLike[str], follow: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.path = Path(path)
        self._follow = follow
        self._fd: int | None = guard(self._open, self.path)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(fd).st_size
        self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        return fd

    def write(self, event: str, /, step: int | None = None, **values: Any) -> None:
        """Appends one event.

        Args:
            event: Its name, for example ``"train"``.
            step: The training step it belongs to, if any.
            values: Numbers, strings, lists, dicts, tensors, numpy values. What is not finite becomes null.

        Raises:
            UserError: The disk is full or the file cannot be written.
            TypeError: A value has no JSON form.
        """
        if self._fd is None:
            raise ValueError(f"the log {self.path} is closed")
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        plain = {key: _plain(value, key) for key, value in record.items()}
        line = json.dumps(plain, allow_nan=False) + "\n"
        fd = self._fd
        guard(lambda: self._append(fd, line.encode()), self.path)
        if self._follow is not None:
            self._follow(plain)

    def _append(self, fd: int, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data
        while data:  # one round, except where the disk takes a part only
            written = os.write(fd, data)
            self._torn = written < len(data)
            data = data[written:]

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _plain(value: Any, key: str) -> Any:
    """The JSON form of ``value``; ``key`` names it in an error."""
    if isinstance(value, torch.Tensor):
        return _plain(value.detach().cpu().tolist(), key)
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), key)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, key) for v in value]
    raise TypeError(f"{key} is a {type(value).__qualname__}, which has no JSON form")
