"""The page of solvers in pictures, the benchmark behind its tables, and the recipes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distmatch.cli.parse import options_from
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import find_solver
from distmatch.nets.build import build_net
from distmatch.nets.text import TextInput
from distmatch.training.options import TrainOptions
from distmatch.training.sampling import draw_teacher

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/solvers-and-guidance.md").read_text()


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("benchmarks/quality_against_calls.py")


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return script("docs/make_solver_pictures.py")


def test_the_page_has_its_pictures_and_they_are_small() -> None:
    names = re.findall(r"\]\((pictures/[^)]+)\)", PAGE)
    assert len(names) == 4
    assert all(10_000 < (ROOT / "docs" / name).stat().st_size < 150_000 for name in names)


@pytest.mark.parametrize("calls", [5, 9, 10, 35])
@pytest.mark.parametrize("solver", ["heun", "ddim", "dpmpp-2m", "tab:3", "ipndm:3", "rhork:rk4", "pc"])
def test_runs_use_the_calls_that_they_may_and_no_more(benchmark: ModuleType, solver: str, calls: int) -> None:
    how = benchmark.settings(solver, calls)
    mixture = GaussianMixture([1.0], [[0.0, 1.0]], [0.5])
    used = draw_teacher(mixture, 3, None, 0, how).nfe
    a_step = {"heun": 2, "pc": 2, "rhork:rk4": 4}.get(solver, 1)
    assert calls - a_step < used <= calls


def test_a_solver_that_needs_more_calls_is_left_out(benchmark: ModuleType) -> None:
    assert benchmark.settings("ipndm:4", 3) is None
    assert benchmark.settings("rk45", 10) is None
    assert find_solver("ipndm:4").least_steps == 4


def test_what_counts_as_divergent(benchmark: ModuleType) -> None:
    fine = torch.zeros(5, 1, 4, 4)
    x = fine.clone()
    x[1] += 0.49
    x[2] += 0.51
    x[3, 0, 0, 0] = float("nan")
    x[4, 0, 0, :2] = 1.6  # 2 of 16 values: more than a tenth, at a distance of 0.57
    assert benchmark.divergent(x, fine).tolist() == [False, False, True, True, True]
    assert benchmark.out_of_range(x).tolist() == [False, False, False, False, True]


def test_the_pictures_show_what_they_say(pictures: ModuleType, tmp_path: Path) -> None:
    start = pictures.HIGH * torch.linspace(-1.8, 1.8, 11, dtype=torch.float64)[:, None]
    _, exact, _ = pictures.paths_of("rhork:rk4", 400, start)

    def quantile(y: torch.Tensor, level: float) -> torch.Tensor:
        mixture = pictures.LINE
        width = (mixture.covariances[:, 0, 0] + level**2).sqrt()
        return (mixture.weights * torch.special.ndtr((y[:, None] - mixture.means[:, 0]) / width)).sum(1)

    # In one dimension the exact flow keeps the share of the distribution that lies below.
    assert torch.allclose(quantile(exact[-2], pictures.LOW), quantile(start[:, 0], pictures.HIGH), atol=1e-4)
    errors = {}
    for solver, steps in pictures.COMPARED.items():
        _, states, calls = pictures.paths_of(solver, steps, start)
        assert calls == pictures.CALLS
        errors[solver] = float((states[-1] - exact[-1]).abs().mean())
    assert errors["tab:3"] < errors["ddim"] < errors["heun"]
    pictures.trajectories(tmp_path / "paths.svg")
    assert "<svg" in (tmp_path / "paths.svg").read_text()


def test_an_interval_pays_for_itself_alone(pictures: ModuleType) -> None:
    counted = []
    for interval in (None, (0.1, 0.5)):
        denoiser = CallCounter(pictures.guided(pictures.PLANE, 5.0, interval=interval))
        pictures.sample_teacher(denoiser, 2, steps=30, conditioning=torch.zeros(2, dtype=torch.int64))
        counted.append(denoiser.calls - 59)
    assert counted[0] == 59
    assert counted[1] / counted[0] == pytest.approx(0.1, abs=0.02)
    assert "a tenth of the extra calls" in " ".join(PAGE.split())


TEACHERS = {
    "fashion_mnist": ((1, 28, 28), "solvers-and-guidance.md"),
    "moving_digits": ((1, 8, 8, 8), "video.md"),
    "captioned_digits": ((3, 8, 16), "text-to-image.md"),
}


def test_recipes_of_teachers_are_configs() -> None:
    recipes = {p.stem: p for p in (ROOT / "recipes").glob("*.toml") if 'verb = "train"' in p.read_text()}
    assert recipes.keys() == TEACHERS.keys()
    for name, (shape, page) in TEACHERS.items():
        options = options_from(TrainOptions, recipes[name], "train")
        assert recipes[name].name in (ROOT / "docs" / page).read_text()
        assert options.data.replace("-", "_") == name
        captions = options.data == "captioned-digits"
        text = TextInput(8, tokens=26) if captions else None
        net = build_net(options.net.resolve(shape, "cpu"), shape, 0 if captions else 10, text)
        count = sum(p.numel() for p in net.parameters())
        assert f"{count / 1e6:.2f} million" in recipes[name].read_text()
