"""Command lines in processes of their own, without the seconds that each would need to import torch.

They are forked from a server that has imported it and has done nothing else: equal command lines compute with
equal libraries in equal order, whatever the tests before have done in their process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmatch.cli.main import entry

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch._dynamo", "sklearn.datasets", "matplotlib.figure", "peft"]
    + [f"distmatch.{name}" for name in ("cli.train", "cli.distill", "training.prepare", "methods.construct")]
    + ["distmatch.report.build", "distmatch.training.evaluation"]
)


def together(target: Callable[..., None], arguments: list[tuple[Any, ...]], timeout: float = 300) -> None:
    """Runs a function in several processes at once, one for each tuple of arguments, and waits for them."""
    handles = [tempfile.NamedTemporaryFile(mode="r", suffix=".txt") for _ in arguments]  # noqa: SIM115
    running = [
        _SERVER.Process(target=_reporting, args=(file.name, target, given))
        for file, given in zip(handles, arguments, strict=True)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout)
    left = [process for process in running if process.exitcode is None]
    for process in left:
        process.kill()
    codes = [None if process in left else process.exitcode for process in running]
    said = "\n".join(file.read() for file in handles)
    for file in handles:
        file.close()
    assert codes == [0] * len(running), f"exit codes {codes}, None for one that ran past {timeout} s\n{said}"


def _reporting(file: str, target: Callable[..., None], given: tuple[Any, ...]) -> None:
    """Runs a function, and writes the traceback of what it raises to a file."""
    try:
        target(*given)
    except BaseException:
        Path(file).write_text(traceback.format_exc())
        raise


class Forked:
    """``python -m distmatch LINE``, with what ``subprocess.Popen`` offers.

    Args:
        line: The command line.
    """

    def __init__(self, line: list[str]) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._errors = Path(name)
        self._process = _SERVER.Process(target=_main, args=(line, name))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code; minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Waits for the end; nothing, and what it wrote to stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError
        errors = self._errors.read_bytes()
        self._errors.unlink(missing_ok=True)
        return b"", errors


def _main(line: list[str], errors: str) -> None:
    """The forked process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_TRUNC), 2)
    sys.argv = ["distmatch", *line]
    entry()
