"""Progress on stderr: a bar on a terminal, whole lines without one."""

import contextlib
import io
import sys

import torch

from distmatch.base import progress as progress_module
from distmatch.base.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_plain_lines_by_tenths(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with progress(1000, desc="student") as bar:
        for i in range(1000):
            bar.update(loss=torch.tensor(1.23456e-5), step=i, kind="js")
    got = out.getvalue().splitlines()
    assert len(got) == 10
    assert got[0].startswith("student: 100/1000 (10%), elapsed 00:0")
    assert ", ETA 00:0" in got[0]
    assert got[0].endswith(", loss 1.23e-05, step 99, kind js")
    assert "ETA" not in got[-1]
    assert got[-1].startswith("student: 1000/1000 (100%)")
    assert out.getvalue().replace("\n", "").isprintable()


def test_without_a_terminal_a_line_every_ten_seconds_with_an_honest_eta(monkeypatch):
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with progress(10_000, initial=5_000, desc="teacher") as bar:
        for _ in range(50):
            clock[0] += 1.0
            bar.update(2)
    got = out.getvalue().splitlines()
    assert [line.split()[1] for line in got] == [f"{5000 + 20 * i}/10000" for i in range(1, 6)]
    # 2 steps a second and 4980 to go; the 5000 steps before the resume do not count.
    assert got[0] == "teacher: 5020/10000 (50%), elapsed 00:10, ETA 41:30"


def test_on_a_terminal_a_bar_with_values(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with progress(5, initial=1, desc="student") as bar:
        for _ in range(4):
            bar.update(loss=0.123456)
    assert "student: 100%" in out.getvalue()
    assert "5/5" in out.getvalue()
    assert "loss=0.123" in out.getvalue()
    assert "0.1234" not in out.getvalue()


def test_an_interrupted_loop_shows_where_it_stopped_and_silence_is_silent(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with contextlib.suppress(KeyboardInterrupt), progress(1000, desc="student") as bar:
        bar.update(7)
        raise KeyboardInterrupt
    assert out.getvalue().startswith("student: 7/1000 (1%)")
    out.truncate(0)
    with progress(10, desc="student", enabled=False) as bar:
        bar.update(10)
    with progress(0, desc="nothing") as bar:
        bar.update(0)
    assert out.getvalue() == ""
