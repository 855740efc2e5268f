"""The section of the watch: its curves and pictures are those of the log and of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmatch.report.log import curves, read_log, watched_steps
from distmatch.report.run import read_run
from distmatch.report.training import watch_charts
from tests.helpers.report_runs import page, write_log

STEPS = [0, 100, 200, 300, 400, 500, 600]


def event(step: int, **values: Any) -> dict[str, Any]:
    return {"event": "watch", "step": step, "time": 1e9 + step, **values}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "watched"
    events: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": 1e9, "kind": "distill"}]
    for step in STEPS:
        share = {"saturation": 0.25, "teacher_saturation": 0.5, "solid": 0.0, "teacher_solid": 0.125}
        events += [
            event(step, diversity=1 - step / 1000, energy=step / 100, motion=None, seconds=1.5, **share)
        ]
    write_log(folder / "log.jsonl", events)
    rng = np.random.default_rng(0)
    (folder / "watch").mkdir()
    for name in ["teacher", *(f"step-{step:06d}" for step in STEPS)]:
        x = rng.integers(0, 255, (4, 8, 8), dtype=np.uint8)
        np.savez(folder / "watch" / f"{name}.npz", x=x, labels=np.array([0, 0, 3, 3]))
    return folder


def test_curves_are_those_of_the_events(run: Path) -> None:
    events = read_log(run / "log.jsonl")
    steps, values = curves(events, "diversity", "watch")
    assert steps.tolist() == STEPS
    np.testing.assert_allclose(values, 1 - np.array(STEPS) / 1000)
    charts = {chart.title: chart for chart in watch_charts(events)}
    assert list(charts) == [
        "Diversity",
        "Energy distance to the teacher",
        "Saturated values",
        "Images of one color",
    ]
    assert charts["Diversity"].last == "0.400"
    assert "the teacher's is 0.5" in charts["Saturated values"].remark
    assert "over 600 steps: from 1 to 0.4" in str(charts["Diversity"].svg)


def test_some_of_the_steps_are_shown_beside_the_teacher(run: Path) -> None:
    shown = read_run(run).watched
    assert list(shown) == ["teacher", "Step 0", "Step 200", "Step 300", "Step 400", "Step 600"]
    with np.load(run / "watch" / "step-000300.npz") as file:
        assert np.array_equal(shown["Step 300"].x, file["x"])
    text, parsed = page(run)
    assert 'id="watch"' in text
    assert [str(a["href"]) for a in parsed.having("href")].count("#watch") == 1
    assert sum(str(a["src"]).startswith("data:image/png") for a in parsed.having("src")) == 6
    for title in ("Teacher", "Step 0", "Step 600"):
        assert f'<figcaption class="title">{title}</figcaption>' in text


def test_steps_that_were_run_again_are_not_shown(run: Path, tmp_path: Path) -> None:
    again = [*read_log(run / "log.jsonl"), {"event": "resume", "step": 250, "time": 2e9}]
    write_log(tmp_path / "log.jsonl", [*again, event(300, diversity=0.5)])
    events = read_log(tmp_path / "log.jsonl")
    assert watched_steps(events) == [0, 100, 200, 300]
    assert curves(events, "diversity", "watch")[1][-1] == 0.5


def test_pictures_that_are_gone_leave_the_curves(run: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [event(0, diversity=0.5), event(5, diversity=0.6), event(7)])
    text, _ = page(tmp_path)
    assert 'id="watch"' in text
    assert "data:image/png" not in text


def test_a_run_without_a_watch_has_no_section(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [{"event": "train", "step": 5, "time": 1e9, "loss": 0.5}])
    assert 'id="watch"' not in page(tmp_path)[0]


def test_the_status_names_the_step_of_the_model(tmp_path: Path) -> None:
    end = {"event": "end", "step": 1200, "time": 1e9, "result_of": 1000}
    write_log(tmp_path / "log.jsonl", [{"event": "train", "step": 1200, "time": 1e9, "loss": 0.5}, end])
    assert "finished at step 1,200, with the model of step 1,000" in page(tmp_path)[0]


def test_rows_of_prompts_have_their_texts(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [event(0, diversity=0.5)])
    (tmp_path / "watch").mkdir()
    texts = np.array(["a <b>red</b> cat", "a <b>red</b> cat", "a dog", "a dog"])
    for name in ("teacher", "step-000000"):
        x = np.zeros((4, 8, 8, 3), dtype=np.uint8)
        np.savez(
            tmp_path / "watch" / f"{name}.npz", x=x, condition_prompt=np.array([1, 1, 2, 2]), prompts=texts
        )
    text, parsed = page(tmp_path)
    assert "Row 1: a <b>red</b> cat. Row 2: a dog." in parsed.text
    assert "<b>red" not in text


def test_what_is_measured_against_data_has_its_errors_and_how_it_was_measured(tmp_path: Path) -> None:
    how = {"features": "classifier 0123abcd", "n": 250, "solver": "heun", "solver_steps": 8}
    values = {"fd": 4.0, "fd_stderr": 0.5, "floor_fd": 0.25, "recall": 0.5, "recall_stderr": 0.02}
    seen = [event(step, **{**values, "fd": values["fd"] - step / 100}, **how) for step in STEPS[:3]]
    write_log(tmp_path / "log.jsonl", seen)
    fd, recall = watch_charts(read_log(tmp_path / "log.jsonl"))
    assert (fd.title, fd.last) == ("Fréchet distance to real data", "2.00 ± 0.5")
    assert "classifier 0123abcd features, 2 blocks of 250 samples, 8 steps of heun" in fd.remark
    assert "dotted: real data, 0.25" in fd.remark
    assert (recall.title, recall.last) == ("Recall", "0.500 ± 0.02")
    assert "dotted" not in recall.remark
    plain = [event(step, fd=4.0 - step / 100) for step in STEPS[:3]]
    write_log(tmp_path / "log.jsonl", plain)
    (without,) = watch_charts(read_log(tmp_path / "log.jsonl"))
    assert str(fd.svg).count("<path") >= str(without.svg).count("<path") + 2  # the bars, and the line
