"""The report page of folders that are incomplete, broken or hostile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from distmatch.base.errors import UserError
from distmatch.report import build_report
from tests.helpers.report_runs import (
    demo_metrics,
    estimate,
    make_run,
    make_vectors,
    page,
    student_events,
    write_log,
)

EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "demo")


def test_pictures_without_labels_and_samples_with_no_label_value(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    x = np.zeros((5, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "samples" / "student.npz", x=x, labels=np.full(5, -1))
    np.savez(tmp_path / "samples" / "reference.npz", x=x)
    _, parsed = page(tmp_path)
    assert "The first samples, not selected." in parsed.text
    assert len(parsed.having("src")) == 2


def test_nothing_a_user_wrote_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<i>run")
    (folder / "config.toml").write_text(f"data = '{EVIL}'\n")
    (folder / "env.json").write_text(json.dumps({"command": EVIL, EVIL: EVIL}))
    write_log(
        folder / "log.jsonl",
        [
            {"event": "warning", "step": 1, "message": EVIL},
            {"event": "train", "step": 1, EVIL: 1.0, "loss": 2.0},
        ],
    )
    metrics = demo_metrics()
    metrics["student"][EVIL] = estimate(1.0, 0.1)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    labels = np.array([EVIL, "b"] * 4)
    for model in ("reference", "teacher", "student"):
        np.savez(folder / "samples" / f"{model}.npz", x=np.zeros((8, 8, 8), np.uint8), labels=labels)
    text, parsed = page(folder)
    assert not {tag for tag, _ in parsed.tags} & {"script", "i"}
    assert "<script" not in text
    assert "<i>" not in text
    assert parsed.text.count(EVIL) >= 7


def test_half_a_surrogate_pair_is_shown_as_one_mark(tmp_path: Path) -> None:
    """Folders whose names are not UTF-8 hold one in Python, and JSON can: no file holds it."""
    half = "a\ud800b"
    folder = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")))
    (folder / "env.json").write_text(json.dumps({"command": half}))
    metrics = demo_metrics()
    metrics["student"][half] = estimate(1.0, 0.1)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    events = [{"event": "train", "step": step, half: 1.0, "loss": 2.0} for step in (1, 2)]
    write_log(folder / "log.jsonl", [{"event": "warning", "step": 1, "message": half}, *events])
    text, parsed = page(folder)
    assert "run-\ufffd" in parsed.text
    assert text.count("a\ufffdb") >= 4


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_vectors_become_drawings(tmp_path: Path, dims: int) -> None:
    text, parsed = page(make_vectors(tmp_path, dims))
    assert parsed.having("src") == []
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 3
    assert ("principal axes" in parsed.text) == (dims > 2)
    assert "not finite" in parsed.text  # the null in the metrics
    assert "://" not in text


def test_samples_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    np.savez(tmp_path / "samples" / "reference.npz", x=x)
    x[:7, 1], x[7, 0] = np.nan, np.inf
    np.savez(tmp_path / "samples" / "teacher.npz", x=x)
    np.savez(tmp_path / "samples" / "student.npz", x=np.full_like(x, np.nan))
    _, parsed = page(tmp_path)
    assert "Teacher: 8 samples have values that are not finite." in parsed.text
    assert "Student: 50 samples have values that are not finite." in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 2


@pytest.mark.parametrize(
    "kept", ["config.toml", "env.json", "log.jsonl", "metrics.json", "samples", "teacher"]
)
def test_any_part_may_be_missing(whole: Path, tmp_path: Path, kept: str) -> None:
    source, target = whole / kept, tmp_path / kept
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    if kept in ("env.json", "teacher"):  # these alone do not make a run folder
        with pytest.raises(UserError, match="not a run folder"):
            build_report(tmp_path)
        (tmp_path / "samples").mkdir()
    _, parsed = page(tmp_path)
    assert "Not in this folder" in parsed.text
    assert ("Not evaluated yet" in parsed.text) == (kept != "metrics.json")
    assert ("No samples have been saved" in parsed.text) == (kept != "samples")


def test_a_teacher_run_misses_no_student(whole: Path) -> None:
    _, parsed = page(whole / "teacher")
    assert "student" not in parsed.text.split("Not in this folder")[1].split("Samples")[0]
    assert "Denoising loss" in parsed.text


def test_a_run_that_stopped_says_so(tmp_path: Path) -> None:
    events = student_events(100)[:-1]  # with its end, before it was resumed
    events += [
        {"event": "resume", "step": 50, "time": 2e9},
        {"event": "train", "step": 55, "loss_fake": None},
    ]
    write_log(tmp_path / "log.jsonl", events)
    _, parsed = page(tmp_path)
    assert "not finished at step 55, resumed 1 time" in parsed.text


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="not a run folder"):
            build_report(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "as JSON"),
        ("[]", "metrics.json"),
        ('{"student": 3}', "student"),
        ('{"student": {"fd": {"value": "good"}}}', r"student\.fd\.value"),
        ('{"student": {"nfe": true}}', r"student\.nfe"),
    ],
)
def test_broken_metrics_are_refused_and_the_old_page_stays(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_broken_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    path = tmp_path / "samples" / "student.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"student\.npz"):
        build_report(tmp_path)
    np.savez(path, x=np.array([{"a": 1}], dtype=object))  # a pickle inside: never loaded
    with pytest.raises(UserError, match=r"student\.npz"):
        build_report(tmp_path)
    np.savez(path, x=np.zeros((4, 1, 8, 8), np.float32))
    with pytest.raises(UserError, match="no samples that can be shown"):
        build_report(tmp_path)
    np.savez(path, x=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(3))
    with pytest.raises(UserError, match="labels do not match"):
        build_report(tmp_path)


def test_a_config_that_does_not_parse_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("this is = = no toml")
    _, parsed = page(tmp_path)
    assert "this is = = no toml" in parsed.text
