"""What a run survives, in short form: python benchmarks/faults/run.py injects the whole list."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.cli.memory import memory_error
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.memory import predict_memory
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.processes import check_launch
from tests.helpers.command import command

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_full_memory_names_what_helps_and_how_much() -> None:
    net = build_net(DiTConfig(width=64, depth=3, heads=4), (1, 8, 8), 10)
    teacher = EDMDenoiser(net, shape=(1, 8, 8), num_classes=10, sigma_data=0.5).eval()
    options = DistillOptions.of("f-distill")
    options = replace(options, run=replace(options.run, batch=16, steps=20, device="cpu"))
    message = str(memory_error(FULL, options, {"teacher": teacher}))
    now = predict_memory(options, teacher).peak
    lora = replace(options, settings=replace(options.settings, train="lora"))
    for name, changed in (
        ("--batch 8", replace(options, run=replace(options.run, batch=8))),
        ("--train lora", lora),
        ("--checkpointing", replace(options, settings=replace(options.settings, checkpointing=True))),
    ):
        saved = now - predict_memory(changed, teacher).peak
        assert saved > 0
        assert f"{name} saves {saved / 2**20:,.1f} MiB of {now / 2**20:,.1f} MiB" in message
    assert "--train lora" not in str(memory_error(FULL, lora, {"teacher": teacher}))


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
