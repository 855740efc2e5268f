"""Solvers, grids and guidance on the command line, and what they cost as counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.solvers import grid, sample_teacher
from distmatch.training.sampling import Sampling, draw_teacher
from distmatch.training.teachers import load_teacher
from tests.helpers.command import SHORT, TINY, command, done

N = 20


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a conditional teacher ``t``, a weaker one ``weak`` and a student ``s``."""
    folder = tmp_path_factory.mktemp("solvers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Long enough for the class to make a difference.
        done(f"train {TINY} --steps 150 --batch 64 --lr 5e-3 --lr-rampup 5 --ema-half-life 5 --out t")
        done(f"train {TINY} --steps 2 --batch 32 --out weak")
        done(f"train {TINY} {SHORT} --path vp --prediction eps --out noise")
        done(f"distill --teacher t {SHORT} --method diff-instruct --out s")
        yield folder


def sampled(options: str, model: str = "t") -> tuple[np.ndarray, int]:
    """Samples and calls of a command line."""
    told = done(f"sample {model} --n {N} --overwrite --json {options}").json()
    return np.load("samples.npz")["x"], told["nfe"]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ("", 35),
        ("--steps 5", 9),
        ("--solver dpmpp-2m --steps 10", 10),
        ("--solver tab:3 --steps 7 --grid power", 7),
        ("--solver ghvb:1.8 --steps 8 --grid log", 8),
        ("--solver rhork:rk4 --steps 4 --grid uniform", 13),
        ("--solver ddim:1 --steps 6", 6),
        ("--solver pc --steps 3 --grid time --path cosine", 6),
        ("--solver dpmpp-2m --steps 10 --guidance 2", 20),
        ("--guidance 0.5 --steps 5", 18),
        ("--guidance 2 --guidance-reference weak --solver ddim --steps 5", 10),
    ],
)
def test_calls_are_those_of_the_solver(options: str, calls: int) -> None:
    x, counted = sampled(options)
    assert x.shape == (N, 8, 8)
    assert counted == calls


def test_an_interval_is_paid_for_where_it_guides() -> None:
    levels = grid("karras", 12, 0.002, 80.0)[:-1]
    inside = int(((levels > 0.3) & (levels <= 4)).sum())
    assert 0 < inside < 12
    x, calls = sampled("--solver dpmpp-2m --steps 12 --guidance 3 --guidance-interval 0.3 4")
    assert calls == 12 + inside
    everywhere, _ = sampled("--solver dpmpp-2m --steps 12 --guidance 3")
    nowhere, _ = sampled("--solver dpmpp-2m --steps 12")
    assert not np.array_equal(x, everywhere)
    assert not np.array_equal(x, nowhere)
    never, calls = sampled("--solver dpmpp-2m --steps 12 --guidance 3 --guidance-interval 90 inf")
    assert calls == 12
    assert np.array_equal(never, nowhere)


def test_a_model_that_guides_itself_changes_nothing() -> None:
    plain, _ = sampled("--solver ddim --steps 4")
    guided, _ = sampled("--solver ddim --steps 4 --guidance 2.5 --guidance-reference t")
    # D + 2.5 (D - D), and the network saw the same batch: the same but for rounding before uint8.
    assert np.abs(plain.astype(int) - guided.astype(int)).max() <= 1


def test_noise_belongs_to_the_sample_whatever_the_batch() -> None:
    whole, _ = sampled("--solver ddim:1 --steps 5")
    parts, _ = sampled("--solver ddim:1 --steps 5 --batch 7")
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1
    other, _ = sampled("--solver ddim:1 --steps 5 --seed 1")
    assert not np.array_equal(whole, other)


def test_the_path_is_the_teachers_own_unless_another_is_named() -> None:
    own, _ = sampled("--solver tab:2 --steps 6", "noise")
    named, _ = sampled("--solver tab:2 --steps 6 --path vp", "noise")
    other, _ = sampled("--solver tab:2 --steps 6 --path cosine", "noise")
    assert np.array_equal(own, named)
    assert not np.array_equal(own, other)
    settings = Sampling()
    assert settings.path_for(load_teacher("noise")).name == "vp"
    assert settings.path_for(GaussianMixture([1.0], [[0.0]], [1.0])).name == "vp"
    assert Sampling(path="vp:beta_max=12").path_for(load_teacher("t")) == noise_path("vp", beta_max=12.0)


def test_drawing_is_what_the_parts_give() -> None:
    mixture = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], [0.04, 0.09], classes=[0, 1])
    labels = torch.arange(N) % 2
    settings = Sampling(solver="tab:2", steps=6, grid="power", guidance=2.0, interval=(0.1, 9.0))
    drawn = draw_teacher(mixture, N, labels, 3, settings)
    levels = grid("power", 6, mixture.sigma_min, mixture.sigma_max, path="vp")
    guided = Guided(mixture, 2.0, interval=(0.1, 9.0))
    x = sample_teacher(guided, N, solver="tab:2", grid=levels, path="vp", conditioning=labels, seed=3)
    assert torch.equal(drawn.x, x)
    assert drawn.nfe == 6 + int(((levels > 0.1) & (levels <= 9)).sum())


def test_evaluation_counts_the_calls_of_another_solver() -> None:
    found = done("evaluate t --n 100 --solver dpmpp-2m --steps 6 --guidance 1.5 --json").json()
    assert found["teacher"]["nfe"] == 12
    events = Path("t/log.jsonl").read_text()
    assert '"solver": "dpmpp-2m"' in events
    assert '"guidance": 1.5' in events


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample s --solver dpmpp-2m", ("student", "--solver", "teachers")),
        ("sample s --guidance-interval 1 2 --grid log", ("--grid, --guidance-interval",)),
        ("sample t --solver dpm", ("unknown solver", "dpm")),
        ("sample t --grid linear", ("--grid", "linear")),
        ("sample t --path straight", ("unknown", "straight")),
        ("sample t --solver tab --path kinetic-optimal", ("train a teacher with --path kinetic-optimal",)),
        ("sample t --path vp", ("does nothing", "--grid time")),
        ("sample t --solver tab --path vp:beta=3", ("vp", "beta")),
        ("sample t --solver dpmpp-2m --steps 1", ("at least 2 steps", "--steps 2")),
        ("sample t --steps 0", ("steps of a sampling grid", "--steps 1 or more")),
        ("sample t --steps 100000000", ("too many steps", "at most")),
        ("sample t --guidance nan", ("guidance", "nan")),
        ("sample t --guidance 2 --guidance-interval 5 1", ("interval", "low", "high")),
        ("sample t --guidance-interval 1 5", ("no effect", "--guidance 2")),
        ("sample t --guidance-reference weak", ("no effect", "--guidance 2")),
        ("sample t --guidance 2 --guidance-reference s", ("student", "not a teacher")),
        ("sample t --guidance 2 --guidance-reference ring8", ("the same samples",)),
        ("sample ring8 --guidance 2", ("conditional teacher",)),
        ("evaluate t --n 50 --solver dpm", ("unknown solver",)),
        ("evaluate t --n 50 --guidance inf", ("guidance", "finite")),
    ],
)
def test_mistakes_are_explained_before_anything_is_written(line: str, said: tuple[str, ...]) -> None:
    Path("samples.npz").unlink(missing_ok=True)
    answer = command(line)
    assert answer.code == 2, answer.err
    assert all(text in answer.err for text in said), answer.err
    assert not Path("samples.npz").exists()
