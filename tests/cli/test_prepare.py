"""`distmatch prepare`, and the commands that read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.base.files import load_tensors
from tests.helpers.command import SHORT, TINY, command, done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits, and teachers that were trained on it and on the digits themselves."""
    folder = tmp_path_factory.mktemp("prepare")
    done(f"prepare digits --out {folder}/digits")
    done(f"train --data {folder}/digits {TINY} {SHORT} --out {folder}/stored")
    done(f"train --data digits {TINY} {SHORT} --out {folder}/plain")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "model/model.safetensors")


def test_a_store_trains_as_its_source_does(place: Path) -> None:
    stored, plain = weights(place / "stored"), weights(place / "plain")
    for name, value in plain.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-6)
    found = done(f"train --data {place}/digits {TINY} --dry-run --json").json()["found"]
    plain_found = done(f"train --data digits {TINY} --dry-run --json").json()["found"]
    assert {**found, "name": "digits"} == plain_found


def test_every_verb_reads_a_store(place: Path) -> None:
    run = f"--teacher {place}/stored --method dmd2 {SHORT} --out {place}/student"
    done(f"distill {run} --data {place}/digits --checkpoint-every 3")
    whole = weights(place / "student")
    (place / "student/checkpoints/step-000006/state.json").unlink()
    done(f"distill --resume 3 --out {place}/student")
    assert all(torch.equal(value, whole[name]) for name, value in weights(place / "student").items())
    done(f"evaluate {place}/student -n 60 --features pixels")
    assert json.loads((place / "student/metrics.json").read_text())["student"]["fd"]
    line = f"compare --teacher {place}/stored --data {place}/digits --methods dmd2 --batch 32"
    done(f'{line} --budget "5 steps" --seeds 1 -n 50 --out {place}/compared')


def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    gen = np.random.default_rng(0)
    np.savez(tmp_path / "small.npz", x=gen.integers(0, 256, (40, 6, 6), dtype=np.uint8), y=np.arange(40) % 10)
    np.savez(tmp_path / "many.npz", x=gen.integers(0, 256, (40, 8, 8), dtype=np.uint8), y=np.arange(40) % 12)
    for name in ("small", "many"):
        done(f"prepare {tmp_path}/{name}.npz --out {tmp_path}/{name}")
    run = f"distill --teacher {place}/stored --method dmd2 {SHORT} --out {tmp_path}/run"
    answer = command(f"{run} --data {tmp_path}/small")
    assert answer.code == 2
    assert "(1, 8, 8), data (1, 6, 6)" in answer.err
    answer = command(f"{run} --data {tmp_path}/many")
    assert answer.code == 2
    assert "classes that the teacher does not have: 10, 11" in answer.err
    (tmp_path / "small/store.json").rename(tmp_path / "small/unfinished.json")
    answer = command(f"{run} --data {tmp_path}/small")
    assert answer.code == 2
    assert "is not complete" in answer.err
    assert not (tmp_path / "run").exists()


def test_doctor_verifies_a_store(place: Path, tmp_path: Path) -> None:
    assert done(f"doctor --store {place}/digits --json").json() == {
        "store": f"{place}/digits",
        "samples": 1797,
        "ok": True,
    }
    done(f"prepare digits --out {tmp_path}/store")
    content = bytearray((tmp_path / "store/x.npy").read_bytes())
    content[5000] ^= 4
    (tmp_path / "store/x.npy").write_bytes(content)
    answer = command(f"doctor --store {tmp_path}/store")
    assert answer.code == 2
    assert "x.npy, block 0 of 1: another hash" in answer.err
    assert command(f"doctor --store {tmp_path}").code == 2


def test_bad_images_end_the_command_or_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/3.png").write_bytes(b"no image")
    line = f"prepare {tmp_path}/in --out {tmp_path}/store --size 6 8"
    answer = command(line)
    assert (answer.code, answer.out) == (2, "")
    assert "1 of 5 items" in answer.err
    assert "3.png: cannot read the image" in answer.err
    answer = done(f"{line} --skip-bad")
    assert "4 samples of 3x6x8 (uint8)" in answer.out
    assert "skipped 1 of 5 items" in answer.out
    assert command(f"{line} --skip-bad").code == 2
    assert command(f"prepare {tmp_path}/none --out {tmp_path}/other").code == 2
    assert command(f"prepare {tmp_path}/in --out {tmp_path}/other --size 0").code == 2
    assert command(f"prepare {tmp_path}/in --out {tmp_path}/other --workers 0").code == 2
    assert not (tmp_path / "other").exists()
