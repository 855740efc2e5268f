"""Ctrl-C and kill -9: a run goes on from where it was, to the same weights bit for bit."""

from __future__ import annotations

import random
import runpy
import signal
import time
from pathlib import Path

import pytest

from distmatch.cli.parse import Place
from distmatch.training.checkpoint import load_checkpoint
from tests.helpers.command import TINY, checkpoints, command, contents, done, weights
from tests.helpers.processes import Forked

# The full study with 20 kills of each verb is the program itself: python benchmarks/kill9.py
KILL9 = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kill9.py"))
DISTILL = f"distill {TINY} --fit-steps 20 --fake-score-steps 1"
FREQUENT = "--batch 32 --log-every 1 --checkpoint-every 5"


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [("train", signal.SIGINT, 130), pytest.param("distill", signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_leaves_a_run_that_goes_on(
    verb: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """It arrives at an arbitrary step; the step is finished, saved and announced."""
    steps = 300 if verb == "train" else 100
    start = f"train {TINY}" if verb == "train" else f"{DISTILL} --teacher ring8"
    line = f"{start} --batch 32 --log-every 1 --steps {steps}"
    run = KILL9["Run"](line.split(), tmp_path / "run", Forked)
    process = run.begin()
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    text = errors.decode()
    assert "Traceback" not in text
    step, _ = load_checkpoint(tmp_path / "run" / "checkpoints")
    fix = f"continue from step {step} with: distmatch {verb} --resume --out {tmp_path}/run"
    assert text.splitlines()[-1] == f"distmatch {verb}: interrupted; {fix}"
    assert 0 < step < steps
    assert [e["step"] for e in run.events() if e["event"] == "train"][-1] == step
    assert checkpoints(tmp_path / "run") == [f"step-{step:06d}"]
    assert not (tmp_path / "run" / "model").exists()

    # In processes of their own, as the first part was: what other tests imported may add in another order.
    for rest in (f"{verb} --out {tmp_path}/run --resume", f"{line} --out {tmp_path}/whole"):
        process = Forked(rest.split())
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("verb", ["train", "distill", "compare", "demo"])
def test_without_a_run_there_is_nothing_to_resume(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the folder is begun, and before the first checkpoint."""
    from distmatch.cli import compare, demo, distill, running, train

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module = {"train": train, "distill": distill, "compare": compare, "demo": demo}[verb]
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", stop)
        found = command(f"{verb} --out {tmp_path}/run --json")
    assert found.code == 130
    assert found.json()["error"] == {"what": "interrupted; no run was written"}
    assert contents(tmp_path) == {}

    place = Place(out=tmp_path / "a run")
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / ".lock").touch()
    for held in ("", f"; continue with: distmatch {verb} --resume --out '{tmp_path}/a run'"):
        with pytest.raises(KeyboardInterrupt) as error, running.going_on(verb, place):
            raise KeyboardInterrupt
        assert "; ".join(["", *error.value.args]) == held
        (tmp_path / "a run" / "config.toml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyboardInterrupt) as error, running.going_on(verb, place):
        raise KeyboardInterrupt
    start = "torchrun --nproc-per-node 2 -- $(which distmatch)"
    assert error.value.args == (f"continue with: {start} {verb} --resume --out '{tmp_path}/a run'",)


def test_a_demo_goes_on_with_its_options(tmp_path: Path) -> None:
    from distmatch.cli.running import going_on

    (tmp_path / "teacher").mkdir()
    options = ["--fast", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt) as error, going_on("demo", Place(out=tmp_path), options):
        raise KeyboardInterrupt
    assert error.value.args == (f"continue with: distmatch demo --resume --fast --out {tmp_path}",)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one waits for the step to end; the second one interrupts even a step that never ends."""
    from distmatch.training.teacher import TeacherTraining

    def endless(*_: object) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(TeacherTraining, "step", endless)
    before = signal.getsignal(signal.SIGINT)
    answer = command(f"train {TINY} {FREQUENT} --steps 9 --out {tmp_path}/run")
    assert answer.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("moments", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(moments: int, tmp_path: Path) -> None:
    start = f"{DISTILL} --teacher skewed2 {FREQUENT} --steps {30 + 30 * moments}"
    *kills, equal = KILL9["study"](start.split(), tmp_path, moments, random.Random(4), Forked)
    assert len(kills) == moments
    assert all(kill.step - kill.checkpoint <= 6 for kill in kills)
    assert equal is True


def test_the_study_would_see_a_difference(tmp_path: Path) -> None:
    """A resume that forgets the random stream ends elsewhere: the comparison above is not empty."""
    line = f"train {TINY} {FREQUENT} --lr-decay constant"
    done(f"{line} --steps 10 --out {tmp_path}/whole")
    done(f"{line} --steps 5 --out {tmp_path}/run")
    step, tree = load_checkpoint(tmp_path / "run" / "checkpoints")
    tree["generator"] = load_checkpoint(tmp_path / "whole" / "checkpoints")[1]["generator"]
    from distmatch.training.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "run" / "checkpoints", step, tree)
    done(f"train --out {tmp_path}/run --resume --steps 10")
    assert weights(tmp_path / "run") != weights(tmp_path / "whole")
