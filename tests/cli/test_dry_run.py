"""What a dry run says of data, time and network, and which network is the default."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distmatch as dm
from distmatch.base.progress import in_words
from distmatch.cli import found
from distmatch.methods.table import find_method
from distmatch.training.comparison.cost import PeakMemory
from distmatch.training.options import NetOptions, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from tests.helpers.command import TINY, command, contents, done


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with images of 12x10 in two classes, without classes, and a table."""
    folder = tmp_path_factory.mktemp("dry")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        x = rng.integers(0, 200, (70, 12, 10, 3), dtype=np.uint8)
        x[0, 0, 0] = 0, 199, 7
        names = ["cat", "dog"]
        np.savez("pets.npz", x=x, labels=np.repeat([0, 1], [50, 20]), class_names=names)
        rows = ["price,size", *(f"{100 + 3 * k},{-k / 4}" for k in range(40))]
        Path("flats.csv").write_text("\n".join(rows))
        yield folder


def test_a_dry_run_says_what_it_found_in_the_data() -> None:
    line = "train --data pets.npz --net unet --width 4 --blocks 1 --batch 4 --dry-run"
    found = done(f"{line} --json").json()["found"]
    assert found.pop("scaling") == "uint8 images, 0..255"
    assert found == {
        "name": "pets.npz",
        "kind": "image",
        "samples": 70,
        "shape": [3, 12, 10],
        "classes": {"cat": 50, "dog": 20},
        "range": [0.0, 199.0],
    }
    text = done(line).out
    assert "# data        pets.npz: 70 images of 3x12x10, values from 0 to 199" in text
    assert "# classes     2: cat 50, dog 20" in text
    text = done(f"train --data flats.csv {TINY} --batch 8 --dry-run").out
    assert "# data        flats.csv: 40 vectors of 2, values from -9.75 to 217" in text
    assert "# classes     none" in text
    assert "# columns     2: price, size" in text
    text = done(f"distill --teacher ring8 {TINY} --batch 8 --fit-steps 1 --dry-run").out
    assert "# data        ring8: 20,000 vectors of 2" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7199, "2 h 00 min"), (104608, "29 h 03 min")],
)
def test_times_are_in_hours_and_minutes(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
    assert re.search(r"# time        about \d+ (s|min) ", done(f"train {TINY} --batch 8 --dry-run").out)


def test_a_long_training_has_a_shorter_one_proposed() -> None:
    line = f"train {TINY} --batch 128 --dry-run --steps"
    text = done(f"{line} 10_000_000").out
    whole, shorter = (re.search(rf"# {name} .*about (\d+) h (\d+) min", text) for name in ("time", "shorter"))
    assert whole
    assert shorter
    hours = [int(m[1]) + int(m[2]) / 60 for m in (whole, shorter)]
    assert hours[1] == pytest.approx(hours[0] / 2, abs=0.02)
    assert "shorter" not in done(f"{line} 10").out
    distill = f"distill --teacher ring8 {TINY} --batch 128 --dry-run --steps 10_000_000"
    assert "# shorter" in done(f"{distill} --method diff-instruct").out
    assert "# shorter" not in done(f"{distill} --method dpm-ot --bank 16 --bank-steps 2").out


@pytest.mark.parametrize("data", ["pets.npz --net mlp --width 8 --depth 1", f"flats.csv {TINY}"])
def test_a_grid_of_the_data_is_all_that_a_dry_run_writes(data: str, place: Path) -> None:
    line = f"train --data {data}"
    before = contents(place)
    text = done(f"{line} --batch 8 --dry-run --grid seen.png").out
    assert "# grid        seen.png" in text
    after = contents(place)
    assert set(after) - set(before) == {"seen.png"}
    assert Image.open("seen.png").size > (100, 100)
    assert command(f"{line} --batch 8 --dry-run --grid seen.png").code == 2
    done(f"{line} --batch 8 --dry-run --grid seen.png --overwrite")
    assert contents(place) == after  # the same samples again
    os.unlink("seen.png")


def test_the_images_of_a_grid_are_in_the_order_of_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(found, "write_samples", lambda *given: written.append(given))
    data = dm.load_data("pets.npz")
    found.write_grid(Path("a.png"), data, seed=0, overwrite=False)
    ((_, x, labels, _),) = written
    assert labels.tolist() == sorted(labels.tolist())
    assert set(labels.tolist()) == {0, 1}
    assert data.labels is not None
    pixels = data.scaling.export(data.batch(torch.arange(70))[0])
    own = {image.tobytes(): int(label) for image, label in zip(pixels, data.labels, strict=True)}
    assert [own[image.tobytes()] for image in x] == labels.tolist()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"train {TINY} --out x --grid a.png", "part of a dry run"),
        (f"train {TINY} --dry-run --grid a.jpg", ".png"),
        ("distill --teacher ring8 --method diff-instruct --dry-run --grid flats.csv", ".png"),
        ("compare --teacher ring8 --methods sid --dry-run --grid a.png", "train and distill"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(line: str, words: str, place: Path) -> None:
    before = contents(place)
    answer = command(line)
    assert answer.code == 2
    assert words in answer.err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("method", "divergence"), [("f-distill", "js"), ("dmd2", "reverse_kl"), ("consistency", None)]
)
def test_a_dry_run_shows_what_a_method_reads_and_its_divergence(method: str, divergence: str | None) -> None:
    line = f"distill --teacher ring8 --method {method} {TINY} --batch 8 --fit-steps 1 --dry-run"
    text = done(line).out
    end = f", divergence {divergence}" if divergence else ""
    assert f"# method      {method}{end}\n" in text
    shown = tomllib.loads(text)
    assert shown.get("divergence") == divergence
    tables = {name: set(value) for name, value in shown.items() if isinstance(value, dict)}
    own = find_method(method)
    assert tables.keys() == {"run", "net", "distill", "encoding", "watch"}
    assert own.has_fake_score == ("lr_fake_score" in tables["distill"])
    idle = {"lora_rank", "lora_alpha", "lora_targets", "base_dtype"}  # of --train full
    idle |= {"guidance_interval", "guidance_rescale", "negative_prompt", "noise_mean", "noise_std"}
    idle |= {"level_mean", "level_std"}
    assert own.options() - idle == tables["distill"]
    assert "# student     1 step, at noise level" in text  # ring8 has no time
    whole = done(f"{line} --json").json()["options"]
    assert whole["divergence"] == divergence
    assert own.options() == whole["distill"].keys()


