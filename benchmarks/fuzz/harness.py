"""Runs many hostile inputs through one check: only our own errors, in little time, in little memory.

A check is called with one case after another in a forked process. A case fails when it raises something
else than the allowed errors, takes longer than the limit (the kernel ends the process, even in a loop of C
code), asks for more memory than the limit, or crashes the process. The next process goes on behind it.
Time is that of the processor, so that a busy machine fails nothing; one that waits is ended by the clock.

Every case is made from the seed and its number alone, so a failure can be made again; its bytes are saved.
"""

from __future__ import annotations

import argparse
import atexit
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from distmatch.base.errors import UserError

WAITS = 20
"""How much longer than on the processor a case may take on the clock: other processes run too."""

_SHARED = 2**20  # bytes of the shared page: counters, and the case under way
_HEAD = struct.Struct("<qqqqq")  # next case, accepted, refused, peak memory, size of the case under way


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        label: What kind of input it is, for the list of failures.
        content: Its bytes, as the check wants them.
    """

    label: str
    content: bytes


@dataclass(frozen=True)
class Failure:
    """A case that did what it must not.

    Attributes:
        number: Its number.
        label: Its label.
        what: What happened.
        saved: Where its bytes are, or None.
    """

    number: int
    label: str
    what: str
    saved: Path | None


@dataclass
class Summary:
    """What came of a run.

    Attributes:
        cases: Cases that were run.
        accepted: Cases that the check returned from.
        refused: Cases that ended in one of the allowed errors.
        failures: The others.
        seconds: Wall time.
        peak_bytes: Largest resident memory of a case that ended by itself, beyond what it began with.
    """

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.cases} cases in {self.seconds:.0f} s: {self.accepted} accepted, {self.refused} refused, "
            f"{len(self.failures)} failures; at most {self.peak_bytes / 2**20:.0f} MiB resident"
        )


def run(
    make: Callable[[random.Random, int], Case],
    check: Callable[[Case], Any],
    *,
    cases: int,
    seed: int = 0,
    seconds: float = float("inf"),
    allowed: tuple[type[BaseException], ...] = (UserError,),
    limit_s: float = 2.0,
    limit_bytes: int = 2**30,
    save: Path | None = None,
    most_failures: int = 20,
) -> Summary:
    """Makes and checks cases, each under its limits, until all are done or Ctrl-C.

    Args:
        make: Makes the case of a number from a random stream of its own, seeded by ``seed`` and the number.
            It runs in the forked process, outside of the limits.
        check: Uses the case; returning means that it was accepted.
        cases: Largest number of cases.
        seed: Seed of all of them.
        seconds: No new case is begun after that long.
        allowed: Errors that refuse an input as they should.
        limit_s: Longest time of the processor for one case, in seconds; on the clock ``WAITS`` times that.
        limit_bytes: Address space that a process may take beyond what it has when it starts.
        save: Folder for the bytes of the cases that fail.
        most_failures: The run ends after that many.
    """
    begin, summary, shared = time.monotonic(), Summary(), mmap.mmap(-1, _SHARED)
    number = 0
    while number < cases and len(summary.failures) < most_failures and time.monotonic() - begin < seconds:
        shared[: _HEAD.size] = _HEAD.pack(number, 0, 0, summary.peak_bytes, 0)
        child = os.fork()
        if child == 0:
            _work(shared, make, check, cases, seed, begin + seconds, allowed, limit_s, limit_bytes)
        status = _ended(child)
        number, accepted, refused, summary.peak_bytes, size = _HEAD.unpack(shared[: _HEAD.size])
        summary.accepted += accepted
        summary.refused += refused
        if status is None:
            break
        if status != 0:
            label, what, content = _under_way(shared, size)
            if os.WIFSIGNALED(status):
                died = signal.Signals(os.WTERMSIG(status))
                late = {signal.SIGPROF: f"longer than {limit_s:g} s", signal.SIGALRM: "does not end"}
                what = late.get(died, f"ended by {died.name}")
            summary.failures.append(Failure(number, label, what, _saved(save, seed, number, content)))
            number += 1
    summary.cases, summary.seconds = number, time.monotonic() - begin
    return summary


def _ended(child: int) -> int | None:
    """How a process ended; None where Ctrl-C came first, which ends it too."""
    try:
        return os.waitpid(child, 0)[1]
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None


def _work(
    shared: mmap.mmap,
    make: Callable[[random.Random, int], Case],
    check: Callable[[Case], Any],
    cases: int,
    seed: int,
    until: float,
    allowed: tuple[type[BaseException], ...],
    limit_s: float,
    limit_bytes: int,
) -> None:
    """The forked process: it never returns. It exits with 0 at the end, with 1 at a failure."""
    number, accepted, refused, peak, _ = _HEAD.unpack(shared[: _HEAD.size])
    for late in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(late, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the first process, which prints what came of it
    limit = _address_space() + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while number < cases and time.monotonic() < until:
        case = make(random.Random(f"{seed}/{number}"), number)
        _note(shared, (number, accepted, refused, peak), case, "")
        before = _resident_from_here()
        _limit(limit_s)
        try:
            check(case)
            accepted += 1
        except allowed:
            refused += 1
        except BaseException as error:
            _limit(0)
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
            _note(shared, (number, accepted, refused, peak), case, what)
            os._exit(1)
        _limit(0)
        peak = max(peak, _resident("VmHWM") - before)
        number += 1
    shared[: _HEAD.size] = _HEAD.pack(number, accepted, refused, peak, 0)
    os._exit(0)


def _limit(seconds: float) -> None:
    """Lets the kernel end this process so much later; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITS * seconds)


