"""Grids of noise levels, names of solvers, and answers to mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.noise import karras_grid
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.paths.discrete import betas, discrete_path
from distmatch.diffusion.solvers import (
    DDIM,
    GHVB,
    GRIDS,
    IPNDM,
    RK45,
    SOLVERS,
    Adams,
    DPMpp,
    DPMppSDE,
    EulerMaruyama,
    HeavyBall,
    Heun,
    PredictorCorrector,
    RhoRK,
    find_solver,
    grid,
    sample_teacher,
    snap_grid,
    solve,
)
from tests.reference.solver_cases import MIXTURE, START


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_have_their_ends_and_decrease(kind: str) -> None:
    for to_zero in (True, False):
        for steps in (1, 2, 17):
            levels = grid(kind, steps, 0.01, 50.0, path="vp", to_zero=to_zero)
            assert levels.dtype == torch.float64
            assert len(levels) == steps + 1
            assert levels[0] == 50
            assert bool((levels.diff() < 0).all())
            if to_zero:
                assert levels[-1] == 0
            if steps > 1 or not to_zero:
                assert levels[levels > 0][-1] == 0.01


def test_grids_are_even_in_what_they_say() -> None:
    path = noise_path("vp")
    even = {
        "karras": lambda s: s ** (1 / 7),
        "log": torch.log,
        "log-snr": lambda s: path.log_snr(path.t_of_rho(s)),
        "uniform": lambda s: s,
        "time": path.t_of_rho,
        "power": lambda s: path.t_of_rho(s) ** (1 / 3),
    }
    assert set(even) == set(GRIDS)
    for kind, function in even.items():
        steps = function(grid(kind, 11, 0.01, 50.0, path=path, kappa=3.0, to_zero=False)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(11), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(grid("karras", 18, 0.002, 80.0), karras_grid(18, 0.002, 80.0))


def test_grids_snap_to_the_levels_of_a_discrete_teacher() -> None:
    path = discrete_path((1 - betas("linear", 1000)).cumprod(0))
    wanted = grid("karras", 300, path.rho_min, path.rho_max)
    snapped = snap_grid(wanted, path)
    assert len(snapped) < len(wanted)  # the small levels of the grid fall together
    assert snapped[-1] == 0
    assert bool((snapped.diff() < 0).all())
    distance = (snapped[:-1, None] - path.levels.double()).abs().min(1).values
    assert float((distance / snapped[:-1]).max()) < 1e-12
    assert bool(solve(MIXTURE, START, snapped, "dpmpp-2m").y.isfinite().all())


def test_names_with_options_are_solvers() -> None:
    named = {
        "euler": RhoRK("euler"),
        "heun": Heun(),
        "heun:40": Heun(40.0),
        "ddim": DDIM(),
        "ddim:0.5": DDIM(0.5),
        "dpmpp-1": DPMpp(1),
        "dpmpp-2m": DPMpp(2),
        "dpmpp-sde": DPMppSDE(1),
        "dpmpp-2m-sde": DPMppSDE(2),
        "tab:2": Adams(2, "t"),
        "rhoab:1": Adams(1, "rho"),
        "rhork:kutta3": RhoRK("kutta3"),
        "ipndm:3": IPNDM(3),
        "hb:0.8:2": HeavyBall(0.8, 2),
        "hb-2m:0.7": DPMpp(2, 0.7),
        "ghvb:2.5": GHVB(2.5),
        "euler-maruyama:0": EulerMaruyama(0.0),
        "pc:0.1:2": PredictorCorrector(0.1, 2),
        "rk45:1e-7": RK45(1e-7),
    }
    for name, solver in named.items():
        assert find_solver(name) == solver
        assert find_solver(solver) is solver
    assert not EulerMaruyama(0.0).stochastic
    for name in SOLVERS:
        find_solver(name)


NOISE = SampleNoise(0, torch.arange(len(START)), (1,))


class NoScore:
    """A teacher whose noise is not Gaussian."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (1,), 0, 1.0, 0.002, 80.0
    gaussian_kernel = False

    def __call__(self, x, sigma, conditioning=None):
        return x / (1 + sigma[:, None] ** 2)


def run(levels: object, solver: object = "heun", **more: object) -> Callable[[], object]:
    return lambda: solve(MIXTURE, START, levels, solver, **more)


