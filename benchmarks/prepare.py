"""`distmatch prepare` against the bare decoder, and against bare writes to the same disk.

    python benchmarks/prepare.py             # all rows, ten minutes, 2 GB of disk
    python benchmarks/prepare.py --write     # and puts the table into docs/prepare.md

The decoder is Pillow alone: every image opened, converted to RGB, cropped and resized where the row says so,
and made an array, which is thrown away. Where decoding is cheap, writing is not: so `prepare` is also
compared with the same loop that writes each array to its place in one file and synchronizes it, which is the
least that a conversion does. For an array it is a loop that reads the source in pieces of 8 MiB and writes
them. Runs alternate; a row is the median of the rounds. What a run wrote is removed before the next one,
outside of the time that is taken. As a busy machine slows them in different ways, the processor time of the
decoder is compared as well.
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


def decode(file: Path, size: int | None) -> np.ndarray:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


def decode_all(files: Sequence[Path], size: int | None, threads: int, target: Path | None = None) -> None:
    """Decodes, and writes the arrays to a file where one is named."""
    handle = None if target is None else os.open(target, os.O_WRONLY | os.O_CREAT)

    def some(begin: int) -> None:
        for i in range(begin, min(begin + 32, len(files))):
            x = decode(files[i], size)
            if handle is not None:
                os.pwrite(handle, x, i * x.nbytes)

    begins = range(0, len(files), 32)
    if threads == 1:
        for begin in begins:
            some(begin)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(some, begins):
                pass
    if handle is not None:
        os.fsync(handle)
        os.close(handle)


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


def row(name: str, amount: float, unit: str, actions: Sequence[Action], rounds: int, out: Path) -> str:
    """A row of the table: rates of the bare loop and of `prepare`, and its ratios to both loops.

    Args:
        name: What is read.
        amount: How much of it.
        unit: Of the rates.
        actions: The bare loop, `prepare`, and the loop that writes as well.
        rounds: Runs of each.
        out: The folder that they write to.
    """

    def anew(action: Action) -> tuple[float, float]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        return timed(action)

    for action in actions:
        anew(action)  # the files are in memory afterwards, and nothing is imported any more
    runs = [[anew(action) for action in actions] for _ in range(rounds)]
    wall = [statistics.median(run[k][0] for run in runs) for k in (0, 1)]
    rates = " | ".join(f"{amount / seconds:,.0f} {unit}" for seconds in wall)
    shares = []
    for k in (0, 2):
        ratios = sorted(run[k][0] / run[1][0] for run in runs)
        shares.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    work = statistics.median(run[0][1] / run[1][1] for run in runs)
    line = f"| {name} | {rates} | {' | '.join(shares)} | {work:.2f} |"
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
    images, out = place / "images", place / "out"
    lines = [
        "| source | bare | `prepare` | of the bare rate | of decoding and writing | of processor time |",
        "|---|---|---|---|---|---|",
    ]

    def ours(source: Path, workers: int, size: int | None = None) -> None:
        with quietly():
            prepare(source, out / "store", size=(size, size) if size else None, workers=workers)

    def measure(name: str, source: Path, files: Sequence[Path], size: int | None, threads: int) -> None:
        actions = (
            partial(decode_all, files, size, threads),
            partial(ours, source, threads, size),
            partial(decode_all, files, size, threads, out / "pixels"),
        )
        name = f"{name}, {threads} thread{'s' * (threads > 1)}"
        lines.append(row(name, len(files), "images/s", actions, arguments.rounds, out))

    kinds = (
        ("JPEG 512x512, resized to 256x256", 512, ".jpg", 256, 360),
        ("JPEG 256x256", 256, ".jpg", None, 2400),
        ("PNG 256x256", 256, ".png", None, 800),
        ("PNG 32x32", 32, ".png", None, 12000),
    )
    try:
        for name, side, suffix, size, n in kinds:
            files = photographs(images, int(n * arguments.scale), side, suffix)
            for threads in sorted({1, cores}):
                measure(name, images, files, size, threads)
            if side == 512:
                with tarfile.open(place / "images.tar", "w") as tar:
                    for file in files:
                        tar.add(file, file.name)
                measure("the same in a tar", place / "images.tar", files, size, cores)
            shutil.rmtree(images)
        n = int(2600 * arguments.scale)
        np.save(place / "x.npy", np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), dtype=np.uint8))
        megabytes = (place / "x.npy").stat().st_size / 1e6
        bare = partial(copy, place / "x.npy", out / "copy")
        actions = (bare, partial(ours, place / "x.npy", cores), bare)
        lines.append(row(f"array of {megabytes:,.0f} MB", megabytes, "MB/s", actions, arguments.rounds, out))
    finally:
        shutil.rmtree(place)
    if arguments.write:
        replace_section(PAGE, "prepare", "\n".join(lines))


if __name__ == "__main__":
    main()
