"""What commands answer with `--json`: errors, warnings, and nothing else on stdout."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from distmatch.base.errors import UserError
from distmatch.base.memory import out_of_memory
from distmatch.cli import main, sample
from tests.helpers.command import TINY, command, done

NAMES = {"what": "", "got": "Got: ", "expected": "Expected: ", "fix": "Fix: "}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("evaluate absent --json", {"what", "expected", "fix"}),
        ("sample ring8 --json --sovler heun", {"what", "got", "fix"}),
        ("distill --teacher ring8 --method dmd3 --json", {"what", "got", "expected", "fix"}),
        ("train --json", {"what", "expected"}),
        ("trian --json", {"what", "got", "expected", "fix"}),
        ("train --json --out x --steps 0", {"what", "got", "fix"}),
    ],
)
def test_an_error_is_a_json_object_too(line: str, parts: set[str]) -> None:
    """On stdout in its parts, on stderr as without --json."""
    answer = command(line)
    found = answer.json()
    assert (answer.code, found["exit_code"]) == (2, 2)
    assert found["verb"] == line.split()[0]
    assert set(found["error"]) == parts
    message = answer.err.removeprefix(f"distmatch {found['verb']}: ")
    rest = message
    for name, text in found["error"].items():
        start, _, rest = rest.partition(text)
        assert re.fullmatch(rf"[. ]*{NAMES[name]}", start), (start, text)
    without = command(line.replace(" --json", ""))
    assert (without.out, without.err, without.code) == ("", answer.err, 2)


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (RuntimeError("no good"), 1, "internal error: RuntimeError: no good"),
        (KeyboardInterrupt(), 130, "interrupted; no incomplete file is left"),
        (MemoryError(), 2, str(out_of_memory(MemoryError()))[:10]),
        (PermissionError(13, "Permission denied", "a.npz"), 2, "cannot use a.npz"),
    ],
)
def test_other_ends_are_json_objects_too(
    error: BaseException, code: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(sample, "run", fails)
    answer = command("sample ring8 --json")
    found = answer.json()
    assert (answer.code, found["exit_code"]) == (code, code)
    assert found["error"]["what"].startswith(what)
    assert what in answer.err


def test_the_parts_of_an_error_make_its_message() -> None:
    error = UserError("this is wrong", got=3, expected="2", fix="take one away")
    assert error.parts == {"what": "this is wrong", "got": "3", "expected": "2", "fix": "take one away"}
    assert str(error) == "this is wrong. Got: 3. Expected: 2. Fix: take one away."
    assert UserError("is it?").parts == {"what": "is it?"}


def test_warnings_stand_in_the_json(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 17, (120, 8, 8)).astype("float32") / 16
    for name, labels in {"even": np.arange(120) % 10, "one": np.zeros(120, int)}.items():
        np.savez(tmp_path / f"{name}.npz", x=x, labels=labels)
    line = f"evaluate {tmp_path}/one.npz digits --features pixels --n 60"
    answer = done(f"{line} --json")
    warned = answer.json()["warnings"]
    assert any("class proportions" in text for text in warned)
    assert [f"warning: {text}" for text in warned] == answer.err.splitlines()
    assert set(done(line).err.splitlines()) == set(answer.err.splitlines())
    assert "class proportions" not in str(
        done(f"{line.replace('one', 'even')} --json").json().get("warnings")
    )


def test_a_dry_run_and_a_run_that_failed_say_what_they_warned_of(tmp_path: Path) -> None:
    line = f"distill --teacher ring8 {TINY} --fit-steps 5 --steps 6 --batch 32 --json"
    warned = done(f"{line} --dry-run").json()["warnings"]
    assert any("noise bin" in text for text in warned)
    answer = command(f"{line} --out {tmp_path}/run --lr 1e30")
    assert "nan" in answer.json()["error"]["what"]
    assert answer.json()["warnings"] == warned
    assert done(f"{line} --out {tmp_path}/other").json()["warnings"] == warned
    assert "warnings" not in done(f"train {TINY} --batch 32 --dry-run --json").json()


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_interrupted_commands_end_without_taking_the_interpreter_down(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an import left half-done could crash it; every other end is the usual one."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(main, "prepare_streams", lambda: None)
    monkeypatch.setattr(main, "main", lambda argv: code)
    with pytest.raises(SystemExit) as stop:
        main.entry()
    assert stop.value.code == code
    assert ended == [code] * (code > 2)
