"""What surrounds a command: its streams, its signals, and other processes of the same launch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from distmatch.base.errors import Terminated, UserError

# Size and rank as torchrun and mpirun put them into the environment of every process that they start.
_LAUNCHES = (("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
TOGETHER = ("train", "distill", "compare", "sample", "evaluate")
"""Verbs that several processes carry out together."""


def rank_of_several(environ: Mapping[str, str]) -> int | None:
    """The rank of this process among several that were launched together; None where it is alone."""
    for size, rank in _LAUNCHES:
        own = environ.get(rank, "0")
        if environ.get(size, "1") not in ("", "0", "1") or own not in ("", "0"):
            return int(own) if own.isdecimal() else 0
    return None


def launched_as(environ: Mapping[str, str]) -> str:
    """How this command was started, up to its verb: by torchrun, where it is one of several processes."""
    names = next((pair for pair in _LAUNCHES if environ.get(pair[0], "1") not in ("", "0", "1")), None)
    if names is None:
        return "distmatch"
    size = int(environ[names[0]])
    local = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or size)
    nodes = ""
    if size > local:
        nodes = (
            f"--nnodes {size // local} --rdzv-backend c10d --rdzv-endpoint {environ['MASTER_ADDR']}:29500 "
        )
    return f"torchrun {nodes}--nproc-per-node {local} -- $(which distmatch)"


def several_processes(verb: str) -> UserError:
    """The refusal of a launch of several processes."""
    return UserError(
        f"distmatch {verb} runs in one process",
        got="several processes (WORLD_SIZE or RANK is set, as by torchrun or mpirun)",
        expected=f"one of {', '.join(TOGETHER)} by torchrun; or distmatch {verb} alone",
        fix=f"run `distmatch {verb} ...` without a launcher, or unset WORLD_SIZE and RANK",
    )


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within it SIGTERM raises :class:`Terminated`, so that what is half done is cleaned up as at Ctrl-C."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Lossy:
    """A text stream that continues when its reader has closed it: later output is lost.

    Args:
        stream: The stream, on a file descriptor.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or not."""
        try:
            return self._stream.write(text)
        except OSError:
            self._abandon()
            return len(text)

    def flush(self) -> None:
        """Flushes, or not."""
        try:
            self._stream.flush()
        except OSError:
            self._abandon()

    def _abandon(self) -> None:
        discard(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(descriptor: int) -> None:
    """Sends what is written to a descriptor nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def prepare_streams() -> None:
    """Opens closed streams on nothing, and lets no character and no lost reader of stderr end a command.

    A closed descriptor would be given to the next file that is opened, a checkpoint for example, and what
    other libraries print would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            discard(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Lossy(sys.stderr)
