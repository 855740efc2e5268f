"""`evaluate` and `sample` in two processes: the numbers and files of one, and memory that is bounded."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.cli.main import main
from distmatch.data import load_data
from distmatch.metrics import chosen, evaluate
from distmatch.training import shared_draw
from tests.cli.test_processes import TRAIN, launch
from tests.helpers.processes import together


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    assert main([*TRAIN.split(), "--out", str(folder)]) == 0
    return folder


def values(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "metrics.json").read_text())
    return {
        f"{model} {name}": entry["value"]
        for model, entries in found.items()
        for name, entry in entries.items()
        if isinstance(entry, dict) and entry["value"] is not None
    }


def test_a_run_has_the_numbers_of_one_process(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "two")
    line = "evaluate {} --n 300 --steps 2 --batch 64"
    assert main(line.format(run).split()) == 0
    first, second = launch(tmp_path / "launch", line.format(tmp_path / "two"))
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert "the reference" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    one, two = values(run), values(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-6)
    for name in ("reference", "teacher"):
        mine, theirs = (np.load(folder / "samples" / f"{name}.npz") for folder in (tmp_path / "two", run))
        assert np.array_equal(mine["x"], theirs["x"])
    assert sorted(file.name for file in (tmp_path / "two" / "samples").iterdir()) == sorted(
        file.name for file in (run / "samples").iterdir()
    )
    events = (tmp_path / "two" / "log.jsonl").read_text()
    assert events.count('"evaluate"') == 1


@pytest.mark.slow
def test_samples_against_data_too(tmp_path: Path) -> None:
    assert main(f"sample ring8 --n 3000 --steps 4 --out {tmp_path}/a.store --batch 100".split()) == 0
    line = f"evaluate {tmp_path}/a.store ring8 --json"
    first, second = launch(tmp_path / "launch", line)
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    store, ring = load_data(str(tmp_path / "a.store")), load_data("ring8")
    x = ring.scaling.to_model(store.raw)
    alone = evaluate(x, ring, features="pixels")
    together_ = json.loads(first["out"])["samples"]
    for name, estimate in alone.items():
        if name in together_ and "kl" not in name and name not in ("modes", "js"):
            assert together_[name]["value"] == pytest.approx(estimate.value, rel=1e-6), name


@pytest.mark.parametrize("form", ["a.npz", "a.csv"])
def test_two_processes_sample_the_file_of_one(form: str, tmp_path: Path) -> None:
    line = "sample ring8 --n 500 --steps 4 --batch 40 --out {}/" + form
    (tmp_path / "one").mkdir()
    assert main(line.format(tmp_path / "one").split()) == 0
    first, second = launch(tmp_path / "launch", line.format(tmp_path))
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert (tmp_path / form).read_bytes() == (tmp_path / "one" / form).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [form, "launch", "one"]


def test_samples_in_a_file_are_those_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torch.randn(50, 2, 3)
    monkeypatch.setattr(shared_draw, "_IN_MEMORY", 0)
    monkeypatch.setattr(shared_draw, "_NUMBERS", 50)
    found = shared_draw.filled(50, (2, 3), lambda a, n: source[a : a + n], batch=4, place=tmp_path)
    assert torch.equal(found, source)
    assert not list(tmp_path.iterdir())


def _measured(folder: str, name: str) -> None:
    images = load_data(f"{folder}/images.store")
    given = images if name == "store" else images.batch(torch.arange(len(images)))[0]

    def features(x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    evaluate(images.subset(torch.arange(50)), images.subset(torch.arange(50)), features=features, n=20)
    chosen._NUMBERS = 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(given, images, features=features, n=300)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path(folder, f"{name}.txt").write_text(str(grown // 1024))


def test_memory_of_an_evaluation_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (600, 96, 96, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    assert main(f"prepare {tmp_path}/images.npy --out {tmp_path}/images.store".split()) == 0
    together(_measured, [(str(tmp_path), "store")])
    assert int((tmp_path / "store.txt").read_text()) < 90  # MiB, where generated and real samples have 127
