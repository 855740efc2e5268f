"""Runs in bad company: signals, launchers, other processes, options that change, memory that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.base.memory import out_of_memory
from distmatch.cli.main import VERBS
from distmatch.cli.surroundings import TOGETHER, Lossy
from distmatch.report.log import read_log
from distmatch.training.checkpoint import load_checkpoint
from distmatch.training.runfolder import create
from distmatch.training.teacher import TeacherTraining
from distmatch.training.toml import to_toml
from tests.helpers.command import TINY, checkpoints, command, contents, done, weights
from tests.helpers.wrong_inputs import refused

SHORT = f"train {TINY} --batch 16 --log-every 1 --checkpoint-every 2 --label-dropout 0"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a teacher that was never shown a sample without its label."""
    folder = tmp_path_factory.mktemp("runs") / "t"
    done(f"{SHORT} --steps 4 --out {folder}")
    return folder


@pytest.fixture
def run(teacher: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    subprocess.run(["cp", "-r", str(teacher), str(tmp_path / "t")], check=True)
    return tmp_path / "t"


def test_what_changes_on_resume_is_written_down(run: Path) -> None:
    environment = (run / "env.json").read_bytes()
    done(f"train --out {run} --resume --steps 6 --lr 0.005")
    done(f"train --out {run} --resume --steps 8 --log-every 2")
    assert (run / "env.json").read_bytes() == environment  # it is that of the beginning
    lines = (run / "config.toml").read_text().splitlines()
    assert lines[0] == "# until step 4: run.steps = 4, teacher.lr = 0.001"
    assert lines[1] == "# until step 6: run.steps = 6"
    assert "lr = 0.005" in lines
    resumes = [event for event in read_log(run / "log.jsonl") if event["event"] == "resume"]
    assert [event["step"] for event in resumes] == [4, 6]
    assert resumes[0]["changed"] == {"run.steps": [4, 6], "teacher.lr": [0.001, 0.005]}
    assert resumes[1]["environment"]["packages"]["torch"] == torch.__version__


def test_a_resume_that_changes_nothing_leaves_the_config_alone(run: Path) -> None:
    (run / "config.toml").write_text("# mine\n" + (run / "config.toml").read_text())
    before = (run / "config.toml").read_bytes()
    done(f"train --out {run} --resume --device cpu")
    assert (run / "config.toml").read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TeacherTraining.step

    def signalled(self: Any, state: Any, batch: Any) -> Any:
        if state.step == 2:
            signal.raise_signal(number)
        return step(self, state, batch)

    before = signal.getsignal(number)
    monkeypatch.setattr(TeacherTraining, "step", signalled)
    answer = command(f"{SHORT} --checkpoint-every 100 --steps 9 --out {tmp_path}/run")
    assert answer.code == code
    assert "--resume" in answer.err
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] == 3


def test_sigterm_outside_of_the_loop_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("distmatch.training.prepare_teacher.prepare_training", stopped)
    assert command(f"{SHORT} --out {tmp_path}/run").code == 143
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("doctor", *TOGETHER)])
def test_several_processes_are_refused_once(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, messages in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        answer = command(f"{verb} --out new")
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", messages)
    assert contents(tmp_path) == {}
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert "several processes" not in command(f"{verb} --no-such-option").err


@pytest.mark.slow
def test_closed_streams_and_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """The closed descriptors must not be given to a file of the run, and the end must not fail."""
    place = os.fsencode(tmp_path) + b"/run-\xff"
    line = [sys.executable.encode(), b"-m", b"distmatch", *SHORT.encode().split(), b"--steps", b"2"]
    script = b'exec "$@" >&- 2>&- <&-'
    assert subprocess.run([b"sh", b"-c", script, b"sh", *line, b"--out", place]).returncode == 0
    events = [json.loads(text) for text in Path(os.fsdecode(place), "log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end"
    assert weights(os.fsdecode(place))


def test_a_reader_of_stderr_that_leaves_ends_nothing() -> None:
    reader, writer = os.pipe()
    with open(writer, "w", buffering=1) as plain:
        stream = Lossy(plain)
        print("read", file=stream, flush=True)
        assert os.read(reader, 10) == b"read\n"
        os.close(reader)
        for _ in range(3):
            print("lost", file=stream, flush=True)
        assert not stream.isatty()


def test_names_that_have_no_form_in_a_config_are_refused(tmp_path: Path) -> None:
    refused(f"{SHORT} --data ring8 --device \udcff --out {tmp_path}/new")
    assert contents(tmp_path) == {}
    with pytest.raises(UserError, match="surrogate"):
        to_toml({"data": "a\udcff"})


def test_a_folder_in_use_is_said_to_be_in_use(run: Path, tmp_path: Path) -> None:
    with create(tmp_path / "new") as held:
        (held.path / "config.toml").write_text("")
        for folder in (held.path,):
            refused(f"{SHORT} --out {folder}", "another process is writing", str(os.getpid()))
    refused(f"{SHORT} --out {run}", "is not empty", "--overwrite")


@pytest.mark.parametrize(
    "name", ["model", "model/notes.txt", "checkpoints", "log.jsonl", "metrics.json", ".lock"]
)
def test_what_is_in_the_way_is_found_before_the_first_step(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherTraining, "step", None)  # no step is made
    place = run / name
    subprocess.run(["rm", "-rf", str(place)], check=True)
    if place.suffix in (".jsonl", ".json") or name == ".lock":
        place.mkdir()
    else:
        place.write_text("somebody's own")
    before = contents(run)
    refused(f"train --out {run} --resume --steps 8", "Fix: ")
    assert contents(run) == before


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": ' + "1" * 5000 + "}", "\xff", '{"format": NaN}'])
def test_a_hostile_newest_state_falls_back_to_the_older_checkpoint(text: str, run: Path) -> None:
    assert checkpoints(run) == ["step-000002", "step-000004"]
    (run / "checkpoints/step-000004/state.json").write_bytes(text.encode("latin1"))
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        assert load_checkpoint(run / "checkpoints")[0] == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3000000000 bytes."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 3 GiB"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch.so: failed to map segment from shared object"),
    ],
)
def test_full_memory_is_one_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    message = out_of_memory(error)
    assert message is not None
    assert "does not fit into memory" in str(message)
    assert "free" in str(message)

    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("distmatch.cli.doctor.run", fail)
    answer = command("doctor")
    assert answer.code == 2
    assert "does not fit into memory" in answer.err


