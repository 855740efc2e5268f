"""What a run survives, in short form: python benchmarks/faults/run.py injects the whole list."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmatch.base.errors import UserError
from distmatch.cli import processes
from distmatch.cli.main import main
from distmatch.cli.memory import memory_error
from distmatch.cli.surroundings import launched_as
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.memory import predict_memory
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.processes import check_launch
from distmatch.training.teacher import TeacherTraining
from tests.cli.test_processes import TRAIN, distance
from tests.helpers.command import TINY, command, done
from tests.helpers.processes import together
from tests.helpers.store_group import backend

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.slow
def test_full_memory_names_what_helps_and_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_net(DiTConfig(width=64, depth=1, heads=4), (1, 8, 8), 10)
    teacher = EDMDenoiser(net, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).eval()
    options = DistillOptions.of("f-distill")
    options = replace(options, run=replace(options.run, batch=16, steps=20, device="cpu"))
    predict = cache(lambda wanted: predict_memory(wanted, teacher))  # equal options take the same
    monkeypatch.setattr("distmatch.cli.memory.predict_memory", lambda wanted, _: predict(wanted))
    message = str(memory_error(FULL, options, {"teacher": teacher}))
    now = predict(options).peak
    lora = replace(options, settings=replace(options.settings, train="lora"))
    for name, changed in (
        ("--batch 8", replace(options, run=replace(options.run, batch=8))),
        ("--train lora", lora),
        ("--checkpointing", replace(options, settings=replace(options.settings, checkpointing=True))),
    ):
        saved = now - predict(changed).peak
        assert saved > 0
        assert f"{name} saves {saved / 2**20:,.1f} MiB of {now / 2**20:,.1f} MiB" in message
    assert "--train lora" not in str(memory_error(FULL, lora, {}))
    assert "--train lora" in str(memory_error(FULL, options, {}))


def test_full_memory_of_a_teacher_names_what_helps() -> None:
    assert "--batch 128" in str(memory_error(FULL, TrainOptions(), {}))
    assert memory_error(ValueError("other"), TrainOptions(), {}) is None


LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"RANK": "2"}, "RANK=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT=port"),
        ({"RANK": "x", "MASTER_ADDR": ""}, "RANK=x"),
        ({"DISTMATCH_TIMEOUT": "soon"}, "^DISTMATCH_TIMEOUT is no length of time"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(changes: dict[str, str], message: str) -> None:
    assert check_launch(LAUNCH)
    with pytest.raises(UserError, match=message):
        check_launch(LAUNCH | changes)


def test_processes_of_mpirun_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was alone before: the first one trained by itself, and the others found its folder in the way."""
    assert not check_launch({})
    assert not check_launch(MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"})
    with pytest.raises(UserError, match="mpirun"):
        check_launch(MPIRUN)
    assert check_launch(MPIRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    for rank, lines in (("0", 1), ("1", 0)):
        for name, value in (MPIRUN | {"OMPI_COMM_WORLD_RANK": rank}).items():
            monkeypatch.setitem(os.environ, name, value)
        answer = command("train --data ring8 --out nowhere")
        assert (answer.code, answer.err.count("\n")) == (2, lines)


@pytest.mark.parametrize(
    ("verb", "rank", "said"),
    [
        ("train", {"RANK": "3"}, "(process 3): the environment of this launch contradicts itself"),
        ("train", {"RANK": "1", "WORLD_SIZE": ""}, "no WORLD_SIZE"),
        ("train", {"RANK": "1", "MASTER_PORT": "0"}, ""),  # process 0 says it
        ("train", {"RANK": "1", "DISTMATCH_TIMEOUT": "-1"}, ""),
        ("doctor", {}, "doctor runs in one process"),
        ("doctor", {"RANK": "1"}, ""),
        ("trian", {}, "did you mean train"),
    ],
)
def test_what_concerns_all_is_said_by_the_first_one_alone(
    verb: str, rank: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (LAUNCH | rank).items():
        monkeypatch.setitem(os.environ, name, value)
    answer = command(f"{verb} --seed 0")
    assert (answer.code, answer.err.count("\n")) == (2, 1 if said else 0)
    assert said in answer.err


def test_the_command_that_continues_has_its_launcher() -> None:
    assert launched_as({}) == "distmatch"
    assert launched_as(LAUNCH) == "torchrun --nproc-per-node 2 -- $(which distmatch)"
    four = LAUNCH | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:" in launched_as(four)
    assert "--nproc-per-node 2 --" in launched_as(four)


def without_memory(rank: int, size: int, folder: str, line: str) -> None:
    """One of several processes; the last one has no memory for the fifth step."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    processes._PATIENCE = 0.5
    limit, store = timedelta(seconds=8), f"file://{folder}/store"
    dist.init_process_group(backend(), init_method=store, rank=rank, world_size=size, timeout=limit)
    step = TeacherTraining.step

    def with_fault(self: Any, state: Any, batch: Any) -> Any:
        if rank == size - 1 and state.step == 4:
            raise FULL
        return step(self, state, batch)

    TeacherTraining.step = with_fault  # type: ignore[method-assign]
    errors = Path(folder, f"errors-{rank}")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    code = main(line.split())
    Path(folder, f"answer-{rank}.json").write_text(json.dumps([code, errors.read_text()]))


@pytest.mark.slow
def test_one_of_two_has_no_memory(tmp_path: Path) -> None:
    """It says so, and which one it is; the other one ends without a message of its own; the run continues."""
    line = f"{TRAIN} --out {tmp_path}/run"
    together(without_memory, [(rank, 2, str(tmp_path), line) for rank in range(2)])
    (code, _), (its, text) = (json.loads((tmp_path / f"answer-{r}.json").read_text()) for r in range(2))
    assert (code, its) == (1, 2)
    said = "".join((tmp_path / f"errors-{rank}").read_text() for rank in range(2))
    assert said.count("distmatch train") == 1
    assert "distmatch train (process 1): this does not fit into memory" in text
    assert main(["train", "--resume", "--out", f"{tmp_path}/run"]) == 0
    assert main([*TRAIN.split(), "--out", f"{tmp_path}/whole"]) == 0
    assert distance(tmp_path / "run", tmp_path / "whole") < 1e-5


def test_killed_before_it_had_options(tmp_path: Path) -> None:
    """There is nothing to resume: without its options the run would be another one, that of the defaults."""
    (tmp_path / ".lock").write_text("distmatch run folder, process 1")
    (tmp_path / ".config.toml.x1.tmp").touch()
    answer = command(f"train --resume --out {tmp_path}")
    assert answer.code == 2
    assert "nothing to resume" in answer.err
    assert command(f"{TRAIN} --steps 1 --out {tmp_path}").code == 0


def test_a_complete_run_says_so_and_its_last_values(tmp_path: Path) -> None:
    line = f"train --data ring8 {TINY} --steps 3 --batch 32 --out {tmp_path}/run"
    first = done(f"{line} --json").json()
    again = done(f"train --resume --auto --json --out {tmp_path}/run").json()
    assert again["complete_before"]
    assert "complete_before" not in first
    assert again["last"] == first["last"]
    said = f"was complete already after 3 steps, loss {first['last']['loss']:.4f}"
    assert said in done(f"train --resume --out {tmp_path}/run").out


def test_a_store_killed_before_it_had_anything(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".unfinished.json.x1.tmp").touch()
    assert command(f"prepare digits --out {tmp_path}/store").code == 0
