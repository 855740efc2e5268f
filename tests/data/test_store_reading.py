"""Stores that are read: damage is named, and memory does not grow with their size."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import from_arrays, load_data
from distmatch.data.order import BatchOrder
from distmatch.data.store import prepare as preparation
from distmatch.data.store.layout import HEADER, Field
from distmatch.data.store.prepare import prepare
from distmatch.data.store.reading import verify_store
from tests.helpers.processes import together
from tests.helpers.stores import assert_same, write_images


@pytest.fixture
def store(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (50, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(50) % 5)
    prepare(tmp_path / "x.npz", tmp_path / "store")
    return tmp_path / "store"


def test_damage_is_named(store):
    whole = (store / "x.npy").read_bytes()
    (store / "x.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"damaged.*x.npy") as caught:
        load_data(store)
    assert caught.value.parts["fix"].endswith(f"distmatch prepare SOURCE --out {store} --overwrite")
    index = (store / "store.json").read_text()
    drawn = json.loads(index)
    drawn["request"]["model"] = "sha256"  # of samples
    (store / "store.json").write_text(json.dumps(drawn))
    with pytest.raises(UserError, match=f"distmatch sample MODEL --out {store} --overwrite"):
        load_data(store)
    (store / "store.json").write_text(index)
    (store / "x.npy").write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    assert len(load_data(store)) == 50
    with pytest.raises(UserError, match=r"damaged.*x.npy, block 0 of 1: another hash"):
        verify_store(store)
    other = Field("x", "uint8", (1, 4, 9)).header(50)
    (store / "x.npy").write_bytes(other + whole[HEADER:])
    with pytest.raises(UserError, match=r"\(50, 1, 4, 9\).*\(1, 6, 6\)"):
        load_data(store)
    (store / "x.npy").write_bytes(whole)
    labels = np.load(store / "labels.npy", mmap_mode="r+")
    labels[3] = 5
    labels.flush()
    with pytest.raises(UserError, match=r"classes 0 to 5.*5 classes"):
        load_data(store)
    (store / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"damaged.*labels.npy"):
        load_data(store)


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("samples", "fields", "moments", "scaling", "blocks", "class_names")),
        {"samples": 51},
        {"samples": -1},
        {"samples": 10**30},
        {"fields": []},
        {"fields": [{"name": "../x", "dtype": "uint8", "shape": [1, 6, 6]}]},
        {"fields": [{"name": "x", "dtype": "object", "shape": [1, 6, 6]}]},
        {"fields": [{"name": "x", "dtype": "uint8", "shape": [1, 6, -6]}]},
        {"moments": {"count": 1, "low": [0], "high": [], "mean": [0], "deviation": [0]}},
        {"moments": {"count": 1, "low": [0, 0], "high": [1, 1], "mean": [0, 0], "deviation": [1, 1]}},
        {"blocks": [{"samples": 50}]},
        {"blocks": [{"samples": 49, "xxh3_128": {"x": "", "labels": ""}}]},
        {"blocks": [{"samples": "50", "xxh3_128": {"x": "", "labels": ""}}]},
        {"blocks": {"samples": 50}},
        {"fields": [{"name": "x", "dtype": "uint8", "shape": [36]}]},
        {"class_names": ["a"]},
        {"version": 1},
        {"format": "other"},
    ],
)
def test_a_wrong_index_is_refused(store, change):
    values = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError):
        load_data(store)


def _draw_within_limits(folder: str) -> None:
    """Draws batches of a huge store with little memory of its own, and measures what it keeps."""
    before = _memory()
    resource.setrlimit(resource.RLIMIT_DATA, (before + 2**29, before + 2**29))
    data = load_data(folder)
    order = BatchOrder(len(data), 4, 0)
    taken = []
    for step in range(400):  # 300 MB of the file, and four times as much as floats
        assert data.batch(order.indices(step))[0].shape == (4, 3, 256, 256)
        taken.append(_memory())
    assert max(taken[200:]) - max(taken[:200]) < 2**24, [n >> 20 for n in taken]
    assert data.std() > 0


def _memory() -> int:
    """Bytes that this process has in memory, of mapped files too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """256 GiB that are not on the disk: a file of holes."""
    gen = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", gen.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8))
    prepare(tmp_path / "x.npy", tmp_path / "store")
    index = json.loads((tmp_path / "store/store.json").read_text())
    field = Field.from_dict(index["fields"][0])
    n = 2**38 // field.row
    with open(tmp_path / "store/x.npy", "r+b") as handle:
        handle.write(field.header(n))
        try:
            handle.truncate(HEADER + n * field.row)
        except OSError:
            pytest.skip("no files of 256 GiB here")
    index |= {"samples": n, "blocks": [index["blocks"][0] | {"samples": n}]}
    (tmp_path / "store/store.json").write_text(json.dumps(index))
    together(_draw_within_limits, [(str(tmp_path / "store"),)])


def test_other_labels_are_other_content(store):
    data = load_data(store)
    assert data.content_hash == load_data(store).content_hash
    assert data.content_hash != data.without_labels().content_hash
    memory = from_arrays(data.raw.clone(), data.labels.clone())
    assert data.content_hash != data.subset(torch.arange(50)).content_hash == memory.content_hash


def test_read_ahead_is_bounded(tmp_path, monkeypatch):
    """Parts that wait for the disk take no more memory than is allowed."""
    monkeypatch.setattr(preparation, "_IN_FLIGHT", 1)
    write_images(tmp_path / "images", 100)
    prepare(tmp_path / "images", tmp_path / "store", workers=4)
    assert_same(load_data(tmp_path / "store"), load_data(tmp_path / "images"))
