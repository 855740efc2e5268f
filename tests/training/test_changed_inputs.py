"""A run is resumed on the data that it began with, which are recognized by content."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command import TINY, command, contents, done


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
    return folder


def replace_quietly(file: Path) -> bytes:
    """Changes a pixel; size and times of the file stay. What it held before."""
    before, times = file.read_bytes(), os.stat(file)
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 64]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return before


def test_an_image_that_was_replaced_is_noticed_on_resume(images: Path, tmp_path: Path) -> None:
    for line in (
        f"train --data {images} {TINY} --batch 4 --out {tmp_path}/teacher",
        f"distill --teacher {tmp_path}/teacher --method dmd2 --batch 4 --out {tmp_path}/student",
    ):
        out = Path(line.split()[-1])
        done(f"{line} --steps 5")
        before = replace_quietly(images / "3.bmp")
        held = contents(out)
        answer = command(f"{line.split()[0]} --resume --out {out} --steps 6")
        assert answer.code == 2
        for words in ("keeps its data", "Got: data with the sha256", "Expected: the same samples", "Fix: "):
            assert words in answer.err
        assert contents(out) == held
        ahead = command(f"{line.split()[0]} --resume --out {out} --steps 6 --dry-run")
        assert (ahead.code, ahead.err) == (2, answer.err)
        (images / "3.bmp").write_bytes(before)
        done(f"{line.split()[0]} --resume --out {out} --steps 6")


def test_runs_of_before_their_data_were_recorded_are_resumed(images: Path, tmp_path: Path) -> None:
    done(f"train --data {images} {TINY} --batch 4 --steps 2 --out {tmp_path}/run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"data_sha256"', '"other"'))
    replace_quietly(images / "3.bmp")
    done(f"train --resume --out {tmp_path}/run --steps 3")


def test_a_dry_run_continues_from_the_checkpoint_that_the_run_would(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(f"train --data ring8 {TINY} --batch 4 --steps 4 --checkpoint-every 2 --out {out}")
    held = contents(out)
    for which, step in (("", 4), ("2", 2), (f"{out}/checkpoints/step-000002", 2)):
        ahead = done(f"train --resume {which} --out {out} --steps 9 --dry-run --json").json()
        assert ahead["continues_from"] == step
    cut = out / "checkpoints/step-000004/state.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    for which in ("9", "nowhere", "4"):
        line = f"train --resume {which} --out {out} --steps 9"
        ahead, answer = command(f"{line} --dry-run"), command(line)
        assert (ahead.code, ahead.err) == (2, answer.err)
    assert contents(out).keys() == held.keys()