def test_a_student_of_a_network_is_said_to_be_a_copy() -> None:
    done(f"train --data ring8 {TINY} --steps 1 --batch 8 --out own")
    text = done("distill --teacher own --method diff-instruct --batch 8 --dry-run").out
    assert "# network     copied from the teacher" in text
    assert "net" not in tomllib.loads(text)


def test_the_memory_of_the_steps_is_measured_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"train {TINY} --batch 20000 --dry-run"
    answer = done(f"{line} --json").json()
    known = PeakMemory(torch.device("cpu")).bytes() is not None
    if known:  # Linux; 17 numbers of a sample and layer of width 40, to say the least
        assert answer["peak_memory_mib"] > answer["memory_mib"] + 10
        assert re.search(
            r"# memory      about .*, with activations [\d,]+ MiB at most, measured", done(line).out
        )
    monkeypatch.setattr(PeakMemory, "bytes", lambda self: None)
    assert done(f"{line} --json").json()["peak_memory_mib"] is None
    assert "activations on top" in done(line).out


# ---- the default network


def test_images_get_a_small_unet_on_a_cpu_and_it_is_said(place: Path) -> None:
    line = "train --data pets.npz --batch 4 --device cpu --dry-run"
    answer = done(f"{line} --json").json()
    assert answer["options"]["net"]["net"] == "unet-small"
    assert answer["larger_net"]["net"] == "unet"
    assert answer["larger_net"]["parameters"] > 4 * answer["parameters"]["teacher"]
    ratio = answer["larger_net"]["estimated_seconds"] / answer["estimated_seconds"]
    assert ratio == pytest.approx(answer["larger_net"]["times_the_work"], rel=0.01)
    assert ratio > 5
    text = done(line).out
    assert 'net = "unet-small"' in text  # the config of a run says it, so that it goes on with it elsewhere
    share = re.search(r"--net unet, with ([\d,]+) parameters, would take about \d+", text)
    assert share
    assert int(share[1].replace(",", "")) == answer["larger_net"]["parameters"]
    for other in ("--net unet", "--net unet-small"):
        assert "larger_net" not in done(f"{line} {other} --width 4 --json").json()


def test_digits_and_vectors_keep_their_network() -> None:
    for data in ("digits", "ring8"):
        job = prepare_training(TrainOptions(data=data))
        assert job.options.net == NetOptions(net="mlp")
        assert not job.remarks


def test_a_run_that_began_on_a_cpu_keeps_its_network_elsewhere() -> None:
    began = NetOptions().settled((3, 12, 10), "cpu")
    assert began.net == "unet-small"
    assert began.settled((3, 12, 10), "cuda") == began
    assert began.resolve((3, 12, 10), "cuda") == NetOptions().resolve((3, 12, 10), "cpu")
    other = NetOptions().settled((3, 12, 10), "cuda")
    assert other.net == "unet"
    assert other.settled((3, 12, 10), "cpu") == other
    assert NetOptions().settled((1, 8, 8), "cpu") == NetOptions(net="mlp")


def test_a_run_says_which_network_it_took_and_goes_on_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).integers(0, 255, (40, 9, 9), dtype=np.uint8)
    np.savez("grey.npz", x=x)
    answer = done("train --data grey.npz --steps 2 --batch 4 --device cpu --out run")
    assert "network: unet-small, the default on a CPU" in answer.err
    assert 'net = "unet-small"' in Path("run/config.toml").read_text()
    done("train --out run --resume --steps 3")
    dm.train(x, steps=1, batch=4, device="cpu", quiet=True)
    assert "network" not in capfd.readouterr().err


def test_fewer_pairs_than_a_batch_are_warned_of() -> None:
    line = "distill --teacher ring8 --method dmd --pair-steps 2 --steps 12 --batch 16 --net mlp --dry-run"
    assert "warning     --pairs 8 is less than --batch 16" in done(f"{line} --pairs 8").out
    assert "is less than --batch" not in done(f"{line} --pairs 16").out