WRONG = {
    "one of karras": lambda: grid("karas", 5, 0.1, 1.0),
    "number of steps": lambda: grid("log", 0, 0.1, 1.0),
    "0 < sigma_min": lambda: grid("log", 5, 1.0, 0.1),
    "needs the time of a path": lambda: grid("time", 5, 0.1, 1.0),
    "power of a grid": lambda: grid("power", 5, 0.1, 1.0, path="vp", kappa=0),
    "levels to snap to": lambda: snap_grid(torch.tensor([1.0, 0.0]), noise_path("vp")),
    "at least two consecutive noise levels": run([]),
    "two consecutive noise levels": run([3.0]),
    "shape .2, 2.": run(torch.ones(2, 2)),
    "not finite": run([3.0, math.nan, 0.0]),
    "level that is not": run([math.inf, 1.0]),
    "repeats a noise level": run([3.0, 1.0, 1.0, 0.0]),
    "decrease strictly": run([3.0, 1.0, 2.0]),
    "stay non-negative": run([3.0, 1.0, -1.0]),
    "from data to noise": run([1.0, 2.0, 3.0], "ddim:1", noise=NOISE),
    "start at sigma 0": run([0.0, 2.0, 3.0]),
    "at least 4 steps": run([3.0, 2.0, 1.0], "rhoab:3"),
    "needs at least 2 steps": run([3.0, 0.0], "dpmpp-2m"),
    "received none": run([3.0, 0.0], "pc"),
    "not for this batch": run([3.0, 0.0], "pc", noise=SampleNoise(0, [1, 2], (1,))),
    "no path": run([3.0, 2.0, 1.0, 0.5], "tab:2"),
    "exceeds the path": run([5e150, 3e150, 2.0, 1.0], "tab:2", path="condot"),
    "gaussian_kernel": lambda: solve(NoScore(), START, [3.0, 1.0], "heun:10", noise=NOISE),
    "wrong shape": lambda: solve(MIXTURE, torch.zeros(3, 2), [3.0, 1.0]),
    "NaN or infinity in 2 of 3": lambda: solve(
        MIXTURE, torch.tensor([[0.0], [math.nan], [-math.inf]]), [3.0, 1.0]
    ),
    "floating point": lambda: solve(MIXTURE, torch.zeros(3, 1, dtype=torch.int64), [3.0, 1.0]),
    "did you mean heun": run([3.0, 1.0], "huen"),
    "too many options": run([3.0, 1.0], "euler:3"),
    "not a number": run([3.0, 1.0], "ddim:much"),
    "unknown Runge-Kutta": run([3.0, 1.0], "rhork:kuta3"),
    "eta of DDIM": run([3.0, 1.0], "ddim:1.5"),
    "degree": run([3.0, 1.0], "rhoab:6"),
    "order of iPNDM": run([3.0, 1.0], "ipndm:5"),
    "order of GHVB": run([3.0, 1.0], "ghvb:5.5"),
    "beta of heavy ball": run([3.0, 1.0], "hb:0"),
    "beta of heavy": run([3.0, 1.0], "hb-2m:1.2"),
    "order under heavy ball": run([3.0, 1.0], "hb:0.5:5"),
    "orders 1 and 2": lambda: DPMpp(3),
    "SDE-DPM-Solver": lambda: DPMppSDE(3),
    "churn settings": lambda: Heun(-1.0),
    "ratio h / g": lambda: EulerMaruyama(-1.0),
    "smallest noise ratio": run([3.0, 1.0], EulerMaruyama(lambda s: -1.0), noise=NOISE),
    "snr must be positive": lambda: PredictorCorrector(0.0),
    "step by step": lambda: PredictorCorrector(predictor=RK45()),
    "curvature of a grid": lambda: grid("karras", 5, 0.1, 1.0, rho=math.nan),
    "one condition for each": run([3.0, 0.0], conditioning=torch.zeros(1, dtype=torch.int64)),
    "float32": run([3.0, 0.0], conditioning=torch.zeros(len(START))),
    "batch must be a positive": lambda: sample_teacher(MIXTURE, 3, batch=0),
    "n must be a whole number": lambda: sample_teacher(MIXTURE, -1),
    r"one condition for each sample.*Got: 2": lambda: sample_teacher(
        MIXTURE, 3, conditioning=torch.zeros(2, dtype=torch.int64)
    ),
    "rtol must be": run([3.0, 1.0], "rk45:0"),
    "decreasing grid": lambda: sample_teacher(MIXTURE, 3, grid=[1.0, 2.0]),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_answered_with_a_message(message: str) -> None:
    with pytest.raises(UserError, match=message):
        WRONG[message]()


def test_an_ode_solver_takes_a_teacher_without_a_score() -> None:
    assert bool(solve(NoScore(), START, [3.0, 1.0, 0.0]).y.isfinite().all())


def test_an_empty_batch_is_a_batch() -> None:
    for name in ("heun", "rk45", "dpmpp-2m"):
        assert solve(MIXTURE, START[:0], [3.0, 1.0, 0.0], name).y.shape == (0, 1)
