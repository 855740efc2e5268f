"""`compare` in two processes: every run is trained by both, and the numbers are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distmatch.cli.main import main
from tests.cli.test_processes import TRAIN, distance, launch

LINE = (
    "compare --teacher {} --methods sid --budget 4steps --seeds 1 --batch 32 --n 40 "
    "--features pixels --fake-score-steps 1 --eval-steps 4 --checkpoint-every 100"
)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def values(entries: dict[str, Any]) -> dict[str, float]:
    speed = ("nfe", "seconds_per_1000")
    return {
        name: entry["value"]
        for name, entry in entries.items()
        if name not in speed and isinstance(entry, dict) and entry["value"] is not None
    }


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert main([*TRAIN.split(), "--out", str(folder)]) == 0
    return LINE.format(folder)


@pytest.mark.slow
def test_two_processes_compare_as_one_does(line: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*line.split(), "--out", str(one)]) == 0
    first, second = launch(tmp_path / "launch", f"{line} --out {two}")
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert "report:" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    mine, theirs = record(two), record(one)
    assert values(mine["teacher"]) == pytest.approx(values(theirs["teacher"]), rel=1e-6)
    for run, other in zip(mine["runs"], theirs["runs"], strict=True):
        assert (run["status"], other["status"]) == ("done", "done")
        # Weights differ by rounding, which a few steps enlarge.
        assert distance(two / run["folder"], one / other["folder"]) < 1e-4
        assert values(run["metrics"]) == pytest.approx(values(other["metrics"]), rel=1e-3, abs=1e-3)
    for a, b in zip(mine["methods"], theirs["methods"], strict=True):
        assert a["calls_per_step"] == pytest.approx(b["calls_per_step"])
    files = [{str(f.relative_to(at)) for f in at.rglob("*") if f.is_file()} for at in (one, two)]
    assert files[0] == files[1]
    assert load_file(two / mine["runs"][0]["folder"] / "replicates.safetensors")


def test_a_batch_that_cannot_be_shared_out_is_refused(line: str, tmp_path: Path) -> None:
    line = line.replace("--batch 32", "--batch 33")
    first, second = launch(tmp_path / "launch", f"{line} --out {tmp_path}/odd")
    assert (first["code"], second["code"]) == (2, 2)
    assert "multiple of 2" in first["err"]
    assert second["err"] == ""
    assert not (tmp_path / "odd").exists()
