"""Checkpoints: bit-exact, whole or absent, whatever happens to the process or the disk."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmatch.base.errors import UserError
from distmatch.training.checkpoint import list_checkpoints, load_checkpoint, pack, save_checkpoint, unpack


def same(a, b):
    """Equal to the last bit, types included."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and raw(a.detach()) == raw(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def raw(t):
    return bytes(t.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())


def through_disk(tree, folder):
    save_checkpoint(folder, 1, tree)
    return load_checkpoint(folder)[1]


OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.99), amsgrad=True),
}


def train(model, optimiser, generator, steps):
    for _ in range(steps):
        loss = model(torch.randn(4, 3, generator=generator)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_training_goes_on_bit_for_bit_after_a_checkpoint(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        return model, OPTIMISERS[kind](model.parameters()), torch.Generator().manual_seed(7)

    model, optimiser, generator = make()
    train(model, optimiser, generator, 3)
    state = {"net": model.state_dict(), "opt": optimiser.state_dict(), "rng": generator.get_state()}
    restored = through_disk(state, tmp_path)
    assert same(state, restored)
    assert set(restored["opt"]["state"]) == {0, 1, 2, 3, 4, 5}, "int keys stay int"

    other, other_optimiser, other_generator = make()
    other.load_state_dict(restored["net"])
    other_optimiser.load_state_dict(restored["opt"])
    other_generator.set_state(restored["rng"])
    train(model, optimiser, generator, 3)
    train(other, other_optimiser, other_generator, 3)
    assert same(model.state_dict(), other.state_dict())


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype, tmp_path):
    full = (torch.arange(24).reshape(4, 6) % 5).to(dtype)
    tree = {
        "full": full,
        "zero-dim": full[2, 3],
        "empty": full[:0],
        "also empty": full[:0, :3],
        "strided": full[::2, 1::2],
        "transposed": full.T,
        "expanded": full[:1].expand(3, 6),
    }
    restored = through_disk(tree, tmp_path)
    assert same(tree, restored)
    assert restored["expanded"].data_ptr() != restored["full"].data_ptr()


def test_conjugate_view_and_nan_payload(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    payload = torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)
    restored = through_disk({"z": z, "conj": z.conj(), "nan": payload}, tmp_path)
    assert torch.equal(restored["z"], z)
    assert torch.equal(restored["conj"], z.conj().resolve_conj())
    assert restored["nan"].view(torch.int32).item() == 0x7FC01234


def test_aliases_stay_one_object_and_views_are_kept_apart(tmp_path):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    tree = {"a": weight, "tied": weight, "view": weight.view(16), "row": weight[1], "nan": float("nan")}
    tensors, _ = pack(tree)
    assert len(tensors) == 3
    restored = through_disk(tree, tmp_path)
    assert restored["a"] is restored["tied"]
    assert same(tree, restored)


def test_names_that_collide_are_told_apart(tmp_path):
    one, two = torch.ones(1), torch.full((1,), 2.0)
    for tree in (
        {"a": {"b": one}, "a/b": two},
        {0: one, "0": two},
        {"__metadata__": one, "": two},
        {"é\ud800": one, "\\xe9\\ud800": two, "\n\x00": two.clone()},
        [[one], {"0": two}],
    ):
        assert same(tree, through_disk(tree, tmp_path))
    assert same(one, through_disk(one, tmp_path))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=True) | st.text()
arrays = st.lists(st.floats(width=32), max_size=3).map(torch.tensor)
keys = st.text(max_size=4) | st.integers()
trees = st.recursive(
    scalars | arrays,
    lambda t: (
        st.lists(t, max_size=3) | st.lists(t, max_size=3).map(tuple) | st.dictionaries(keys, t, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees)
def test_any_tree_survives_json(tree):
    tensors, structure = pack(tree)
    text = json.dumps(structure, allow_nan=False)
    assert same(tree, unpack(tensors, json.loads(text)))


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.nn.Linear(1, 1), "torch.nn"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (torch.float32, "dtype"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "without data"),
    ],
)
def test_what_is_no_tree_is_refused_by_path(value, names, tmp_path):
    with pytest.raises(TypeError, match=r"optimiser/3/x.*" + names):
        save_checkpoint(tmp_path / "checkpoints", 1, {"optimiser": {3: {"x": value}}})
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(TypeError, match="key True in optimiser"):
        pack({"optimiser": {True: 1}})


def test_keeps_the_newest_and_forgets_a_course_that_was_left(tmp_path):
    for step in (100, 200, 300, 400):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    assert list(list_checkpoints(tmp_path)) == [200, 300, 400]
    assert load_checkpoint(tmp_path) == (400, {"step": 400})
    assert load_checkpoint(tmp_path, 300) == (300, {"step": 300})
    assert load_checkpoint(tmp_path / "step-000200") == (200, {"step": 200})
    assert load_checkpoint(tmp_path, tmp_path / "step-000200") == (200, {"step": 200})
    save_checkpoint(tmp_path, 250, {"step": 250}, keep=3)  # somebody went back to 200
    assert list(list_checkpoints(tmp_path)) == [200, 250]
    save_checkpoint(tmp_path, 250, {"step": "again"}, keep=1)
    save_checkpoint(tmp_path, 1_234_567, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1234567"]
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        load_checkpoint(tmp_path, 7)


def test_no_checkpoint_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no checkpoint in"):
            load_checkpoint(folder)
    assert list_checkpoints(tmp_path / "missing") == {}


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
        deadline = time.monotonic() + 10
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


def test_one_hundred_megabytes_are_checked_in_a_second(tmp_path):
    tree = {"x": torch.zeros(25_000_000)}
    save_checkpoint(tmp_path, 1, tree)
    start = time.process_time()
    load_checkpoint(tmp_path)
    assert time.process_time() - start < 3  # 0.2 s measured alone on an idle machine
