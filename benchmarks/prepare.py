"""`distmatch prepare` against the bare decoder, and against bare writes to the same disk.

    python benchmarks/prepare.py             # all rows, ten minutes, 2 GB of disk
    python benchmarks/prepare.py --write     # and puts the table into docs/prepare.md

The decoder is Pillow alone: every image opened, converted to RGB, cropped and resized where the row says so,
and made an array, which is thrown away. The disk is a loop that reads a source in pieces of 8 MiB, writes
them to a file, and synchronizes it. Runs of both kinds alternate; a row is the median of the rounds. What a
run wrote is removed before the next one, outside of the time that is taken. As a
busy machine slows them in different ways, the processor time of both is compared as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sections import replace_section

from distmatch.base.progress import quietly
from distmatch.data.store.prepare import prepare

PAGE = Path(__file__).parents[1] / "docs/prepare.md"
PIECE = 2**23
Action = Callable[[], None]


def photographs(folder: Path, n: int, side: int, suffix: str) -> list[Path]:
    """Images with some detail: smooth fields of color with grain."""
    folder.mkdir(parents=True)
    gen = np.random.default_rng(0)
    small = gen.integers(0, 256, (max(side // 8, 2), max(side // 8, 2), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    for i in range(n):
        pixels = np.clip(smooth + gen.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}{suffix}", quality=90)
    return sorted(folder.iterdir())


def decode(file: Path, size: int | None) -> int:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.asarray(image).nbytes


def decode_all(files: Sequence[Path], size: int | None, threads: int) -> None:
    if threads == 1:
        for file in files:
            decode(file, size)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(partial(decode, size=size), files, chunksize=32):
            pass


def copy(source: Path, target: Path) -> None:
    """Reads and writes without looking at a byte."""
    with open(source, "rb") as old, open(target, "wb") as new:
        while piece := old.read(PIECE):
            new.write(piece)
        new.flush()
        os.fsync(new.fileno())


def timed(action: Action) -> tuple[float, float]:
    """Seconds that pass, and seconds of processors."""
    began, used = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began, time.process_time() - used


def row(name: str, amount: float, unit: str, bare: Action, ours: Action, rounds: int, out: Path) -> str:
    """A row of the table: both rates, and their ratio."""

    def anew(action: Action) -> tuple[float, float]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        return timed(action)

    anew(bare), anew(ours)  # the files are in memory afterwards, and nothing is imported any more
    pairs = [(anew(bare), anew(ours)) for _ in range(rounds)]
    wall = [statistics.median(pair[k][0] for pair in pairs) for k in (0, 1)]
    ratios = sorted(one[0] / other[0] for one, other in pairs)
    work = statistics.median(one[1] / other[1] for one, other in pairs)
    rates = " | ".join(f"{amount / seconds:,.0f} {unit}" for seconds in wall)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    line = f"| {name} | {rates} | {spread} | {work:.2f} |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times as many images, and as large an array"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/prepare.md")
    arguments = parser.parse_args()
    cores, place = len(os.sched_getaffinity(0)), Path(tempfile.mkdtemp(prefix="distmatch-prepare-"))
    lines = [
        "| source | bare | `prepare` | ratio of rates (range) | of processor times |",
        "|---|---|---|---|---|",
    ]

    def ours(source: Path, workers: int, size: int | None = None) -> None:
        with quietly():
            prepare(
                source,
                place / "out/store",
                size=(size, size) if size else None,
                workers=workers,
            )

    kinds = (
        ("JPEG 512x512, resized to 256x256", 512, ".jpg", 256, 360),
        ("JPEG 256x256", 256, ".jpg", None, 2400),
        ("PNG 256x256", 256, ".png", None, 800),
        ("PNG 32x32", 32, ".png", None, 12000),
    )
    try:
        for name, side, suffix, size, n in kinds:
            files = photographs(place / "images", int(n * arguments.scale), side, suffix)
            for threads in sorted({1, cores}):
                words = f"{name}, {threads} thread{'s' * (threads > 1)}"
                bare, made = (
                    partial(decode_all, files, size, threads),
                    partial(ours, place / "images", threads, size),
                )
                lines.append(row(words, len(files), "images/s", bare, made, arguments.rounds, place / "out"))
            if side == 512:
                with tarfile.open(place / "images.tar", "w") as tar:
                    for file in files:
                        tar.add(file, file.name)
                bare, made = (
                    partial(decode_all, files, size, cores),
                    partial(ours, place / "images.tar", cores, size),
                )
                lines.append(
                    row(
                        f"the same in a tar, {cores} threads",
                        len(files),
                        "images/s",
                        bare,
                        made,
                        arguments.rounds,
                        place / "out",
                    )
                )
            shutil.rmtree(place / "images")
        n = int(2600 * arguments.scale)
        np.save(place / "x.npy", np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), dtype=np.uint8))
        size = (place / "x.npy").stat().st_size / 1e6
        bare, made = partial(copy, place / "x.npy", place / "out/copy"), partial(ours, place / "x.npy", cores)
        lines.append(
            row(f"array of {size:,.0f} MB", size, "MB/s", bare, made, arguments.rounds, place / "out")
        )
    finally:
        shutil.rmtree(place)
    if arguments.write:
        replace_section(PAGE, "prepare", "\n".join(lines))


if __name__ == "__main__":
    main()
