"""The demo from end to end, and one that was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distmatch.cli import demo
from distmatch.methods.student import Student
from tests.helpers.command import METRICS, SPEED, command, contents, done, weights


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    whole = demo.recipe

    def recipe(options: demo.DemoOptions) -> tuple[demo.TrainOptions, demo.DistillOptions]:
        train, distill = whole(options)
        small = {"steps": 6, "batch": 32, "checkpoint_every": 3}
        net = replace(train.net, net="mlp", width=40, depth=1)
        return replace(train, run=replace(train.run, **small), net=net), replace(
            distill, run=replace(distill.run, **small)
        )

    monkeypatch.setattr(demo, "recipe", recipe)


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    answer = done(f"demo --fast --out {tmp_path}/demo --json").json()
    run = tmp_path / "demo"
    metrics = json.loads((run / "metrics.json").read_text())
    assert answer["metrics"] == metrics
    assert list(metrics) == ["reference", "teacher", "student"]
    for values in metrics.values():
        assert set(values) == METRICS | SPEED | {"label_accuracy", "class_distance"}
        for key in values.keys() - SPEED:
            assert set(values[key]) - {"warning"} == {"value", "stderr", "n", "features"}, values[key]
    assert [metrics[name]["nfe"] for name in metrics] == [None, 35, 1]
    files = {p.name for p in run.iterdir()} - {".lock"}
    assert files == {
        *("config.toml", "env.json", "log.jsonl", "metrics.json", "report.html"),
        *("checkpoints", "samples", "model", "teacher"),
    }
    assert {p.name for p in (run / "samples").iterdir()} == {
        f"{name}.{suffix}" for name in metrics for suffix in ("npz", "png")
    }
    assert (run / "teacher" / "model" / "model.safetensors").is_file()

    before = contents(tmp_path)
    assert command(f"demo --out {run}").code == 2
    assert contents(tmp_path) == before
    answer_text = done(f"demo --fast --out {run} --resume").out
    assert f"report: {run.resolve()}/report.html" in answer_text
    for name in ("model", "teacher/model"):
        key = f"demo/{name}/model.safetensors"
        assert contents(tmp_path)[key] == before[key]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_a_demo_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(f"demo --fast --out {tmp_path}/whole")

    def interrupted(*_: object) -> None:  # the student is trained and not yet saved
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Student, "save_pretrained", interrupted)
        assert command(f"demo --fast --out {tmp_path}/cut").code == 130
    assert not (tmp_path / "cut" / "model").exists()
    done(f"demo --fast --out {tmp_path}/cut --resume")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert weights(tmp_path / "cut/teacher") == weights(tmp_path / "whole/teacher")
