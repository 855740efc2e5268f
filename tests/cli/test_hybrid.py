"""`distmatch sample` with a teacher for the first calls, and the picture of when it decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distmatch as dm
from distmatch.diffusion.solvers import grid
from tests.helpers.command import SHORT, TINY, command, done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a conditional teacher ``t`` of digits and its student ``s``."""
    folder = tmp_path_factory.mktemp("hybrid")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        done(f"train {TINY} {SHORT} --out t")
        done(f"distill --teacher t {SHORT} --method diff-instruct --out s")
        yield folder


def test_the_command_line_counts_both(place: Path) -> None:
    told = done("sample s --hybrid-teacher t --n 20 --guidance 2 --json --overwrite").json()
    start = 5 * dm.load_teacher("t").sigma_data  # where a student starts by default
    above = int((grid("karras", 18, 0.002, 80.0) > start).sum())
    assert told["model"] == "hybrid"
    assert told["handover"] == pytest.approx(start)
    assert told["nfe"] == 2 * 2 * above + 1
    alone = np.load("samples.npz")["x"]
    done(f"sample s --hybrid-teacher t --hybrid-level {told['handover']} --n 20 --guidance 2 --overwrite")
    assert np.array_equal(np.load("samples.npz")["x"], alone)


def test_the_ends_of_the_command_line_are_student_and_teacher(place: Path) -> None:
    for calls, model, nfe in ((0, "s", 1), (2, "t", 35)):
        told = done(
            f"sample s --hybrid-teacher t --hybrid-calls {calls} --n 20 --json --out h{calls}.npz"
        ).json()
        assert told["nfe"] == nfe
        done(f"sample {model} --n 20 --out {model}.npz")
        assert np.array_equal(np.load(f"h{calls}.npz")["x"], np.load(f"{model}.npz")["x"])


def test_the_picture(place: Path) -> None:
    told = done("sample t --trajectory way.png --n 12 --json").json()
    assert "out" not in told
    assert told["decided"]["0.5"] > told["decided"]["0.9"] > 0
    assert not Path("samples.npz").exists() or told.get("nfe") is None
    first = Image.open("way.png").size
    done("sample s --hybrid-teacher t --trajectory both.png --out both.npz --n 12")
    second = Image.open("both.png").size
    assert second[0] > first[0]  # two columns more
    assert second[1] == first[1]
    assert np.load("both.npz")["x"].shape == (12, 8, 8)
    done("sample ring8 --trajectory ring.png --n 40 --steps 8 --solver ddim:1")
    assert Image.open("ring.png").size[0] > 100


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample s --hybrid-calls 2", "it needs --hybrid-teacher"),
        ("sample t --hybrid-level 2.5", "it needs --hybrid-teacher"),
        ("sample t --hybrid-teacher t", "needs a student"),
        ("sample s --hybrid-teacher s", "names a student"),
        ("sample s --hybrid-teacher ring8", "another shape"),
        ("sample s --hybrid-teacher t --hybrid-calls 9", "0 (the student alone) to 2 (the teacher alone)"),
        (
            "sample s --hybrid-teacher t --hybrid-calls 2 --hybrid-level 2.5",
            "determines where the student takes over",
        ),
        ("sample s --hybrid-teacher t --hybrid-level 7", "not trained to take over"),
        ("sample s --trajectory p.png", "the trajectory of a teacher"),
        ("sample t --trajectory p.jpg", "as a picture"),
        ("sample t --trajectory p.png --n 1", "several samples"),
        ("sample s --steps 9", "the steps and the guidance of a student"),
    ],
)
def test_refusals(place: Path, line: str, said: str) -> None:
    answer = command(f"{line} --overwrite")
    assert answer.code == 2
    assert said in answer.err
    assert not Path("p.png").exists()
