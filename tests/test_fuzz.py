"""A short form of the fuzzing of benchmarks/fuzz: the same cases every time, and what it found before."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distmatch.base.errors import UserError
from distmatch.training.options import TrainOptions
from distmatch.training.toml import with_values

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a script of the folder under a name of its own."""

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(str(FUZZ))
        monkeypatch.chdir(tmp_path)
        for module in ("harness", "values", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return __import__(name)

    here = os.getcwd()
    yield load
    os.chdir(here)
    for module in ("harness", "values", "files", "arrays", "command_line"):
        sys.modules.pop(module, None)


def only_ours(cases: Any, count: int) -> tuple[int, int]:
    """Runs cases in this process: accepted, or one of our own errors."""
    accepted = refused = 0
    for number in range(1, count + 1):
        case = cases.make(random.Random(f"7/{number}"), number)
        try:
            cases.check(case)
            accepted += 1
        except UserError:
            refused += 1
    return accepted, refused


@pytest.mark.parametrize(("name", "count"), [("files", 100), ("arrays", 250)])
def test_changed_files_are_read_or_refused(name: str, count: int, fuzz: Any, tmp_path: Path) -> None:
    module = fuzz(name)
    accepted, refused = only_ours(getattr(module, name.capitalize())(tmp_path), count)
    assert accepted > count / 50
    assert refused > count / 4


def test_made_command_lines_are_taken_or_refused(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fuzz("command_line")
    accepted, refused = only_ours(module.CommandLines(tmp_path, monkeypatch.setattr), 25)
    assert accepted + refused == 25


def test_an_integer_that_no_float_holds_is_refused() -> None:
    with pytest.raises(UserError, match="lr"):
        with_values(TrainOptions(), {"teacher": {"lr": 10**400}})


def misbehave(case: Any) -> None:
    """What a reader may do with a case."""
    match case.label:
        case "refused":
            raise UserError("no")
        case "raises":
            raise ValueError("odd")
        case "computes":
            while True:
                pass
        case "waits":
            time.sleep(100)
        case "asks":
            bytearray(2**31)
        case "holds":
            # Mapped: the allocator may hand out what this process freed before, which is resident already.
            with mmap.mmap(-1, 60 * 2**20) as held:
                held[:: mmap.PAGESIZE] = b"x" * (len(held) // mmap.PAGESIZE)
        case "dies":
            os.kill(os.getpid(), signal.SIGUSR2)


def test_the_harness_tells_what_a_reader_must_not_do(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = fuzz("harness")
    monkeypatch.setattr(harness, "WAITS", 10)
    labels = ["fine", "refused", "raises", "computes", "waits", "holds", "asks", "dies", "fine"]

    def make(_: random.Random, number: int) -> Any:
        return harness.Case(labels[number], labels[number].encode())

    found = harness.run(make, misbehave, cases=len(labels), limit_s=0.2, save=tmp_path)
    assert (found.cases, found.accepted, found.refused) == (9, 3, 1)
    assert 55 * 2**20 < found.peak_bytes < 100 * 2**20
    said = {failure.label: failure.what for failure in found.failures}
    assert said.keys() == {"raises", "computes", "waits", "asks", "dies"}
    for label, what in (
        ("raises", "ValueError: odd"),
        ("computes", "longer than 0.2 s"),
        ("waits", "does not end"),
        ("asks", "MemoryError"),
        ("dies", "SIGUSR2"),
    ):
        assert what in said[label]
    assert all(failure.saved.read_bytes() == failure.label.encode() for failure in found.failures)
