"""`distmatch sample --out NAME.store`: memory, several processes, kill -9, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.cli.main import main
from distmatch.data import load_data
from distmatch.data.scaling import Scaling
from distmatch.data.store.layout import Field
from distmatch.data.store.reading import verify_store
from distmatch.data.store.rows import RowStore, Turns
from distmatch.interop import save_denoiser
from distmatch.training import sample_store
from tests.cli.test_processes import launch
from tests.helpers.processes import Forked, together
from tests.helpers.small import network_teacher

RING = "sample ring8 --n 3000 --steps 4 --batch 40"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def student(folder: Path, shape: tuple[int, ...] = (3, 8, 8), classes: int = 3) -> Path:
    torch.manual_seed(0)
    data = {"scaling": Scaling.for_images(0, 255, "bytes").to_dict(), "class_counts": [1, 2, 3]}
    save_denoiser(
        folder, network_teacher(classes, shape), {"kind": "student", "levels": [20.0], "data": data}
    )
    return folder


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring") / "ring.store"
    assert main([*RING.split(), "--out", str(folder)]) == 0
    return folder


def test_a_store_has_the_samples_of_a_file(ring: Path, tmp_path: Path) -> None:
    assert main([*RING.split(), "--out", str(tmp_path / "a.npz")]) == 0
    assert np.array_equal(np.load(ring / "x.npy"), np.load(tmp_path / "a.npz")["x"])
    assert verify_store(ring)["samples"] == len(load_data(str(ring))) == 3000
    index = json.loads((ring / "store.json").read_text())
    assert index["request"]["seed"] == 0
    assert len(index["blocks"]) == 38  # two batches each: 64 blocks or somewhat fewer


def test_images_with_classes_too(tmp_path: Path) -> None:
    line = f"sample {student(tmp_path / 'model')} --n 100 --seed 3 --batch 32 --out {tmp_path}"
    assert main(f"{line}/a.npz".split()) == main(f"{line}/a.store".split()) == 0
    one, data = np.load(tmp_path / "a.npz"), load_data(str(tmp_path / "a.store"))
    assert np.array_equal(data.raw.permute(0, 2, 3, 1).numpy(), one["x"])
    assert data.labels is not None
    assert np.array_equal(data.labels.numpy(), one["labels"])


def test_two_processes_write_the_bytes_of_one(ring: Path, tmp_path: Path) -> None:
    first, second = launch(tmp_path / "launch", f"{RING} --out {tmp_path}/two.store")
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert "samples/s" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    assert contents(tmp_path / "two.store") == contents(ring)


def test_other_options_in_a_process_are_refused_by_all(tmp_path: Path) -> None:
    line = f"{RING} --out {tmp_path}/two.store"
    first, second = launch(tmp_path / "launch", line, f"{line} --seed 1")
    assert (first["code"], second["code"]) == (2, 2)
    assert "need the same options" in first["err"]
    assert not (tmp_path / "two.store").exists()


def test_kill_9_and_resume_give_the_bytes_of_one_run(ring: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed.store"
    running = Forked([*RING.split(), "--out", str(folder)])
    until = time.monotonic() + 60
    while len(list(folder.glob("blocks/*.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.001)
    running.kill()
    running.communicate(60)
    assert not (folder / "store.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("blocks/*.json")}
    assert 2 <= len(kept) < 38
    assert main(["evaluate", str(folder), "ring8"]) == 2
    shutil.copytree(folder, tmp_path / "two.store")
    assert main([*RING.split(), "--out", str(folder), "--resume"]) == 0
    assert contents(folder) == contents(ring)
    launch(tmp_path / "launch", f"{RING} --resume --out {tmp_path}/two.store")
    assert contents(tmp_path / "two.store") == contents(ring)
    assert main([*RING.split(), "--out", str(folder), "--resume"]) == 0  # nothing is left to do
    assert contents(folder) == contents(ring)


def _peak(folder: str, name: str, n: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(f"sample {folder}/model --n {n} --batch 32 --out {folder}/{name}".split()) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path(folder, f"{name}.txt").write_text(str(grown // 1024))


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    student(tmp_path / "model", (3, 32, 32))
    sizes = {"few.store": 2000, "many.store": 8000, "many.npz": 8000}
    together(_peak, [(str(tmp_path), name, n) for name, n in sizes.items()])
    few, many, at_once = (int((tmp_path / f"{name}.txt").read_text()) for name in sizes)
    assert many < few + 20  # MiB, where the samples alone have 94 as floats
    assert at_once > few + 90


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (RING, "--overwrite"),
        (f"{RING} --seed 1 --resume", "seed 1"),
        (f"{RING.replace('ring8', 'grid25')} --resume", "another model"),
        (f"{RING.replace('--batch 40', '--batch 41')} --resume", "batch 41"),
        (f"{RING} --resume --overwrite", "omit one"),
        ("sample ring8 --n 1", "two samples"),
    ],
)
def test_a_store_is_left_as_it_is(
    ring: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(ring)
    assert main([*line.split(), "--out", str(ring)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert contents(ring) == before


@pytest.mark.parametrize("damage", ["cut", "gone", "record"])
def test_a_partial_block_is_refused(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a.store"
    with monkeypatch.context() as stop:
        stop.setattr(RowStore, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*RING.split(), "--out", str(folder)]) == 130
    assert "--resume" in capsys.readouterr().err
    if damage == "cut":
        with open(folder / "x.npy", "r+b") as file:
            file.truncate(500)
    elif damage == "gone":
        (folder / "x.npy").unlink()
    else:
        (folder / "blocks" / "000003.json").write_text("{}")
    before = contents(folder)
    assert main([*RING.split(), "--out", str(folder), "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err
    before.pop(".lock"), (after := contents(folder)).pop(".lock")
    assert after == before


def test_another_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.store").mkdir()
    (tmp_path / "mine.store" / "letter.txt").write_text("dear")
    for more in ([], ["--overwrite"], ["--resume"]):
        assert main([*RING.split(), "--out", str(tmp_path / "mine.store"), *more]) == 2
    assert contents(tmp_path / "mine.store") == {"letter.txt": b"dear"}
    assert main(f"{RING} --resume --out {tmp_path}/a.npz".split()) == 2
    assert "NAME.store" in capsys.readouterr().err


def test_captions_in_turn(tmp_path: Path) -> None:
    texts = ["a cat", "", "zwölf Boxkämpfer"]
    store = RowStore(tmp_path, (Field("x", "uint8", (1, 2, 2)),), 11, 4, Turns(texts))
    store.begin({}, "")
    for number in (2, 0, 1):
        rows = store.rows(number)
        store.write(number, [{"x": np.full((1, 1, 2, 2), i, np.uint8)} for i in rows])
    store.finish({}, (), Scaling.for_images(0, 255, "bytes"), ())
    data = load_data(str(tmp_path))
    assert data.raw[:, 0, 0, 0].tolist() == list(range(11))
    assert list(data.captions) == [texts[i % 3] for i in range(11)]
    verify_store(tmp_path)


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ({1: 10, 2: 19, 4: 30, 8: 31, 16: 90}, 4),  # no gain worth it
        ({1: 10, 2: 19, 4: 30, 8: 60}, 8),  # the largest that is tried
        ({1: 10, 2: 19, 4: 30, 8: None}, 4),  # out of memory
    ],
)
def test_the_size_of_batches_is_found(
    rates: dict[int, int | None], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(draw: object, size: int) -> int:
        if rates[size] is None:
            raise torch.OutOfMemoryError
        return rates[size] or 0

    monkeypatch.setattr(sample_store, "_rate", rate)
    assert sample_store.find_batch(lambda n: None, 8)[0] == found
