"""What a run ran on."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import torch

from distmatch.training import environment as environment_module
from distmatch.training.environment import environment, peak_memory


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
