"""Picture grids: many small images in one PNG, large enough to be seen; of clips an animated one."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError
from distmatch.base.files import atomic_write

_GAP = 2  # pixels between tiles
_CAPTION = 14  # pixels below a tile for its label
FRAME = 125  # milliseconds that a frame of a clip is shown
MOST_FRAMES = 64
"""Frames of a grid of clips, so that a page stays small."""
_LARGEST_CLIP = 96
_GREY = (128, 128, 128, 255)  # reads on white and on black


def _rgba(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, 1 | 3 | 4) uint8 as (N, H, W, 4)."""
    x = np.asarray(images)
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape[1:]:
        raise UserError(
            "these are no images",
            got=f"shape {tuple(np.shape(images))}, {np.asarray(images).dtype}",
            expected="uint8 of shape (N, H, W) or (N, H, W, C) with C 1, 3 or 4",
            fix="scale to 0..255 and put the channels last",
        )
    if x.shape[-1] == 1:
        x = np.repeat(x, 3, axis=-1)
    if x.shape[-1] == 3:
        x = np.concatenate([x, np.full_like(x[..., :1], 255)], axis=-1)
    return x


def _resize(x: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    """Repeats the pixels of tiny images, shrinks large ones; shape (N, h, w, 4)."""
    height, width = x.shape[1:3]
    side = max(height, width)
    if side > largest:
        size = (max(1, round(width * largest / side)), max(1, round(height * largest / side)))
        return np.stack(
            [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in x]
        )
    factor = max(1, -(-smallest // side))
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def image_grid(
    images: np.ndarray,
    columns: int,
    labels: Sequence[object] | np.ndarray | None = None,
    *,
    smallest: int = 40,
    largest: int = 256,
) -> Image.Image:
    """Lays images out row by row on a transparent ground.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, C being 1, 3 or 4.
        columns: Images in a row; the last row may be shorter.
        labels: (N,) texts or numbers to write below the images.
        smallest: Tiny images are enlarged by a whole factor until their longer side has this many pixels.
        largest: Images whose longer side has more pixels are shrunk to this.

    Returns:
        An RGBA picture with a gap of 2 pixels between images.

    Raises:
        UserError: No images, a wrong shape or type, or another number of labels than images.
    """
    if len(images) == 0 or columns < 1:
        raise UserError(
            "a grid needs images",
            got=f"{len(images)} images in {columns} columns",
            expected="at least 1 of each",
        )
    if labels is not None:
        check_equal("the numbers of images and labels", len(images), len(labels))
    tiles = _resize(_rgba(images), smallest, largest)
    count, height, width = tiles.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    pitch_y = height + _GAP + (0 if labels is None else _CAPTION)
    pitch_x = width + _GAP
    canvas = np.zeros((rows * columns, pitch_y, pitch_x, 4), dtype=np.uint8)
    canvas[:count, :height, :width] = tiles
    sheet = canvas.reshape(rows, columns, pitch_y, pitch_x, 4).swapaxes(1, 2).reshape(rows * pitch_y, -1, 4)
    picture = Image.fromarray(
        np.ascontiguousarray(sheet[: rows * pitch_y - _GAP, : columns * pitch_x - _GAP])
    )
    if labels is not None:
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
        for i, label in enumerate(labels):
            text = str(label)
            while len(text) > 1 and pen.textlength(text, font=font) > width:
                text = text[:-1]
            center = (i % columns) * pitch_x + width // 2
            pen.text(
                (center, (i // columns) * pitch_y + height + 1), text, fill=_GREY, font=font, anchor="ma"
            )
    return picture


def grid_png(images: np.ndarray, columns: int, labels: Sequence[object] | np.ndarray | None = None) -> bytes:
    """The PNG bytes of :func:`image_grid`; of clips (N, T, H, W, C) animated, of 64 frames at most."""
    if np.ndim(images) == 5:
        pictures = [
            image_grid(images[:, t], columns, labels, largest=_LARGEST_CLIP)
            for t in range(min(images.shape[1], MOST_FRAMES))
        ]
        return animation(pictures)
    return animation([image_grid(images, columns, labels)])


def animation(pictures: Sequence[Image.Image]) -> bytes:
    """Pictures one after another, eight a second and over again, as an animated PNG; a single one as a PNG.

    What cannot show animations shows the first picture.
    """
    buffer, first = io.BytesIO(), pictures[0]
    moving = {"save_all": True, "append_images": pictures[1:], "duration": FRAME, "loop": 0}
    first.save(buffer, format="PNG", optimize=True, **(moving if len(pictures) > 1 else {}))
    return buffer.getvalue()


def save_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    columns: int,
    labels: Sequence[object] | np.ndarray | None = None,
) -> None:
    """Writes :func:`grid_png` as a file, atomically.

    Raises:
        UserError: As :func:`image_grid`, or the file cannot be written.
    """
    atomic_write(path, grid_png(images, columns, labels))
