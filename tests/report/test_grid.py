"""Picture grids: every image at its place, visible, and whole files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.report import grid_png, image_grid, save_grid


def digits(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def test_tiny_images_are_enlarged_pixel_by_pixel_and_stand_row_by_row() -> None:
    x = digits(5)
    picture = np.asarray(image_grid(x, columns=3))
    assert picture.shape == (2 * 40 + 2, 3 * 40 + 2 * 2, 4)
    for i in range(5):
        top, left = (i // 3) * 42, (i % 3) * 42
        tile = picture[top : top + 40, left : left + 40]
        np.testing.assert_array_equal(tile[..., 0], x[i].repeat(5, 0).repeat(5, 1))
        assert (tile[..., 3] == 255).all()
    assert (picture[:, 40:42, 3] == 0).all()  # gaps and the empty sixth place are transparent
    assert (picture[42:, 84:, 3] == 0).all()


@pytest.mark.parametrize(("side", "shown"), [(8, 40), (28, 56), (32, 64), (40, 40), (256, 256), (600, 256)])
def test_sizes(side: int, shown: int) -> None:
    picture = image_grid(np.zeros((1, side, side), np.uint8), 4)
    assert picture.size == (shown, shown)


def test_colors_survive() -> None:
    x = np.zeros((2, 50, 60, 3), np.uint8)
    x[0, ..., 0], x[1, ..., 2] = 200, 100
    picture = np.asarray(image_grid(x, 2))
    assert picture[0, 0].tolist() == [200, 0, 0, 255]
    assert picture[0, 62].tolist() == [0, 0, 100, 255]
    np.testing.assert_array_equal(np.asarray(image_grid(x[..., :1], 2)), np.asarray(image_grid(x[..., 0], 2)))


def test_labels_are_written_below_their_image_only() -> None:
    x = np.zeros((4, 8, 8), np.uint8)
    plain, labeled = image_grid(x, 2), np.asarray(image_grid(x, 2, labels=["", "7", "", "a very long name"]))
    assert labeled.shape[0] == plain.size[1] + 2 * 14
    assert labeled[40:54, :40, 3].max() == 0
    assert labeled[40:54, 42:82, 3].max() > 200  # font smoothing
    assert labeled[96:110, :42, 3].max() == 0  # a long name is cut, it does not reach the neighbor


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 8, 8)),
        np.zeros((2, 8), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(x: np.ndarray) -> None:
    with pytest.raises(UserError, match="image"):
        image_grid(x, 2)


def test_labels_must_match() -> None:
    with pytest.raises(UserError, match="numbers of images and labels"):
        image_grid(digits(2), 2, labels=[1])


def test_saving(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "grid.png"
    save_grid(path, digits(4), 2)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image_grid(digits(4), 2)))
    assert np.asarray(Image.open(io.BytesIO(grid_png(digits(4), 2)))).shape == (82, 82, 4)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write"):
        save_grid(path / "below-a-file.png", digits(4), 2)