def _note(shared: mmap.mmap, counts: tuple[int, int, int, int], case: Case, what: str) -> None:
    """Writes down the case under way where the first process reads it when this one has died."""
    words = json.dumps([case.label[:200], what]).encode()
    room = _SHARED - _HEAD.size - len(words) - 1
    raw = words + b"\n" + case.content[:room]
    shared[: _HEAD.size] = _HEAD.pack(*counts, len(raw))
    shared[_HEAD.size : _HEAD.size + len(raw)] = raw


def _under_way(shared: mmap.mmap, size: int) -> tuple[str, str, bytes]:
    words, _, content = shared[_HEAD.size : _HEAD.size + size].partition(b"\n")
    label, what = json.loads(words) if words else ("?", "")
    return label, what, content


def _saved(folder: Path | None, seed: int, number: int, content: bytes) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"seed{seed}-case{number}.bin"
    place.write_bytes(content)
    return place


def _address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident_from_here() -> int:
    """Bytes of resident memory; from here on the kernel's peak of it begins anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    """Bytes of resident memory now (VmRSS), or at most since the peak began anew (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


def scratch() -> Path:
    """A folder for the files of the cases, in memory where that is possible, removed when the run ends.

    Warnings are silent from here on: cases are made to cause them.
    """
    warnings.simplefilter("ignore")
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # forked processes end without it
    return folder


class Lines:
    """Which lines of some files have been run: an input that reaches a new one is worth changing further.

    Args:
        files: Source files to watch; others run at full speed.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.files, self.seen, self.new = frozenset(files), set[tuple[str, int]](), False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches while it lasts; then ``new`` says whether a line was reached for the first time."""
        before = len(self.seen)

        def line(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                self.seen.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        def call(frame: FrameType, _event: str, _: Any) -> Any:
            return line if frame.f_code.co_filename in self.files else None

        sys.settrace(call)
        try:
            yield
        finally:
            sys.settrace(None)
            self.new = len(self.seen) > before


def command_line(description: str, make: Any, check: Any, **options: Any) -> int:
    """The ``main`` of a script of this folder: reads the options, runs, prints; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=10_000, help="largest number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new case after that long")
    parser.add_argument("--save", type=Path, default=None, help="folder for the inputs that fail")
    given = parser.parse_args()
    found = run(
        make, check, cases=given.cases, seed=given.seed, seconds=given.seconds, save=given.save, **options
    )
    print(found)
    for failure in found.failures:
        print(f"  case {failure.number}, {failure.label}: {failure.what}  {failure.saved or ''}")
    return 1 if found.failures else 0
