"""The event log, progress on stderr, and what a run ran on."""

import contextlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from distmatch.base import progress as progress_module
from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.training import environment as environment_module
from distmatch.training.environment import environment, peak_memory
from distmatch.training.log import EventLog

# ---- event log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_values_become_plain_json(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    before = time.time()
    with EventLog(path) as log:
        log.write(
            "train",
            step=3,
            loss=torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
            ratio_mean=torch.tensor([1.0, math.nan]),
            weights=np.array([[1.0], [math.inf]]),
            ess=np.float64(-math.inf),
            count=np.int64(7),
            ok=np.bool_(True),
            nested={"a": (1, None), 2: [math.nan]},
            path=path.name,
            text='a "quoted"\nline, ü, \ud800',
        )
        log.write("end", message=tmp_path)
    first, second = lines(path)
    assert before - 1 <= first.pop("time") <= time.time() + 1
    assert first == {
        **{"event": "train", "step": 3, "loss": 0.5, "ratio_mean": [1.0, None], "weights": [[1.0], [None]]},
        **{"ess": None, "count": 7, "ok": True, "nested": {"a": [1, None], "2": [None]}},
        **{"path": "log.jsonl", "text": 'a "quoted"\nline, ü, \ud800'},
    }
    assert (second["event"], second["step"], second["message"]) == ("end", None, str(tmp_path))
    with pytest.raises(ValueError, match="closed"):
        log.write("late")


def test_log_refuses_what_has_no_json_form(tmp_path):
    with EventLog(tmp_path / "log.jsonl") as log, pytest.raises(TypeError, match=r"info\.net is a Linear"):
        log.write("train", info={"net": torch.nn.Linear(1, 1)})
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_log_appends_and_ends_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start"}\n{"event": "tr')
    for event in ("resume", "train"):
        with EventLog(path) as log:
            log.write(event)
    got = path.read_text().splitlines()
    assert got[:2] == ['{"event": "start"}', '{"event": "tr']
    assert [json.loads(line)["event"] for line in got[2:]] == ["resume", "train"]


def test_log_on_a_full_disk_is_the_users_error_and_goes_on_later(tmp_path):
    path = tmp_path / "log.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(path) as log:
        log.write("start")
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard)
        )  # room for a part of a line
        try:
            with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
                log.write("train", loss=1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write("end")
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["event"], len(torn), json.loads(last)["event"]) == ("start", 10, "end")
    with pytest.raises(UserError, match="cannot write"):
        EventLog(path / "under-a-file")


def test_one_write_a_line_keeps_two_writers_apart(tmp_path):
    path = tmp_path / "log.jsonl"
    with EventLog(path) as one, EventLog(path) as two:
        for step in range(50):
            one.write("one", step, text="x" * step)
            two.write("two", step, text="y" * step)
    assert [(e["event"], e["step"]) for e in lines(path)] == [
        (n, s) for s in range(50) for n in ("one", "two")
    ]


# ---- progress


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


# ---- environment


def git(folder, *arguments):
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**os.environ, **names},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_environment_is_json_and_says_what_a_rerun_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distmatch", "distill", "--out", "a b"])
    got = json.loads(json.dumps(environment(), allow_nan=False))
    assert got["command"] == "distmatch distill --out 'a b'"
    assert got["python"] == ".".join(map(str, sys.version_info[:3]))
    assert torch.__version__.startswith(got["packages"]["torch"])  # the build (+cpu) may be left out
    assert got["packages"]["numpy"] == np.__version__
    assert all(got["packages"][name] for name in ("distmatch", "scipy", "scikit-learn"))
    assert got["devices"][0]["torch_threads"] == torch.get_num_threads()
    assert got["time"].endswith("+00:00")
    assert os.uname().nodename not in json.dumps(got)


def test_git_commit_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))  # a checkout around it must not be found
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert environment()["git_commit"] is None
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    (repo / "file").write_text("1")
    git(repo, "add", "file")
    git(repo, "commit", "-q", "-m", "first")
    git(repo, "tag", "-a", "v1", "-m", "a tag must not replace the hash")
    commit = git(repo, "rev-parse", "HEAD")
    monkeypatch.chdir(repo)
    assert environment()["git_commit"] == commit
    (repo / "file").write_text("2")
    assert environment()["git_commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment()["git_commit"] is None


def test_a_git_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment_module, "_GIT_SECONDS", 0.2)
    start = time.monotonic()
    assert environment()["git_commit"] is None
    assert time.monotonic() - start < 10


def test_peak_memory_is_in_bytes():
    with open("/proc/self/status") as file:
        high_water = 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    peak = peak_memory()
    # At least the kernel's other count of it (which is a few pages behind), and no more than there is.
    assert 0.9 * high_water < peak["cpu"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (peak["cuda"] is None) == (not torch.cuda.is_available())
