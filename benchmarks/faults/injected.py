"""Faults inside a process: each function arms one, before the command line of distmatch starts."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_NETWORK = 0x40000000  # CLONE_NEWNET


def _at_step(number: int, act: Callable[[], None]) -> None:
    """Does something just before a step of a training."""
    from distmatch.training import runs

    loop = runs.run_loop

    def run_loop(step: Any, state: Any, *args: Any, **options: Any) -> Any:
        def with_fault(state: Any, batch: Any) -> Any:
            if state.step == number:
                act()
            return step(state, batch)

        return loop(with_fault, state, *args, **options)

    runs.run_loop = run_loop  # type: ignore[assignment]


def signal_at_step(number: int, kind: int) -> None:
    """A signal to this process: SIGKILL, SIGSTOP, SIGTERM."""
    _at_step(number, lambda: os.kill(os.getpid(), kind))


def slow_steps(seconds: float) -> None:
    """Steps that take time, so that something else can happen during a run."""
    from distmatch.training import runs

    loop = runs.run_loop

    def run_loop(step: Any, *args: Any, **options: Any) -> Any:
        return loop(lambda *given: (time.sleep(seconds), step(*given))[1], *args, **options)

    runs.run_loop = run_loop  # type: ignore[assignment]


def kill_at_sync(number: int) -> None:
    """SIGKILL at a certain call of fsync or replace: in the middle of the writing of a file."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def kill_at_batch(number: int) -> None:
    """SIGKILL at a certain batch of an encoding, a certain part of a source, or of samples."""
    from distmatch.base import progress

    update, calls = progress.Progress.update, 0

    def counted(self: Any, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, *args, **options)

    progress.Progress.update = counted  # type: ignore[method-assign]


def small_blocks(number: int) -> None:
    """Blocks of a store of 64 KiB, and SIGKILL at a certain batch; 0: never."""
    from distmatch.data.store import blocks, prepare

    for module in (blocks, prepare):
        if hasattr(module, "BLOCK_BYTES"):
            module.BLOCK_BYTES = 2**16
    if number:
        kill_at_sync(number)


def no_memory_at_step(number: int) -> None:
    """The error of a device whose memory is full, at a step."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    _at_step(number, fail)


def memory_limit(number: int, mebibytes: int) -> None:
    """No more memory than what is in use at a step, and a little; the step asks for a GiB."""

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), hard))
        torch.zeros(1 << 28)

    _at_step(number, limit)


def file_limit(number: int, size: int) -> None:
    """From a step on no file may become larger than a number of bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _at_step(number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def full_disk(number: int, folder: str) -> None:
    """At a step another file takes all that is free on the file system of a folder."""

    def fill() -> None:
        with open(Path(folder) / "filling", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    _at_step(number, fill)


def read_only(number: int, mount: str) -> None:
    """At a step a folder becomes read-only: mounted over itself, as a file system in use stays writable."""

    def mount_over() -> None:
        subprocess.run(["mount", "--bind", mount, mount], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)

    _at_step(number, mount_over)


def clock(number: int, years: float) -> None:
    """At a step the clock of the machine jumps by years; what counts seconds monotonically does not."""

    def jump() -> None:
        now = time.time
        time.time = lambda: now() + years * 365.25 * 86400

    _at_step(number, jump)


def in_network(name: str, interface: str) -> None:
    """In a network namespace."""
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = interface


def networked(name: str, interface: str, seconds: float) -> None:
    """In a network namespace, with slow steps."""
    in_network(name, interface)
    slow_steps(seconds)
