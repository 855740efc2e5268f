"""`distmatch report --watch`: the page follows its run, and is left as an ordinary one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distmatch.base.errors import Terminated, UserError
from distmatch.report import build_report, follow_report
from distmatch.report.follow import has_ended
from tests.helpers.command import command, done
from tests.helpers.report_runs import write_log

RELOADS = '<meta http-equiv="refresh" content="3">'
START = {"event": "start", "step": 0, "time": 1e9, "kind": "train"}
END = {"event": "end", "step": 4, "time": 1e9 + 9}


def line(step: int) -> dict[str, Any]:
    return {"event": "train", "step": step, "time": 1e9 + step, "loss": 1.0 / (1 + step)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_log(tmp_path / "log.jsonl", [START, line(1)])
    return tmp_path


def append(folder: Path, event: dict[str, Any]) -> None:
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(event) + "\n")


def acting(*actions: Callable[[], object]) -> tuple[Callable[[float], None], list[float]]:
    """A sleep during which something happens to the run; and how long it would have been."""
    left, slept = list(actions), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        left.pop(0)()

    return sleep, slept


def interrupt(kind: type[BaseException] = KeyboardInterrupt) -> None:
    raise kind


def test_the_page_follows_the_run_to_its_end(folder: Path) -> None:
    page = folder / "report.html"
    seen: list[tuple[str, int]] = []

    def look() -> None:
        seen.append((page.read_text(), page.stat().st_mtime_ns))

    def grow() -> None:
        look()
        append(folder, line(2))

    def end() -> None:
        look()
        append(folder, END)

    sleep, slept = acting(grow, look, end)
    assert follow_report(folder, 2.5, sleep=sleep) == page
    assert [RELOADS in text for text, _ in seen] == [True] * 3
    assert ["not finished at step 1" in text for text, _ in seen] == [True, False, False]
    assert seen[1] == seen[2]  # nothing had changed: it was not written again
    assert min(slept) >= 2.5
    text = page.read_text()
    assert "refresh" not in text
    assert "finished at step 4" in text
    build_report(folder)
    assert page.read_text() == text


def test_a_page_that_cannot_be_built_for_a_moment_is_left_as_it_was(folder: Path) -> None:
    said: list[str] = []
    kept: list[str] = []

    def broken() -> None:
        (folder / "metrics.json").write_text("{")

    def mended() -> None:
        kept.append((folder / "report.html").read_text())
        (folder / "metrics.json").unlink()

    def more() -> None:
        kept.append((folder / "report.html").read_text())
        append(folder, END)

    sleep, _ = acting(broken, lambda: None, mended, more)
    follow_report(folder, 3, tell=said.append, sleep=sleep)
    assert all(RELOADS in text and "not finished at step 1" in text for text in kept)
    assert len(said) == 2
    assert "watching" in said[0]
    assert "metrics.json" in said[1]


def test_ctrl_c_leaves_a_page_that_does_not_reload(folder: Path) -> None:
    follow_report(folder, 3, sleep=acting(interrupt)[0])
    assert "refresh" not in (folder / "report.html").read_text()
    with pytest.raises(Terminated):
        follow_report(folder, 3, sleep=acting(lambda: interrupt(Terminated))[0])
    assert "refresh" not in (folder / "report.html").read_text()


def test_the_command_ends_with_zero_on_ctrl_c_and_at_the_end_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        assert seconds >= 0.5
        # In the background of a shell SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(follow_report, "__kwdefaults__", {**follow_report.__kwdefaults__, "sleep": sleep})
    answer = done(f"report --watch 0.5 {folder} --json")
    assert answer.json() == {"report": str(folder / "report.html")}
    assert "watching" in answer.err
    append(folder, END)
    assert "report in" in done(f"report --watch {folder}").out  # without seconds


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        answer = command(f"report {place} --watch")
        assert answer.code == 2
        assert "is not a run folder" in answer.err
    assert not list(tmp_path.iterdir())
    assert "--watch must be positive" in command(f"report {tmp_path} --watch 0").err
    write_log(tmp_path / "log.jsonl", [START])
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json"):
        follow_report(tmp_path, 1)


def test_a_run_has_ended_after_its_last_event_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for events, ended in (
        ([START, line(1)], False),
        ([START, END], True),
        ([START, END, {"event": "evaluate", "step": None}], True),
        ([START, END, {"event": "resume", "step": 4}, START], False),
    ):
        write_log(log, events)
        assert has_ended(tmp_path) is ended
    record = {"runs": [{"status": "done"}, {"status": "pending"}]}
    (tmp_path / "compare.json").write_text(json.dumps(record))
    assert not has_ended(tmp_path)
    record["runs"][1]["status"] = "failed"
    (tmp_path / "compare.json").write_text(json.dumps(record))
    assert has_ended(tmp_path)
