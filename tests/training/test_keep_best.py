"""--keep-best and --result best: the checkpoint that the watch found best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.training.checkpoint import list_checkpoints, load_checkpoint
from distmatch.training.watch import Watch
from distmatch.training.watch_options import WatchOptions
from tests.helpers.small import PAIR
from tests.helpers.watching import GRID, SMALL, events, resumed, watched

BEST: dict[str, Any] = {**SMALL, "steps": 12, "keep": 1, "watch_every": 2, "watch_grid": GRID}


def fake_energy(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Replaces a measurement by chosen values."""
    look = Watch._judge

    def judged(self: Watch, step: int, found: dict[str, float]) -> list[str]:
        found["energy"] = values.get(step, 1.0)
        return look(self, step, found)

    monkeypatch.setattr(Watch, "_judge", judged)


def test_the_best_checkpoint_stays_besides_the_newest(tmp_path, monkeypatch):
    fake_energy(monkeypatch, {2: 0.5, 6: 0.2, 8: 0.3, 10: 0.25})  # 6 is no multiple of --checkpoint-every
    out = tmp_path / "run"
    student = dm.distill(PAIR, out=out, keep_best="energy", **BEST)
    assert list(list_checkpoints(out / "checkpoints")) == [6, 12]
    assert load_checkpoint(out / "checkpoints")[1]["watch"]["looks"][6] == 0.2
    assert_equal(student, load_average(out, 12))


def assert_equal(student: Any, tree: dict[str, Tensor]) -> None:
    own = student.denoiser.state_dict()
    assert own.keys() == tree.keys()
    assert all(torch.equal(own[name], tree[name]) for name in own)


def test_the_result_is_the_best_one_where_it_is_asked_for(tmp_path, monkeypatch):
    fake_energy(monkeypatch, {4: 0.2})
    out = tmp_path / "run"
    student = dm.distill(PAIR, out=out, keep_best="energy", result="best", **BEST)
    assert_equal(student, load_checkpoint(out / "checkpoints", 4)[1]["modules"]["average"])
    assert_equal(
        dm.Student.from_pretrained(out), load_checkpoint(out / "checkpoints", 4)[1]["modules"]["average"]
    )
    (end,) = events(out, "end")
    assert (end["step"], end["steps"], end["result_of"]) == (12, 12, 4)


def test_the_model_of_a_finished_run_can_be_replaced_by_the_best_one(tmp_path, monkeypatch):
    fake_energy(monkeypatch, {6: 0.2})
    out = tmp_path / "run"
    dm.distill(PAIR, out=out, keep_best="energy", **BEST)
    assert_equal(resumed(out, "latest", result="best"), load_average(out, 6))
    assert_equal(dm.Student.from_pretrained(out), load_average(out, 6))
    assert_equal(resumed(out, "latest"), load_average(out, 12))


def load_average(out: Path, step: int) -> dict[str, Tensor]:
    tree: dict[str, Tensor] = load_checkpoint(out / "checkpoints", step)[1]["modules"]["average"]
    return tree


def test_the_best_one_is_remembered_when_a_run_is_resumed(tmp_path, monkeypatch):
    fake_energy(monkeypatch, {2: 0.2, 6: 0.5, 10: 0.3})
    out = tmp_path / "run"
    dm.distill(PAIR, out=out, keep_best="energy", **{**BEST, "steps": 8})
    assert list(list_checkpoints(out / "checkpoints")) == [2, 8]
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("steps = 8\n", "steps = 12\n", 1))
    (out / "log.jsonl").write_text("{damaged")  # nothing is read from it
    resumed(out, "latest")
    assert list(list_checkpoints(out / "checkpoints")) == [2, 12]


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path, monkeypatch):
    import shutil

    fake_energy(monkeypatch, {2: 0.2, 10: 0.6})
    out = tmp_path / "run"
    dm.distill(PAIR, out=out, keep_best="energy", **{**BEST, "steps": 8})
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("steps = 8\n", "steps = 12\n", 1))
    shutil.rmtree(out / "checkpoints" / "step-000002")
    resumed(out, "latest")
    assert list(list_checkpoints(out / "checkpoints")) == [10, 12]


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_model(tmp_path, monkeypatch):
    fake_energy(monkeypatch, {2: 0.2})
    out = tmp_path / "run"
    dm.distill(PAIR, out=out, keep_best="energy", **{**BEST, "steps": 8})
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("steps = 8\n", "steps = 12\n", 1))
    file = out / "checkpoints" / "step-000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="the model is that of the last step"):
        student = resumed(out, "latest", result="best")
    assert_equal(student, load_average(out, 12))


def test_diversity_is_best_where_it_is_that_of_the_teacher(tmp_path):
    _, watch = watched()
    watch.options = WatchOptions(watch_every=5, keep_best="diversity")
    for step, value in ((5, 0.5), (10, 1.2), (15, 1.3), (20, 0.9)):
        watch._judge(step, {"diversity": value})
    assert watch.best_step == 20
    watch._judge(25, {"diversity": float("nan")})
    assert watch.best_step == 20
    again = watched()[1]
    again.options = watch.options
    again.load_state_dict(watch.state_dict(), [5, 10, 15, 25])
    assert again.best_step == 10  # of those that are still there
    again.options = WatchOptions(watch_every=5, keep_best="vendi")
    again.load_state_dict(watch.state_dict(), [5, 10, 15, 20])
    assert again.best_step is None  # another measurement
