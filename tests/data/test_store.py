"""Stores that are written: what is read from one is what was written, in part or as a whole."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from distmatch.base.errors import UserError
from distmatch.base.lock import take_lock
from distmatch.data import load_data
from distmatch.data.images import decode
from distmatch.data.store import blocks, layout, writing
from distmatch.data.store.prepare import prepare
from distmatch.data.store.reading import verify_store
from tests.helpers.processes import together
from tests.helpers.stores import assert_same, write_images


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def sources(place: Path) -> dict[str, str]:
    gen = np.random.default_rng(1)
    walk = gen.normal(size=(40, 5, 2)).cumsum(1) + 1e9
    np.savez(place / "walks.npz", x=walk, kind="sequence", condition_angle=gen.normal(size=(40, 3)))
    np.savez(place / "named.npz", x=gen.random((9, 4, 4)), y=np.arange(9) % 3, class_names=["b", "a", "c"])
    np.save(place / "pixels.npy", gen.integers(0, 256, (50, 6, 7, 3)))  # int64, channels last
    np.save(place / "clips.npy", gen.random((9, 3, 4, 5, 5), dtype=np.float32))
    (place / "table.csv").write_text("size,kind,label\n1.5,a,x\n2,b,y\n-3,a,x\n")
    files = ("walks.npz", "named.npz", "pixels.npy", "clips.npy", "table.csv:one-hot")
    return {name: str(place / name) for name in files} | {n: n for n in ("digits", "moving-digits", "ring8")}


@pytest.mark.parametrize(
    "name",
    [
        "walks.npz",
        "named.npz",
        "pixels.npy",
        "clips.npy",
        "table.csv:one-hot",
        "digits",
        "moving-digits",
        "ring8",
    ],
)
def test_a_store_holds_what_its_source_does(tmp_path, name):
    spec = sources(tmp_path)[name]
    prepare(spec, tmp_path / "store")
    store, data = load_data(tmp_path / "store"), load_data(spec)
    assert_same(store, data)
    assert store.conditions.keys() == data.conditions.keys()
    assert all(torch.equal(store.conditions[key], data.conditions[key]) for key in data.conditions)
    assert verify_store(tmp_path / "store")["samples"] == len(data)
    np.testing.assert_array_equal(np.load(tmp_path / "store/x.npy", mmap_mode="r"), data.raw.numpy())


def test_captions_are_encoded_in_training_as_those_in_memory(tmp_path):
    prepare("captioned-digits:test", tmp_path / "store")
    store, data = load_data(tmp_path / "store"), load_data("captioned-digits:test")
    assert_same(store, data)
    assert not store.conditions
    assert store.captions[-1] == data.captions[-1]
    assert store.captions[3:6] == list(data.captions[3:6])
    part = store.subset(torch.tensor([5, 2]))
    assert part.captions == (data.captions[5], data.captions[2])
    assert part.std() == pytest.approx(data.subset(torch.tensor([5, 2])).std(), abs=0)


@pytest.mark.parametrize("color_from", [0, 50, 100])
def test_a_folder_of_images(tmp_path, color_from):
    """Grey where all images are, color from the first image on where one of them is."""
    write_images(tmp_path / "images", 100, color_from=color_from)
    prepare(tmp_path / "images", tmp_path / "store")
    store, data = load_data(tmp_path / "store"), load_data(tmp_path / "images")
    assert store.shape[0] == (1 if color_from == 100 else 3)
    assert_same(store, data)
    assert load_data(tmp_path / "store", labels=False).labels is None


def test_images_are_cropped_and_resized(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 5, size=(12, 30))
    write_images(folder / "cat", 5, size=(20, 16))
    files = sorted(folder.glob("cat/*.png"))
    (folder / "metadata.jsonl").unlink()
    for extra in [*folder.glob("cat/*/*.png"), folder / "cat/metadata.jsonl"]:
        extra.rename(folder / "cat" / f"x{extra.name}")
    prepare(folder / "cat", tmp_path / "store", size=(8, 9), workers=1)
    store = load_data(tmp_path / "store")
    files = sorted((folder / "cat").glob("*.png"))
    assert store.shape == (3, 8, 9)
    for row, file in zip(store.raw, files, strict=True):
        with Image.open(file) as image:
            expected = np.asarray(ImageOps.fit(image, (9, 8), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(row.permute(1, 2, 0).numpy(), expected)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    write_images(tmp_path / "images", 150, color_from=3)
    (tmp_path / "images/cat/049.png").write_bytes(b"no image")
    for workers in (1, 2, 7):
        prepare(tmp_path / "images", tmp_path / f"{workers}", workers=workers, skip_bad=True)
    first = contents(tmp_path / "1")
    assert set(first) == {"store.json", "x.npy", "labels.npy", "captions.npy", "caption_ends.npy"}
    assert first == contents(tmp_path / "2") == contents(tmp_path / "7")
    assert len(json.loads(first["store.json"])["blocks"]) > 1


def _killed(folder: str, parts: int) -> None:
    """Prepares, and is killed once a number of parts was handed to the disk."""
    blocks.BLOCK_BYTES = 20_000
    append = writing.StoreWriter.append

    def counted(self, rows):
        append(self, rows)
        if self.parts == parts:
            os.kill(os.getpid(), signal.SIGKILL)

    writing.StoreWriter.append = counted
    if os.fork() == 0:
        prepare(f"{folder}/images", f"{folder}/store")
    _, status = os.wait()
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(("parts", "least"), [(1, 0), (6, 64)])
def test_a_killed_preparation_continues_where_it_stopped(tmp_path, parts, least, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    write_images(tmp_path / "images", 200)
    together(_killed, [(str(tmp_path), parts)])
    left = json.loads((tmp_path / "store/unfinished.json").read_text())
    with pytest.raises(UserError, match="is not complete"):
        load_data(tmp_path / "store")
    read = []
    monkeypatch.setattr(
        "distmatch.data.sources.core.decode", lambda *a, **k: read.append(a) or decode(*a, **k)
    )
    prepare(tmp_path / "images", tmp_path / "store")
    assert len(read) == 200 - left["samples"]
    assert left["samples"] >= least  # the disk is at most a few parts behind
    prepare(tmp_path / "images", tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_what_cannot_be_read_is_listed_and_skipped_only_on_request(tmp_path, monkeypatch):
    folder, out = tmp_path / "images", tmp_path / "store"
    write_images(folder, 40)
    (folder / "cat/001.png").write_bytes((folder / "cat/001.png").read_bytes()[:60])
    (folder / "cat/005.png").write_bytes(b"")
    for name in ("003", "006"):
        Image.new("RGB", (5, 6)).save(folder / f"dog/{name}.png")
    with pytest.raises(UserError, match="4 of 40 items") as caught:
        prepare(folder, out)
    assert "cat/001.png: cannot read the image (" in str(caught.value)
    assert "cat/005.png: cannot read the image (an empty file)" in str(caught.value)
    several = "dog/003.png and 1 more: 5x6 pixels (width x height), and the first image has 10x12"
    assert several in str(caught.value)
    assert "with --size and --overwrite" in caught.value.parts["fix"]
    with pytest.raises(UserError, match="is not complete") as caught:
        load_data(out)
    assert "4 of its items cannot be read" in caught.value.parts["got"]
    assert "--skip-bad" in caught.value.parts["fix"]
    monkeypatch.setattr("distmatch.data.sources.core.decode", lambda *a, **k: pytest.fail("read again"))
    index = prepare(folder, out, skip_bad=True)
    skipped = ["cat/001.png", "cat/005.png", "dog/003.png", "dog/006.png"]
    assert [item for item, _ in index["skipped"]] == skipped
    assert len(load_data(out)) == 36
    assert load_data(out).captions[0] == "número 2"


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    write_images(tmp_path / "images", 200)
    sync, calls = os.fdatasync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:  # four files, in the fourth block
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(UserError, match=r"cannot write.*No space left"):
        prepare(tmp_path / "images", tmp_path / "store")
    assert json.loads((tmp_path / "store/unfinished.json").read_text())["samples"] == 192
    monkeypatch.setattr(os, "fdatasync", sync)
    prepare(tmp_path / "images", tmp_path / "store")
    assert_same(load_data(tmp_path / "store"), load_data(tmp_path / "images"))


def test_only_stores_are_continued_and_replaced(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(96, dtype=np.uint8).reshape(6, 4, 4))
    np.save(tmp_path / "b.npy", np.arange(0, 192, 2, dtype=np.uint8).reshape(6, 4, 4))
    out = tmp_path / "store"
    prepare(tmp_path / "a.npy", out)
    with pytest.raises(UserError, match="holds a store already"):
        prepare(tmp_path / "a.npy", out)
    with pytest.raises(UserError, match="does not exist"):
        prepare(tmp_path / "none.npy", out, overwrite=True)
    with pytest.raises(UserError, match="made of itself"):
        prepare(out, out, overwrite=True)
    assert len(load_data(out)) == 6
    prepare(tmp_path / "b.npy", out, overwrite=True)
    assert int(load_data(out).raw.max()) == 190
    (out / "store.json").rename(tmp_path / "store.json")
    state = json.loads((tmp_path / "store.json").read_text()) | {"request": {"source": "elsewhere"}}
    (out / "unfinished.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="unfinished store of other data"):
        prepare(tmp_path / "b.npy", out)
    request = json.loads((tmp_path / "store.json").read_text())["request"]
    for change in ({"fields": None}, {"form": [1]}, {"moments": {"count": 2}}, {"blocks": [3]}):
        (out / "unfinished.json").write_text(json.dumps(state | {"request": request} | change))
        with pytest.raises(UserError, match="cannot continue"):
            prepare(tmp_path / "b.npy", out)
    (out / "unfinished.json").write_text(json.dumps(state | {"request": request, "version": 1}))
    with pytest.raises(UserError, match="by another version"):
        prepare(tmp_path / "b.npy", out)
    (out / "unfinished.json").rename(out / "store.json")
    with pytest.raises(UserError, match="by another version"):
        prepare(tmp_path / "b.npy", out)
    prepare(tmp_path / "b.npy", out, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty, and not a store"):
            prepare(tmp_path / "a.npy", tmp_path / "full", overwrite=overwrite)
    assert contents(tmp_path / "full") == {"mine.txt": b"mine"}


def test_a_store_that_another_process_writes_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/unfinished.json").write_text(
        json.dumps({"format": "distmatch store", "version": layout.VERSION})
    )
    lock = take_lock(tmp_path / "store", "distmatch store")
    for action in (
        lambda: load_data(tmp_path / "store"),
        lambda: prepare("digits", tmp_path / "store", overwrite=True),
    ):
        with pytest.raises(UserError, match="another process is writing"):
            action()
    os.close(lock)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((5, 4, 4), 200, np.uint8), "all samples are the same"),
        (np.full((5, 4, 4), -7.0), "all samples are the same"),
        (np.linspace(-7, 3, 80).reshape(5, 4, 4), "range of these images is not supported"),
        (np.arange(80).reshape(5, 4, 4) * 9, "must lie in 0..255"),
        (np.array([0.5, np.nan] * 40).reshape(5, 4, 4), "not finite"),
        (np.arange(16, dtype=np.uint8).reshape(1, 4, 4), "too few samples"),
    ],
)
def test_useless_arrays_leave_nothing(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "x.npy", tmp_path / "new/store")
    assert not (tmp_path / "new/store").exists()


def test_an_array_larger_than_memory(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("distmatch.data.bounds.memory_bound", lambda: 1000)
    with pytest.raises(UserError, match="does not fit into memory"):
        load_data(tmp_path / "x.npy")
    prepare(tmp_path / "x.npy", tmp_path / "store")
    np.testing.assert_array_equal(load_data(tmp_path / "store").raw[:, 0].numpy(), x)
