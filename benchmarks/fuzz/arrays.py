"""Hands changed files of data to their readers: .npz, .npy, tables, and folders of images.

python benchmarks/fuzz/arrays.py --cases 100000 --seconds 480 --save failures
"""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from harness import Case, command_line, scratch
from PIL import Image
from values import changed_bytes

from distmatch.data import load_data
from distmatch.report.run import read_samples

TYPES = (
    "<f4",
    "<f8",
    "|u1",
    "<i8",
    "|b1",
    "<c8",
    "<U3",
    "|S2",
    "|O",
    "<M8[s]",
    ">f2",
    "<f16",
    "|V8",
    "f4,f4",
    "x",
)
SHAPES = (
    *("(4, 8, 8)", "(4, 2)", "(0, 2)", "()", "(4,)", "(4, 8, 8, 3)", "(-1, 2)", "(10**12,)", "(2**62, 4)"),
    *(
        "(1000000000000, 2)",
        "(4, 2, )",
        "[4, 2]",
        "(4.0, 2)",
        "(True, 2)",
        "None",
        "(" * 200,
        "(1,)*9",
        "(4, 0)",
    ),
)
WHOLE = ((6, 8, 8), (6, 2), (6, 8, 8, 3), (6, 3, 8, 8), (6,), (1, 4), (6, 0), (2, 3, 4, 5, 6))
NAMES = ("x", "images", "labels", "y", "x_train", "y_train", "class_names", "other", "../x", "x/y", "_")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
CELLS = ("1", "-2.5", "1e308", "1e999", "nan", "", "a,b", '"a', "9" * 400, "0x1", "\x00", "🦀", "1 2", "inf")


@cache
def repeated(byte: bytes, times: int) -> bytes:
    """The same byte many times, compressed."""
    return zlib.compress(byte * times)


class Arrays:
    """Makes and checks the cases; each kind is written under the name that a user would give it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or scratch()
        rng = np.random.default_rng(0)
        images = rng.integers(0, 255, (6, 8, 8), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images, labels=np.arange(6) % 2, class_names=np.array(["a", "b"]))
        self.npz = buffer.getvalue()
        buffer = io.BytesIO()
        np.save(buffer, rng.normal(size=(6, 3)))
        self.npy = buffer.getvalue()
        self.images = []
        for form in FORMATS:
            buffer = io.BytesIO()
            Image.fromarray(images[0]).save(buffer, format=form)
            self.images.append(buffer.getvalue())

    def make(self, rng: random.Random, number: int) -> Case:
        """One file; its label is its suffix."""
        match rng.randrange(8):
            case 0:
                return Case(".npz", changed_bytes(rng, self.npz))
            case 1:
                return Case(".npz", self._archive(rng))
            case 2:
                return Case(".npy", changed_bytes(rng, self.npy))
            case 3:
                return Case(".npy", self._array(rng))
            case 4 | 5:
                return Case(".png", self._image(rng))
            case 6:
                rows = [
                    [rng.choice(CELLS) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 6))
                ]
                if rng.random() < 0.5:
                    rows = [[f"{rng.random()}" for _ in range(2)] for _ in range(5)] + rows
                return Case(".csv", "\n".join(",".join(row) for row in rows).encode())
            case _:
                return Case(".csv", changed_bytes(rng, b"a,b,label\n1,2,x\n3,4,y\n5,6,x\n-1,.5,y\n"))

    def _array(self, rng: random.Random) -> bytes:
        """A NumPy file with a header of its own; half of them hold what the header says."""
        if rng.random() < 0.5:
            shape = rng.choice(WHOLE)
            dtype = rng.choice(("u1", "<f4", "<f8", "<i8", ">f2", "?", "<c8", "<U3"))
            scale = rng.choice((1.0, 200.0, 1e30, float("nan"), float("inf")))
            with np.errstate(all="ignore"):
                whole = (scale * np.random.default_rng(rng.randrange(99)).random(shape)).astype(dtype)
            plain = io.BytesIO()
            np.save(plain, whole)
            return plain.getvalue()
        descr = rng.choice(TYPES)
        header = f"{{'descr': '{descr}', 'fortran_order': {rng.choice(('False', 'True', '3'))}, "
        header += f"'shape': {rng.choice(SHAPES)}, }}"
        if rng.random() < 0.2:
            header = changed_bytes(rng, header.encode()).decode("latin1")[:60_000]
        raw = header.encode("latin1", "replace") + b"\n"
        version = rng.choice((1, 1, 1, 2, 3, 9))
        size = struct.pack("<H", len(raw) % 65536) if version == 1 else struct.pack("<I", len(raw))
        if rng.random() < 0.1:
            size = bytes([255]) * len(size)
        return (
            b"\x93NUMPY" + bytes([version, 0]) + size + raw + rng.randbytes(rng.choice((0, 64, 1024, 4096)))
        )

    def _archive(self, rng: random.Random) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
            names = [rng.choice(NAMES) for _ in range(rng.randint(0, 4))]
            for name in dict.fromkeys(names if rng.random() < 0.2 else ["x", *names[: rng.randrange(3)]]):
                zeros = b"\0" * rng.choice((9, 10**6))
                content = self._array(rng) if rng.random() < 0.9 else rng.choice((b"", zeros))
                archive.writestr(f"{name}{rng.choice(('.npy', '.npy', '.npy', ''))}", content)
        content = buffer.getvalue()
        return changed_bytes(rng, content) if rng.random() < 0.2 else content

    def _image(self, rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return changed_bytes(rng, rng.choice(self.images))
        side = rng.choice((0, 1, 8, 8, 8, 5000, 2**16, 2**31 - 1, 2**32 - 1))
        deep = bytes([rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6)), 0, 0, rng.choice((0, 1))])
        head = struct.pack(">II", side, rng.choice((8, side))) + deep
        parts = [
            (b"IHDR", head),
            (b"IDAT", repeated(b"\0", rng.choice((0, 72, 10**5)))),
            (b"IEND", b""),
        ]
        if rng.random() < 0.5:
            text = b"k\0\0" + repeated(b"x", rng.choice((10, 10**7)))
            parts.insert(1, (rng.choice((b"zTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS")), text))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )

    def check(self, case: Case) -> None:
        """Reads a case as data, and archives as the samples of a run too."""
        place = self.folder / str(os.getpid())
        if not place.exists():
            place.mkdir()
            (place / "whole.png").write_bytes(self.images[0])
        path = place / f"case{case.label}"
        path.write_bytes(case.content)
        try:
            if case.label == ".npz" and len(case.content) % 2:
                read_samples(path)
            else:
                load_data(place if case.label == ".png" else path)
        finally:
            path.unlink()


def main() -> int:
    """Runs the cases that the command line asks for."""
    cases = Arrays()
    return command_line(__doc__ or "", cases.make, cases.check)


if __name__ == "__main__":
    sys.exit(main())