def test_full_memory_names_sizes_and_nothing_else_is_taken_for_it() -> None:
    found = out_of_memory(RuntimeError("can't allocate memory: you tried to allocate 3000000000 bytes"))
    assert "2.79 GiB requested at once" in str(found)
    for other in (RuntimeError("shapes do not match"), OSError(28, "No space left"), ValueError("memory")):
        assert out_of_memory(other) is None


def test_too_few_steps_for_a_student_are_refused(run: Path, tmp_path: Path) -> None:
    line = f"distill --teacher {run} --batch 16 --out {tmp_path}/s"
    refused(f"{line} --steps 3", "would never be updated", "at least 5 steps")
    refused(f"{line} --steps 7 --warmup-steps 5", "at least 10 steps")
    assert not (tmp_path / "s").exists()


def test_guidance_without_a_null_class_is_refused_before_training(run: Path, tmp_path: Path) -> None:
    word = "with an unconditional prediction"
    refused(f"distill --teacher {run} --guidance 2 --batch 16 --steps 10 --out {tmp_path}/s", word)
    refused(f"sample {run} --guidance 2 --n 4 --out {tmp_path}/x.npz", word)
    refused(f"evaluate {run} --guidance 2", word)
    assert not (tmp_path / "s").exists()

    from distmatch.training.options import DistillOptions
    from distmatch.training.prepare import prepare_distillation

    class Strict:
        """A network whose embedding has no row for "none"."""

        shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 3, 1.0, 0.002, 20.0

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
            return x + torch.nn.functional.embedding(conditioning["label"], torch.zeros(3, 2))

    options = DistillOptions.of("diff-instruct")
    guided = replace(options, settings=replace(options.settings, guidance=2.0))
    with pytest.raises(ValueError, match=word):
        prepare_distillation(guided, Strict())


def test_inputs_that_are_pipes_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.npz")
    os.symlink("/dev/zero", "zero.npz")
    Path("model").mkdir()
    os.mkfifo("model/config.json")
    Path("run").mkdir()
    os.mkfifo("run/log.jsonl")
    os.mkfifo("run/config.toml")
    np.savez("a.npz", x=np.zeros((4, 2), np.float32))
    for line in (
        f"train {TINY} --data pipe.npz --out new",
        f"train {TINY} --data zero.npz --out new",
        "train --config pipe.npz --out new",
        "evaluate pipe.npz --data a.npz",
        "evaluate a.npz --data zero.npz",
        "sample model --n 2 --out b.npz",
        "sample pipe.npz --n 2 --out b.npz",
        "distill --teacher zero.npz --out new",
        "distill --teacher model --out new",
        "report run",
        "report pipe.npz",
        "export model --out new",
        "compare --methods dmd2 --teacher pipe.npz --out new",
        "train --out run --resume",
    ):
        refused(line)
