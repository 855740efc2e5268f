"""The run folder: nothing of the user's is lost, and nobody writes to it twice at a time."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from distmatch.base.errors import UserError
from distmatch.training.checkpoint import save_checkpoint
from distmatch.training.runfolder import RunFolder, create


def old_run(path):
    with create(path) as run:
        run.config.write_text("steps = 3\n")
        (run.path / "notes.txt").write_text("mine")
    return path


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_paths_are_those_of_the_contract(tmp_path):
    run = RunFolder(tmp_path)
    got = [run.config, run.env, run.log, run.checkpoints, run.samples, run.metrics, run.report, run.model]
    expected = "config.toml env.json log.jsonl checkpoints samples metrics.json report.html model"
    assert " ".join(p.relative_to(tmp_path).as_posix() for p in got) == expected
    assert names(tmp_path) == []


def test_new_and_empty_folders_are_taken(tmp_path):
    create(tmp_path / "a" / "b").release()
    assert names(tmp_path / "a" / "b") == [".lock"]
    create(tmp_path / "a" / "b").release()  # a lock file alone is no content
    create(tmp_path / "c", overwrite=True).release()


def test_an_existing_run_is_never_touched_without_a_flag(tmp_path):
    old_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        create(tmp_path / "run")
    with create(tmp_path / "run", resume=True) as run:
        assert run.config.read_text() == "steps = 3\n"
    with pytest.raises(UserError, match="contradict"):
        create(tmp_path / "run", resume=True, overwrite=True)


def test_overwrite_gives_an_empty_locked_folder_and_leaves_nothing_beside_it(tmp_path):
    old_run(tmp_path / "run")
    with create(tmp_path / "run", overwrite=True) as run:
        assert names(tmp_path) == ["run"]
        assert names(tmp_path / "run") == [".lock"]
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
        with pytest.raises(UserError, match="another process"):
            create(tmp_path / "run")
        run.config.write_text("")
    create(tmp_path / "run", resume=True).release()


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_not_ours_is_left_alone(flag, tmp_path):
    (tmp_path / "config.toml").write_text("title = 'a web site'")  # other programs use this name as well
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "state.json").write_text('{"format": "other"}')
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder of distmatch and was left alone"):
        create(tmp_path, **{flag: True})
    assert names(tmp_path) == ["checkpoints", "config.toml", "thesis.tex"]


def test_a_copy_without_hidden_files_is_recognized(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.toml").write_text("")
    (tmp_path / "a" / "log.jsonl").write_text("")
    save_checkpoint(tmp_path / "b" / "checkpoints", 5, {})
    for name in "ab":
        create(tmp_path / name, resume=True).release()
        create(tmp_path / name, overwrite=True).release()


@pytest.mark.parametrize("make", [False, True])
def test_nothing_to_resume(make, tmp_path):
    if make:
        (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="nothing to resume"):
        create(tmp_path / "run", resume=True)
    assert names(tmp_path) == (["run"] if make else [])


def test_overwrite_spares_what_the_run_reads(tmp_path, monkeypatch):
    old_run(tmp_path / "run")
    (tmp_path / "run" / "teacher").mkdir()
    with pytest.raises(UserError, match=r"would delete .*teacher"):
        create(tmp_path / "run", overwrite=True, inputs=[tmp_path / "run" / "teacher"])
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(UserError, match="which this run needs"):
        create(".", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_overwrite_follows_a_link_to_the_folder(tmp_path):
    old_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with create(tmp_path / "link", overwrite=True) as run:
        assert run.path == (tmp_path / "run").resolve()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("failing", [1, 2], ids=["old aside", "new in place"])
def test_overwrite_that_fails_keeps_the_old_run(failing, tmp_path, monkeypatch):
    old_run(tmp_path / "run")
    replace, calls, files_open = os.replace, [], len(os.listdir("/proc/self/fd"))

    def broken(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(UserError, match="No space left"):
            create(tmp_path / "run", overwrite=True)
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == [".lock", "config.toml", "notes.txt"]
    assert len(os.listdir("/proc/self/fd")) == files_open
    create(tmp_path / "run", resume=True).release()  # and nothing keeps it locked


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        create(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        create(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write"):
        create("/proc/run")


def test_two_processes_never_write_to_one_folder_and_a_killed_one_blocks_nobody(tmp_path):
    code = (
        "import sys, time; from distmatch.training.runfolder import create\n"
        "run = create(sys.argv[1]); run.config.write_text(''); print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "locked\n"
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"another process is writing.*process {child.pid}"):
                create(tmp_path / "run", **flags)
        assert names(tmp_path / "run") == [".lock", "config.toml"]
    finally:
        child.kill()
        child.communicate()
    with create(tmp_path / "run", resume=True):
        assert f"process {os.getpid()}" in (tmp_path / "run" / ".lock").read_text()


def test_a_folder_that_another_process_filled_meanwhile(tmp_path, monkeypatch):
    lock = fcntl.flock

    def late(fd, how):
        (tmp_path / "run" / "config.toml").write_text("theirs")
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="is not empty"):
        create(tmp_path / "run")
    create(tmp_path / "run", resume=True).release()


def test_a_folder_that_another_process_replaced_meanwhile(tmp_path, monkeypatch):
    old_run(tmp_path / "run")
    lock = fcntl.flock

    def late(fd, how):
        (tmp_path / "run").rename(tmp_path / "aside")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").write_text("theirs")
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process"):
        create(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ".lock").read_text() == "theirs"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def unsupported(fd, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks"):
        create(tmp_path / "run").release()


def test_an_interrupt_while_overwriting_keeps_the_old_run(tmp_path, monkeypatch):
    old_run(tmp_path / "run")
    replace = os.replace

    def interrupted(source, target):
        if str(source).endswith(".new"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "run", overwrite=True)
    assert names(tmp_path) == ["run"]
    create(tmp_path / "run", resume=True).release()
