"""Checkpoints under attack: damaged files, killed processes, full disks."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
import warnings

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


def change_number(file):
    file.write_text(file.read_text().replace("0.125", "0.625"))


DAMAGES = {
    "tensors cut": ("state.safetensors", cut),
    "tensors flipped": ("state.safetensors", flip),
    "tensors empty": ("state.safetensors", lambda f: f.write_bytes(b"")),
    "tensors a pickle": ("state.safetensors", lambda f: f.write_bytes(pickle.dumps(Bomb()))),
    "tensors a torch archive": ("state.safetensors", lambda f: torch.save({"x": torch.ones(1)}, f)),
    "tensors missing": ("state.safetensors", lambda f: f.unlink()),
    "json cut": ("state.json", cut),
    "json number changed": ("state.json", change_number),
    "json no object": ("state.json", lambda f: f.write_text("[]")),
    "json of something else": ("state.json", lambda f: f.write_text("{}")),
    "json no text": ("state.json", lambda f: f.write_bytes(b"\xff\xfe")),
    "json missing": ("state.json", lambda f: f.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_or_refused(damage, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(5), "lr": 0.125, "step": step})
    name, break_it = DAMAGES[damage]
    break_it(tmp_path / "step-000002" / name)
    with pytest.warns(UserWarning, match=r"skipped a damaged checkpoint, step-000001 is used"):
        assert load_checkpoint(tmp_path)[0] == 1
    for which in (2, tmp_path / "step-000002"):
        with pytest.raises(UserError, match="step-000002"):
            load_checkpoint(tmp_path, which)
    with pytest.raises(UserError, match="step-000002"):
        load_checkpoint(tmp_path / "step-000002")
    break_it(tmp_path / "step-000001" / name)
    with pytest.raises(UserError, match="all 2 checkpoints"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 3, {"step": 3})
    assert load_checkpoint(tmp_path) == (3, {"step": 3})


def test_every_flipped_bit_is_noticed(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.arange(3.0), "n": [1, 2.5, None, "ü", float("inf")]})
    for name in ("state.safetensors", "state.json"):
        file = tmp_path / "step-000001" / name
        whole = file.read_bytes()
        for bit in random.Random(0).sample(range(8 * len(whole)), 60):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(changed))
            try:
                step, tree = load_checkpoint(tmp_path, 1)
            except UserError:
                continue
            # Some bits of white space between JSON values mean nothing.
            assert name == "state.json"
            assert (step, tree["n"]) == (1, [1, 2.5, None, "ü", float("inf")])
        file.write_bytes(whole)
    assert load_checkpoint(tmp_path)[0] == 1


def test_a_newer_format_says_so(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {})
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(UserError, match="another version of distmatch"):
        load_checkpoint(folder)


def save_forever(folder, first):
    step = first
    while True:
        step += 1
        tree = {"step": step, "x": torch.full((20_000,), float(step)), "opt": {0: {"step": step}}}
        save_checkpoint(folder, step, tree, keep=2)


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    # Forked, so that a child is at work within milliseconds; the moments are random with seed 0.
    fork, moments, last, leftovers = multiprocessing.get_context("fork"), random.Random(0), 0, 0
    for _ in range(12):
        child = fork.Process(target=save_forever, args=(tmp_path, last), daemon=True)
        child.start()
        deadline = time.monotonic() + 60
        while max(list_checkpoints(tmp_path), default=0) <= last and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        leftovers += sum(p.name.startswith(".") for p in tmp_path.iterdir())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # killing a writer must not even leave a damaged one behind
            step, tree = load_checkpoint(tmp_path)
        assert step > last
        assert tree["step"] == tree["opt"][0]["step"] == step
        assert torch.equal(tree["x"], torch.full((20_000,), float(step)))
        last = step
    save_checkpoint(tmp_path, last + 1, {}, keep=2)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers > 0, "no child was killed while it wrote: the test showed nothing"


@contextlib.contextmanager
def file_size_limit(size):
    """Lets the kernel refuse to write beyond ``size`` bytes, after a part was written: like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(call, step, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if call == "write":
            stack.enter_context(file_size_limit(100))
        else:
            patch.setattr(os, call, full)
        with pytest.raises(UserError, match=r"No space left|File too large"):
            save_checkpoint(tmp_path, step, {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path)[1]["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".old")] == ["step-000001"]
    save_checkpoint(tmp_path, step, {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path)[1]["x"], torch.zeros(3))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_replacement_that_fails_half_way_keeps_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": "old"})
    replace = os.replace

    def fail_on_the_new_one(source, target):
        if str(source).endswith(".tmp") and str(target).endswith("step-000001"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_the_new_one)
        with pytest.raises(UserError, match="Input/output"):
            save_checkpoint(tmp_path, 1, {"x": "new"})
    assert load_checkpoint(tmp_path) == (1, {"x": "old"})
    save_checkpoint(tmp_path, 1, {"x": "new"})
    assert load_checkpoint(tmp_path) == (1, {"x": "new"})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_stopped_between_the_two_renames_of_a_replacement(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": 1})
    save_checkpoint(tmp_path, 2, {"x": 2})
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002.abc.old")
    assert load_checkpoint(tmp_path) == (2, {"x": 2}), "the copy that was set aside is the newest"
    save_checkpoint(tmp_path, 3, {"x": 3}, keep=2)
    assert load_checkpoint(tmp_path, 2) == (2, {"x": 2})
    save_checkpoint(tmp_path, 4, {"x": 4}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, {})
