"""Commands that several processes carry out together, as torchrun starts them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmatch.cli.main import main
from tests.helpers.processes import together
from tests.helpers.store_group import backend

TRAIN = "train --data digits --net mlp --width 32 --depth 2 --batch 32 --steps 6 --checkpoint-every 3"
TRAIN += " --watch-every 6 --watch-samples 50 --watch-grid 2 2"


def started(rank: int, size: int, folder: str, line: str, others: str = "") -> None:
    """One of several processes with a command line; what it answers is in ``out-RANK.json``."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group(backend(), init_method=f"file://{folder}/store", rank=rank, world_size=size)
    streams = {name: Path(folder, f"{name}-{rank}") for name in ("out", "err")}
    for number, file in enumerate(streams.values(), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    code = main((others if rank and others else line).split())
    answer = {name: file.read_text() for name, file in streams.items()}
    Path(folder, f"answer-{rank}.json").write_text(json.dumps({"code": code, **answer}))


def launch(
    folder: Path, line: str, others: str = "", size: int = 2, start: Callable[..., None] = started
) -> list[dict[str, Any]]:
    """What each of the processes answers: its exit code and streams."""
    folder.mkdir()
    together(start, [(rank, size, str(folder), line, others) for rank in range(size)])
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run ``one`` of one process, and the same run ``two`` of two."""
    place = tmp_path_factory.mktemp("teachers")
    assert main([*TRAIN.split(), "--out", str(place / "one")]) == 0
    first, second = launch(place / "launch", f"{TRAIN} --out {place}/two")
    assert (first["code"], second["code"]) == (0, 0)
    assert "teacher in" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    return place


def distance(one: Path, other: Path) -> float:
    """The largest relative difference of a tensor of two models."""
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return max(float((mine[k] - theirs[k]).norm() / theirs[k].norm().clamp_min(1e-9)) for k in theirs)


def test_two_processes_train_the_teacher_of_one(teachers: Path) -> None:
    assert distance(teachers / "two", teachers / "one") < 1e-5
    one, two = (
        [json.loads(line) for line in (teachers / run / "log.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [event["event"] for event in one] == [event["event"] for event in two]
    mine, theirs = ([event for event in log if event["event"] == "watch"] for log in (one, two))
    assert [event["fd"] for event in theirs] == pytest.approx([event["fd"] for event in mine], rel=1e-3)
    assert {(event["step"], event["n"]) for event in mine} == {(0, 25), (6, 25)}


def test_a_student_too_and_one_process_goes_on_where_two_stopped(teachers: Path) -> None:
    line = f"distill --teacher {teachers}/one --batch 32 --steps 8 --fake-score-steps 2 "
    line += "--checkpoint-every 4 --watch-every 4 --watch-samples 48"
    assert main([*line.split(), "--out", str(teachers / "alone")]) == 0
    shorter = line.replace("--steps 8", "--steps 4")
    first, second = launch(teachers / "launch2", f"{shorter} --out {teachers}/both")
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert main(["distill", "--resume", "--out", str(teachers / "both"), "--steps", "8"]) == 0
    assert distance(teachers / "both", teachers / "alone") < 1e-5


@pytest.mark.slow
def test_one_process_goes_on_with_a_student_whose_weights_two_had_shared_out(teachers: Path) -> None:
    line = f"distill --teacher {teachers}/one --batch 32 --steps 6 --fake-score-steps 2 --train lora "
    line += "--checkpoint-every 2"
    assert main([*line.split(), "--out", str(teachers / "whole")]) == 0
    shorter = f"{line.replace('--steps 6', '--steps 4')} --parallel fsdp2 --out {teachers}/shared"
    first, second = launch(teachers / "launch3", shorter)
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    newest = teachers / "shared" / "checkpoints" / "step-000004"
    assert len(list((newest / "shards").iterdir())) == 2
    with open(newest / "shards" / "shard-00002-model-00001-of-00001.safetensors", "ab") as file:
        file.write(b" ")  # damaged: the one before is used
    assert main(["distill", "--resume", "--out", str(teachers / "shared"), "--steps", "6"]) == 0
    mine, theirs = (
        load_file(teachers / run / "model" / "adapter_model.safetensors") for run in ("shared", "whole")
    )
    difference = torch.cat([(mine[k] - theirs[k]).flatten() for k in theirs]).norm()
    assert float(difference / torch.cat([t.flatten() for t in theirs.values()]).norm()) < 1e-4


def test_a_dry_run_is_shown_once(teachers: Path, tmp_path: Path) -> None:
    line = f"distill --teacher {teachers}/one --batch 32 --steps 6 --fake-score-steps 2 --parallel fsdp2"
    first, second = launch(tmp_path / "launch", f"{line} --dry-run --json")
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    shown = json.loads(first["out"])
    assert shown["sizes"]["student"]["weights"] < 4 * shown["parameters"]["student"]
    assert second["out"] == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TRAIN.replace("--batch 32", "--batch 33"), "multiple of 2"),
        ("train --dta digits", "did you mean --data"),
        ("distill --teacher nowhere", "nowhere"),
        ("report somewhere", "in one process"),
        (f"{TRAIN} --parallel hybrid --shard-size 3", "groups of 3"),
        (f"{TRAIN} --parallel fsdp2 --compile", "--parallel ddp"),
    ],
)
def test_a_mistake_is_said_once(tmp_path: Path, line: str, message: str) -> None:
    first, second = launch(tmp_path / "launch", f"{line} --out {tmp_path}/new")
    assert (first["code"], second["code"]) == (2, 2)
    assert message in first["err"]
    assert first["err"].count("\n") == 1
    assert (second["out"], second["err"]) == ("", "")
    assert not (tmp_path / "new").exists()


def test_other_options_in_a_process_are_refused_by_all(tmp_path: Path) -> None:
    line = f"{TRAIN} --out {tmp_path}/new"
    first, second = launch(tmp_path / "launch", line, line.replace("--width 32", "--width 16"))
    assert (first["code"], second["code"]) == (2, 2)
    assert "the same options and versions" in first["err"]
    assert "process 1" in first["err"]
    assert second["err"] == ""
    assert not (tmp_path / "new").exists()


def test_a_mistake_of_one_process_is_said_by_it(tmp_path: Path) -> None:
    line = f"{TRAIN} --out {tmp_path}/new"
    first, second = launch(tmp_path / "launch", "train --help", f"{line} --no-such-option")
    assert (first["code"], second["code"]) == (0, 2)
    assert "(process 1)" in second["err"]


def test_sharing_out_needs_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), "--parallel", "fsdp2", "--out", str(tmp_path / "new")]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
