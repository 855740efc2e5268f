"""What is refused before it is read: what swells, what never ends, what is not what its name says."""

from __future__ import annotations

import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data import bounds, load_data
from distmatch.data.bounds import MOST_PIXELS

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 6, 5), dtype=np.uint8)


def peak(action) -> int:
    """Most bytes of Python and NumPy while ``action`` is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_archive_that_swells_is_refused_by_its_header(tmp_path: Path) -> None:
    """96 MiB of zeros in 96 KiB; what lies under another name is not looked at."""
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((96, 1024, 1024), np.uint8))
    assert peak(lambda: load_data(tmp_path / "bomb.npz")) < 2**22
    np.savez_compressed(tmp_path / "half.npz", x=PICTURES, other=np.zeros((96, 1024, 1024), np.uint8))
    assert len(load_data(tmp_path / "half.npz")) == 4


def test_more_than_half_of_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=PICTURES)
    np.save(tmp_path / "a.npy", PICTURES)
    (tmp_path / "a").mkdir()
    for k, image in enumerate(PICTURES):
        Image.fromarray(image).save(tmp_path / "a" / f"{k}.png")
    for name in ("a.npz", "a.npy", "a"):
        monkeypatch.setattr(bounds, "memory_bound", lambda: PICTURES.nbytes)
        assert len(load_data(tmp_path / name)) == 4
        monkeypatch.setattr(bounds, "memory_bound", lambda: PICTURES.nbytes - 1)
        with pytest.raises(UserError, match="does not fit into memory"):
            load_data(tmp_path / name)


def test_a_member_that_is_no_array_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(2**26))
    assert peak(lambda: load_data(tmp_path / "a.npz")) < 2**22


def test_a_huge_image_is_refused_before_its_pixels_are_read(tmp_path: Path) -> None:
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    assert peak(lambda: load_data(tmp_path)) < 2**22


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "folder/a.png"])
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    """A pipe would hang and /dev/zero would never end."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    where = path.parent if name.startswith("folder") else path
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        load_data(where)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        load_data(where)


@pytest.mark.parametrize("form", ["EPS", "TIFF", "GIF"])
def test_images_are_what_their_names_say(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens by content, and would start Ghostscript for an EPS that is called .png."""
    started: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **more: started.append(given))
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png", format=form)
    with pytest.raises(UserError, match=r"a\.png.*PNG, JPEG, WEBP, BMP"):
        load_data(tmp_path)
    assert not started
