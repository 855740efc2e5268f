"""Image files: finding them in a folder, and reading one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distmatch.base.errors import UserError
from distmatch.base.inputs import require_regular_file
from distmatch.data.bounds import MOST_PIXELS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow goes by content, and starts other programs for some
_GREY = ("1", "L", "LA")
_ORIENTATION = 0x0112  # the tag of EXIF
_DEEP = ("I", "F")  # 16 and 32 bits: Pillow would clip them to 255 without a word


def read_image(file: Path, size: tuple[int, int] | None = None, *, color: bool = False) -> np.ndarray:
    """An image, (1, H, W) where it is grey, else (3, H, W), uint8; see :func:`decode`."""
    image = decode(file, size, color=color)
    pixels = np.empty((len(image.mode), image.height, image.width), np.uint8)
    copy_pixels(image, pixels)
    return pixels


def copy_pixels(image: Image.Image, pixels: np.ndarray) -> None:
    """Copies an image of mode "L" or "RGB" into an array (C, H, W), uint8; grey fills all channels.

    Plane by plane: transposing the pixels costs as much as taking them from Pillow, and so does new memory
    for all of them together, which the system hands out page by page.
    """
    for plane, channel in zip(pixels, image.mode * (len(pixels) // len(image.mode)), strict=True):
        plane[:] = np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(plane.shape)


def decode(
    file: Path | str,
    size: tuple[int, int] | None = None,
    *,
    color: bool = False,
    content: bytes | None = None,
) -> Image.Image:
    """An image of mode "L" where it is grey, else "RGB".

    Args:
        file: The file, or a name for messages.
        size: Height and width to which the largest part around the center is resized.
        color: Whether grey images become color.
        content: The content of the file, if it was read already.

    Raises:
        UserError: It cannot be read, is animated, too large, or has more than 8 bits a channel.
    """
    try:
        with Image.open(file if content is None else io.BytesIO(content), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise UserError(
                    f"{file} is too large an image",
                    got=f"{width}x{height} pixels",
                    expected=f"at most {MOST_PIXELS:,} pixels",
                    fix="crop or resize the images first",
                )
            if getattr(opened, "is_animated", False):
                raise UserError(
                    f"{file} is animated, not an image",
                    fix="video is read from .npz or .npy, as an array (N, T, H, W, C)",
                )
            if opened.mode.startswith(_DEEP):
                raise UserError(
                    f"{file} has more than 8 bits a channel",
                    got=f"mode {opened.mode}",
                    fix="convert it to 8 bits",
                )
            image: Image.Image = opened
            if opened.getexif().get(_ORIENTATION, 1) != 1:  # each of these steps copies the image
                image = ImageOps.exif_transpose(opened)
            mode = "L" if image.mode in _GREY and not color else "RGB"
            image = image if image.mode == mode else image.convert(mode)
            if size is not None:
                image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
            image.load()
            return image
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{file} does not fit into memory") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the image {file}",
            got=_why(error, file, content),
            expected=f"a file that is {', '.join(_FORMATS)} by its content",
            fix="it may be truncated, damaged, or of another format: convert, replace or remove it",
        ) from error


def _why(error: Exception, file: Path | str, content: bytes | None) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return f"{type(error).__name__}: {error}"
    size = Path(file).stat().st_size if content is None else len(content)
    return "content of another format" if size else "an empty file"


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and its sub-folders, in the order of their names."""
    found: list[Path] = []
    for place, inner, names in os.walk(folder, onerror=_refuse):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        found += [
            Path(place, n) for n in names if not n.startswith(".") and n.lower().endswith(IMAGE_SUFFIXES)
        ]
    for file in found:
        require_regular_file(file, "an image")
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot open {error.filename}", got=error.strerror, fix="check its permissions")
