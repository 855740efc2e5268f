"""Trackers: what they have of a run is what its log has, each step once, whatever became of the run."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.report.log import read_log
from distmatch.training import trackers
from distmatch.training.log import EventLog
from distmatch.training.options import LoopOptions, RunOptions, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from distmatch.training.runfolder import RunFolder
from distmatch.training.runs import carry_out
from distmatch.training.trackers import Tracker, track_evaluation, tracking
from tests.helpers.trackers import Scalars, read_tensorboard, read_trackio, read_wandb

Read = Callable[[Path], tuple[Scalars, set[str]]]
READERS: dict[str, Read] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": lambda run: read_trackio(run.name),
}
# trackio 0.43 needs pillow below 13, and constraints.txt has 13.0: where it is installed, it is tested
NEEDS = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in READERS
}
EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS[name]) for name in READERS])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "trackio" not in sys.modules:  # it reads this once
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))
    for name in ("WANDB_DIR", "WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    run = RunFolder(tmp_path / f"run-{tmp_path.name}")
    monkeypatch.setenv("TRACKIO_PROJECT", run.path.name)
    with EventLog(run.log) as log:
        log.write("start", 0, kind="distill", parameters={"student": 5})
    return run


def write_pictures(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, x=np.zeros((6, 8, 8, 1), np.uint8))


def segment(run: RunFolder, name: str, steps: range, value: float = 1.0) -> None:
    """What a run logs: losses and a list at every step, and at every second one a watch with pictures."""
    with tracking(run, name) as follow, EventLog(run.log, follow) as log:
        for step in steps:
            if step % 2 == 0:
                write_pictures(run.watch / f"step-{step:06d}.npz")
                write_pictures(run.watch / "teacher.npz")
                log.write("watch", step, diversity=value, energy=float("nan"))
            log.write("train", step, loss=value * step, ratio_mean=[value, None, 3.0])


def logged(run: RunFolder) -> Scalars:
    """The same from the log, independently of what trackers get."""
    found: Scalars = {}
    for event in read_log(run.log):
        if event["event"] in ("train", "watch"):
            for key, value in event.items():
                each = value if isinstance(value, list) else [value]
                for index, number in enumerate(each):
                    path = f"{event['event']}/{key}" + (f"/{index}" if isinstance(value, list) else "")
                    if key not in ("event", "step", "time") and number is not None:
                        found.setdefault(path, {})[event["step"]] = [number]
    return found


def close(found: Scalars, expected: Scalars) -> bool:
    return found == {k: {s: pytest.approx(v, rel=1e-6) for s, v in e.items()} for k, e in expected.items()}


@EACH
def test_scalars_and_pictures_arrive_and_a_resumed_run_has_no_step_twice(
    name: str, folder: RunFolder
) -> None:
    segment(folder, name, range(4))
    found, pictures = READERS[name](folder.path)
    assert close(found, logged(folder))
    assert found["train/ratio_mean/2"][3] == [3.0]
    assert "train/ratio_mean/1" not in found
    assert pictures == {"watch/student@0", "watch/teacher@0", "watch/student@2"}

    with EventLog(folder.log) as log:  # steps 2 and 3 were killed before their checkpoint
        log.write("resume", 1)
    segment(folder, name, range(2, 6))
    found, pictures = READERS[name](folder.path)
    assert close(found, logged(folder))
    assert sorted(found["train/loss"]) == [0, 1, 2, 3, 4, 5]
    assert pictures == {"watch/student@0", "watch/teacher@0", "watch/student@2", "watch/student@4"}


@EACH
def test_a_tracker_gets_what_was_logged_without_it(name: str, folder: RunFolder) -> None:
    segment(folder, "", range(4))
    segment(folder, name, range(4, 5))
    assert close(READERS[name](folder.path)[0], logged(folder))


@EACH
def test_an_evaluation_arrives_at_the_last_step(name: str, folder: RunFolder) -> None:
    folder.config.write_text(f'format = 3\n\n[run]\ntrack = "{name}"\n')
    segment(folder, name, range(3))
    folder.metrics.write_text('{"student": {"nfe": 1, "fd": {"value": 2.5, "stderr": 0.5}}}')
    folder.samples.mkdir()
    write_pictures(folder.samples / "student.npz")
    for _ in range(2):
        with EventLog(folder.log) as log:
            log.write("evaluate", None, n=100)
    track_evaluation(folder)
    found, pictures = READERS[name](folder.path)
    assert found["evaluate/student/fd/value"] == {2: [2.5]}
    assert found["evaluate/student/fd/stderr"] == {2: [0.5]}
    assert "samples/student@2" in pictures
    assert close({k: v for k, v in found.items() if not k.startswith("evaluate")}, logged(folder))


def test_tensorboard_holds_options_and_the_place_of_the_report(folder: RunFolder) -> None:
    folder.config.write_text('format = 3\n\n[run]\ntrack = "tensorboard"\nseed = 17\n')
    segment(folder, "tensorboard", range(1))
    content = b"".join(p.read_bytes() for p in (folder.path / "tensorboard").iterdir())
    assert b"run.seed = 17" in content
    assert folder.report.resolve().as_uri().encode() in content


def test_wandb_stays_on_this_machine_by_itself(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    segment(folder, "wandb", range(1))
    assert [
        p.name[:11] for p in (folder.path / "wandb").glob("*run-*") if p.is_dir() and not p.is_symlink()
    ] == ["offline-run"]


def test_a_tracker_that_fails_is_a_warning_and_ends_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []

    def fails(values: Any, step: int) -> None:
        if step == 2:
            raise OSError("no space left")
        got.append(step)

    monkeypatch.setitem(trackers._OPENERS, "wandb", lambda about: Tracker(fails, lambda: None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        segment(folder, "wandb,tensorboard", range(5))
    assert [str(w.message) for w in caught if "wandb" in str(w.message)] == [
        "wandb does not follow this run any more: OSError: no space left"
    ]
    assert got == [0, 0, 1]  # a watch and a training event at step 0
    assert close(read_tensorboard(folder.path)[0], logged(folder))
    assert [e["message"] for e in read_log(folder.log) if e["event"] == "warning"]


def test_a_tracker_that_does_not_open_is_a_warning(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(about: Any) -> Tracker:
        raise RuntimeError("no account")

    monkeypatch.setitem(trackers._OPENERS, "wandb", refuses)
    with pytest.warns(UserWarning, match="no account"):
        segment(folder, "wandb", range(2))
    assert len(read_log(folder.log)) == 5


def test_unknown_and_missing_trackers_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--track"):
        LoopOptions(track="tensorboard,mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    calls: list[Callable[[], Any]] = [
        lambda: dm.train("grid25", steps=2, out=out, track="wandb"),
        lambda: dm.distill("grid25", steps=2, out=out, track="wandb"),
        lambda: dm.compare("grid25", methods="dmd2,sid", budget="2 steps", out=out, track="wandb"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="wandb") as error:
            call()
        assert "pip install distmatch[trackers]" in str(error.value)
        assert not out.exists()


def test_a_verb_is_followed_and_notes_it_in_its_config(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"net": "mlp", "width": 16, "depth": 2, "batch": 32, "quiet": True}
    run = RunFolder(tmp_path / "run")
    dm.train("grid25", out=run.path, steps=6, log_every=2, track="tensorboard", **settings)
    found = read_tensorboard(run.path)[0]
    assert close(found, logged(run))
    assert sorted(found["train/loss"]) == [2, 4, 6]
    assert 'track = "tensorboard"' in run.config.read_text()


def test_only_the_first_process_opens_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setitem(
        trackers._OPENERS, "tensorboard", lambda about: opened.append(1) or Tracker(lambda v, s: None, int)
    )
    job = prepare_training(
        TrainOptions(data="grid25", run=RunOptions(steps=2, batch=32, track="tensorboard", device="cpu"))
    )
    others = Ranks(1, 2)
    monkeypatch.setattr("distmatch.training.loop.Saver", MagicMock())  # which forms a group of the others
    monkeypatch.setattr(type(others), "wait", lambda self: None)
    monkeypatch.setattr(type(others), "largest", lambda self, value: value)
    monkeypatch.setattr(type(others), "sum", lambda self, x: x)
    monkeypatch.setattr(type(others), "average_gradients", lambda self, parameters: None)
    for ranks, number in ((others, 0), (Ranks(), 1)):
        job.state.ranks = ranks
        run = RunFolder(tmp_path / str(number))
        with EventLog(run.log) as log:  # by the first process
            log.write("start", 0)
        carry_out(job, run)
        assert len(opened) == number
