"""Command lines of distmatch in processes that are forked from one that has imported it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import injected
from safetensors.numpy import load_file

from distmatch.cli.main import entry

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "sklearn.datasets", "distmatch.cli.sample", "distmatch.cli.prepare"]
PRELOADED += ["distmatch.cli.running", "distmatch.training.prepare", "distmatch.training.prepare_teacher"]
PRELOADED += ["distmatch.cli.memory", "distmatch.methods.construct", "injected"]

Fault = tuple[Any, ...]
"""The name of a function of :mod:`injected` and its arguments; () for none."""


def _child(line: Sequence[str], errors: str, environ: dict[str, str], fault: Fault) -> None:
    os.environ.update(environ)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_TRUNC | os.O_CREAT), 2)
    if fault:
        getattr(injected, fault[0])(*fault[1:])
    sys.argv = ["distmatch", *line]
    entry()


class Launch:
    """One command line in one or several processes.

    Args:
        line: The command line.
        place: A folder for what the processes print.
        faults: For each process; () for one process without.
        timeout: Seconds after which processes give each other up.
        address: Where rank 0 listens.
    """

    def __init__(
        self,
        line: Sequence[str],
        place: Path,
        faults: Sequence[Fault] = ((),),
        timeout: float = 8,
        address: str = "127.0.0.1",
        world: int | None = None,
    ) -> None:
        world = len(faults) if world is None else world
        port = free_port()
        self.files, self.processes = [], []
        self.began = time.monotonic()
        for rank, fault in enumerate(faults):
            environ = {"DISTMATCH_TIMEOUT": str(timeout), "TORCH_CPP_LOG_LEVEL": "FATAL"}
            if world > 1:
                environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
            file = place / f"errors-{time.monotonic_ns()}-{rank}"
            process = SERVER.Process(target=_child, args=(list(line), str(file), environ, fault))
            process.start()
            self.files.append(file)
            self.processes.append(process)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one of the processes, if it is still there."""
        process = self.processes[rank]
        if process.exitcode is None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120, ranks: Sequence[int] | None = None) -> list[int | None]:
        """The exit codes, minus the signal for a process that one ended; None: still running."""
        until = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Kills what is left."""
        for rank, process in enumerate(self.processes):
            self.kill(rank)
            process.join()

    def messages(self) -> list[str]:
        """What the processes say of errors, line by line."""
        texts = [file.read_text() if file.exists() else "" for file in self.files]
        lines = [line for text in texts for line in text.splitlines()]
        return [line for line in lines if line.startswith(("distmatch ", "Traceback"))]


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def result_of(path: Path) -> bytes:
    """All that a finished command wrote, to the bit: a model, or the files of a store."""
    if path.is_file():
        return path.read_bytes()
    files = sorted((path / "model").glob("*.safetensors")) or sorted(path.glob("*.npy"))
    if not files:
        raise FileNotFoundError(f"no result in {path}")
    return b"".join(file.read_bytes() for file in files)


def distance(one: Path, other: Path) -> float:
    """The largest relative difference of a weight of two models."""
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    norms = {k: max(float((theirs[k] ** 2).sum()) ** 0.5, 1e-9) for k in theirs}
    return max(float(((mine[k] - theirs[k]) ** 2).sum()) ** 0.5 / norms[k] for k in theirs)


def begun(folder: Path) -> bool:
    """Whether there is something in a folder besides the lock and temporary files."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return any(name != ".lock" and not (name[0] == "." and name.endswith(".tmp")) for name in names)


def fresh(folder: Path) -> Path:
    """A folder that is not there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
