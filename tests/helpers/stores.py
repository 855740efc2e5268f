"""Folders of images, and what a store must hold of other data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.data.batches import Batches


def write_images(folder: Path, n: int, *, color_from: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    """Images in two classes with captions, grey before number ``color_from``."""
    gen = np.random.default_rng(0)
    lines = []
    for i in range(n):
        shape = (*size, 3) if i >= color_from else size
        file = folder / ("cat" if i % 3 else "dog") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gen.integers(0, 256, shape, dtype=np.uint8)).save(file)
        lines.append(json.dumps({"file_name": f"{file.parent.name}/{file.name}", "text": f"número {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def assert_same(store, data):
    assert torch.equal(store.raw, data.raw)
    assert store.raw.dtype == data.raw.dtype
    assert (store.labels is None) == (data.labels is None)
    assert data.labels is None or torch.equal(store.labels, data.labels)
    assert store.class_names == data.class_names
    assert store.scaling == data.scaling
    assert store.columns == data.columns
    assert list(store.captions) == list(data.captions)
    assert store.std() == pytest.approx(data.std(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(store.extremes, data.extremes, strict=True))
    assert store.constant_columns() == data.constant_columns()
    flip = data.scaling.kind == "image"
    for one, other in zip(*([Batches(d, 7, 3, flip)(s) for s in (0, 5)] for d in (store, data)), strict=True):
        assert torch.equal(one.x, other.x)
        assert list(one.texts) == list(other.texts)
