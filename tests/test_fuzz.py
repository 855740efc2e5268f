"""A short form of the fuzzing of benchmarks/fuzz: the same cases every time, and what it found before."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from distmatch.base.errors import UserError
from distmatch.training.options import TrainOptions
from distmatch.training.toml import dict_to_dataclass

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
        dict_to_dataclass(TrainOptions, {"teacher": {"lr": 10**400}})
