"""Video and sequences through the commands, on runs that take a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distmatch as dm
from distmatch.diffusion.trajectory import coarse
from tests.helpers.command import command, done

NET = "--net dit --width 12 --depth 1 --heads 1"
SHORT = "--steps 4 --batch 16 --device cpu"


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with data, a teacher and a student of either kind."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        x = np.random.default_rng(0).normal(size=(60, 7, 2)).cumsum(1)
        np.savez("walks.npz", x=10 * x, kind="sequence")
        for name, data, patch_size in (("v", "moving-digits", 4), ("s", "walks.npz", 1)):
            done(f"train --data {data} {NET} --patch {patch_size} {SHORT} --out {name}/t")
            done(f"distill --teacher {name}/t {SHORT} --fake-score-steps 1 --out {name}/student")
        yield folder


@pytest.mark.slow
def test_a_dry_run_says_what_was_found() -> None:
    found = done("train --data walks.npz --dry-run --json").json()
    assert (found["found"]["kind"], found["found"]["shape"]) == ("sequence", [7, 2])
    assert found["options"]["net"]["net"] in ("dit", "dit-small")
    done("train --data moving-digits --dry-run --grid clips.png")
    with Image.open("clips.png") as picture:
        assert getattr(picture, "n_frames", 1) == 8
    done("train --data walks.npz --dry-run --grid walks.png")
    with Image.open("walks.png") as picture:
        assert picture.size[0] > 300


def test_video_is_measured_and_shown() -> None:
    metrics = done("evaluate v/student --features pixels --n 12 --json").json()
    for model in ("reference", "teacher", "student"):
        assert metrics[model]["frame_fd"]["n"] == 12
        assert metrics[model]["motion"]["value"] > 0
    text = done("evaluate v/student --features pixels --n 12").out
    assert "frame_fd" in text
    assert "motion" in text
    done("report v/student")
    page = Path("v/student/report.html").read_text()
    assert page.count('media="(prefers-reduced-motion: reduce)"') == 3
    assert "Motion" in page


def test_the_layout_of_video_is_that_of_its_frames() -> None:
    x = torch.randn(3, 2, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([coarse(x[:, :, t]) for t in range(5)], 2)
    assert coarse(x).shape == (3, 10, 4, 4)
    torch.testing.assert_close(coarse(x).reshape(frames.shape), frames)


def test_samples_of_video_go_to_every_form_and_come_back() -> None:
    done("sample v/student --n 9 --out clips.npz")
    with np.load("clips.npz") as file:
        x = file["x"]
    assert (x.shape, x.dtype) == ((9, 8, 8, 8, 1), np.uint8)
    assert dm.load_data("clips.npz").shape == (1, 8, 8, 8)
    done("sample v/student --n 9 --out grid.png")
    done("sample v/student --n 9 --out folder")
    files = sorted(Path("folder").rglob("*.png"))
    assert len(files) == 9
    for file in files:
        with Image.open(file) as picture:
            assert (getattr(picture, "n_frames", 1), picture.size) == (8, (8, 8))
            for t in range(8):
                picture.seek(t)
                np.testing.assert_array_equal(np.asarray(picture), x[int(file.stem), t, ..., 0])
    told = done("sample v/t --n 9 --steps 3 --trajectory clips-way.png --json").json()["decided"]
    assert 0 < told["0.9"] <= told["0.5"]
    with Image.open("clips-way.png") as picture:
        assert getattr(picture, "n_frames", 1) == 8
    answer = command("train --data folder --steps 1 --out no")
    assert answer.code == 2
    assert "is animated" in answer.err
    assert not Path("no").exists()
    answer = command("sample v/student --n 2 --out clips.csv")
    assert answer.code == 2
    assert "for videos" in answer.err


def test_sequences_go_to_every_form_and_come_back() -> None:
    done("evaluate s/student --n 12 --json")
    done("report s/student")
    assert "as curves" in Path("s/student/report.html").read_text()
    answer = done("sample s/student --n 30 --clip --json --out walks-again.npz").json()
    assert 0 <= answer["outside_range"] <= 1
    again, real = dm.load_data("walks-again.npz"), dm.load_data("walks.npz")
    assert (again.kind, again.shape) == ("sequence", (7, 2))
    assert bool((again.raw.amin((0, 1)) >= real.raw.amin((0, 1)) - 1e-4).all())
    assert bool((again.raw.amax((0, 1)) <= real.raw.amax((0, 1)) + 1e-4).all())
    values = done("evaluate walks-again.npz --data walks.npz --json").json()
    assert values["samples"]["fd"]["value"] > 0
    done("sample s/student --n 9 --out curves.png")
    for form in ("curves.csv", "folder-of-curves"):
        answer = command(f"sample s/student --n 9 --out {form}")
        assert answer.code == 2
        assert "for sequences" in answer.err
        assert not Path(form).exists()
    told = done("sample s/t --n 9 --trajectory way.png --json").json()["decided"]
    assert 0 < told["0.9"] <= told["0.5"]
    with Image.open("way.png") as picture:
        assert picture.format == "PNG"
