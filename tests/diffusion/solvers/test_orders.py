"""Orders against SciPy's DOP853, identities between solvers, closed forms. No randomness but fixed seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.solvers import TABLEAUX, Run, find_solver, grid, solve
from distmatch.diffusion.solvers.multistep import adams_weights
from tests.reference.solver_cases import DETERMINISTIC, HIGH, LOW, MIXTURE, START


def dop853(y: Tensor, levels: Tensor) -> Tensor:
    """Reference states at ``levels`` of the mixture's flow, (levels, B, 1)."""

    def slope(level: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat)[:, None]
        return ((state - MIXTURE(state, level)) / level)[:, 0].numpy()

    span = (float(levels[0]), float(levels[-1]))
    done = solve_ivp(slope, span, y[:, 0].numpy(), "DOP853", t_eval=levels.numpy(), rtol=1e-13, atol=1e-14)
    return torch.from_numpy(done.y.T.copy())[..., None]


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return dop853(START, torch.tensor([HIGH, LOW], dtype=torch.float64))[-1]


def errors(name: str, reference: Tensor, steps: tuple[int, ...]) -> list[float]:
    """Mean absolute error at LOW for each number of steps."""
    out = []
    for n in steps:
        levels = grid("karras", n, LOW, HIGH, to_zero=False)
        out.append(float((solve(MIXTURE, START, levels, name, path="vp").y - reference).abs().mean()))
    return out


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [
        ("ddim", 1, 1.0e-3),
        ("heun", 2, 3.5e-6),
        ("dpmpp-2m", 2, 4.3e-6),
        ("rhoab:1", 2, 1.1e-5),
        ("rhork:kutta3", 3, 5.0e-9),
    ],
)
def test_orders_and_errors_are_those_measured_before(
    name: str, order: int, expected: float, reference: Tensor
) -> None:
    coarse, fine = errors(name, reference, (320, 640))
    assert abs(math.log2(coarse / fine) - order) < 0.1
    assert expected / 1.4 < fine < expected * 1.4  # their start points were others


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *(("euler", 1), ("dpmpp-1", 1), ("hb:0.8", 1), ("hb:0.8:2", 1), ("hb-2m:0.8", 1)),
        *(("tab:1", 2), ("ipndm:2", 2), ("ghvb:1.8", 2), ("rhork:heun2", 2)),
        *((f"rhork:{name}", 3) for name in TABLEAUX if name.endswith("3") and name != "kutta3"),
        ("rhork:rk4", 4),
        *(("deis", 2), ("unipc:1", 2), ("unipc", 3)),
    ],
)
def test_orders(name: str, order: int, reference: Tensor) -> None:
    coarse, fine = errors(name, reference, (120, 240))
    assert abs(math.log2(coarse / fine) - order) < 0.1, (coarse, fine)


def test_a_cold_start_keeps_every_multistep_solver_at_order_two(reference: Tensor) -> None:
    coarse, fine = errors("rhoab:3", reference, (320, 640))
    assert math.log2(coarse / fine) < 2.5  # on its way from 4 down to 2


def warm_error(name: str, steps: int) -> float:
    """Error on even levels from 5 to 1 with the exact past of 60 more steps, long enough for velocities."""
    solver, past = find_solver(name), 60
    width = 4 / steps
    levels = 1 + width * torch.arange(steps + past, -1, -1, dtype=torch.float64)
    exact = dop853(START[::8] * 0.3, levels)
    path = noise_path("vp")
    run = Run(
        tuple(levels.tolist()),
        denoise=lambda y, level: MIXTURE(y, level),
        normal=lambda step, draw: torch.zeros(()),
        path=path,
    )
    stepper = solver.stepper(run)
    velocity = None
    for k in range(past):
        slope = run.eps(exact[k], run.levels[k])
        beta = getattr(solver, "beta", 1.0)
        velocity = slope if velocity is None else (1 - beta) * velocity + beta * slope
        stepper.history.appendleft(velocity)
    y = exact[past]
    for k in range(past, run.steps):
        y = stepper(k, y)
    return float((y - exact[-1]).abs().mean())


@pytest.mark.parametrize(
    ("name", "order"),
    [("rhoab:2", 3), ("rhoab:3", 4), ("tab:2", 3), ("ipndm:4", 4), ("ghvb:2.6", 3), ("ghvb:3.6", 4)],
)
def test_orders_with_an_exact_past(name: str, order: int) -> None:
    coarse, fine = warm_error(name, 100), warm_error(name, 200)
    assert abs(math.log2(coarse / fine) - order) < 0.1, (coarse, fine)


FIRST_ORDER = ["ddim", "dpmpp-1", "tab:0", "rhoab:0", "rhork:euler", "euler", "ipndm:1", "hb:1", "ghvb:1"]


@pytest.mark.parametrize("path", ["vp", "edm", "cosine", "condot"])
def test_all_first_order_solvers_are_ddim(path: str) -> None:
    levels = grid("log", 12, 0.02, 20.0)
    first, *others = (solve(MIXTURE, 2 * START, levels, name, path=path).y for name in FIRST_ORDER)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-12)


def test_heun_is_rhork_heun2_and_ends_in_a_call_of_the_model() -> None:
    levels = grid("karras", 15, 0.02, 20.0)
    heun, other = (solve(MIXTURE, START, levels, name, path="edm") for name in ("heun", "rhork:heun2"))
    torch.testing.assert_close(heun.y, other.y, rtol=1e-12, atol=1e-12)
    assert heun.calls == other.calls == 29
    for name in DETERMINISTIC:
        before = solve(MIXTURE, START, levels[:-1], name, path="vp")
        if name in (
            "dpmpp-2m",
            "hb-2m:0.8",
            "unipc:3",
        ):  # a last step of order 1 is counted from the end of the grid
            continue
        whole = solve(MIXTURE, START, levels, name, path="vp")
        assert torch.equal(whole.y, MIXTURE(before.y, levels[-2])), name


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_data_in_one_point_are_hit_exactly_whatever_the_steps(name: str) -> None:
    point = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    teacher = GaussianMixture([1.0], point, [0.0])
    y = point + 7 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least = find_solver(name).least_steps
    for levels in ([7.0, 0.01], [7.0, 6.5, 3.0, 2.9, 0.4, 0.01], [7.0, 30.0, 31.0, 35.0, 70.0, 100.0]):
        if len(levels) > least:
            end = solve(teacher, y, levels, name, path="vp").y
            # Rounding of y / sigma at 0.01, times the way.
            torch.testing.assert_close(end, point + (y - point) * levels[-1] / 7, rtol=1e-10, atol=1e-10)


def test_dpmpp_2m_is_its_formula_on_a_variance_preserving_path() -> None:
    path = noise_path("vp")
    t = torch.linspace(0.9, 0.05, 21, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    lam = (alpha / sigma).log()
    x, before = START / HIGH * sigma[0] + 0.1, None
    start = x / alpha[0]
    for i in range(20):
        clean = MIXTURE(x / alpha[i], sigma[i] / alpha[i])
        h = lam[i + 1] - lam[i]
        mean = clean
        if before is not None:
            r = (lam[i] - lam[i - 1]) / h
            mean = (1 + 1 / (2 * r)) * clean - before / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * mean
        before = clean
    ours = solve(MIXTURE, start, sigma / alpha, "dpmpp-2m").y
    torch.testing.assert_close(ours * alpha[-1], x, rtol=1e-11, atol=1e-11)
    short = solve(MIXTURE, start, (sigma / alpha)[::2], "dpmpp-2m").y  # 10 steps: the last one is of order 1
    parts = solve(MIXTURE, start, (sigma / alpha)[::2][:-1], find_solver("dpmpp-2m").__class__(2, 1.0, 0)).y
    last = solve(MIXTURE, parts, (sigma / alpha)[::2][-2:], "ddim").y
    torch.testing.assert_close(short, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["vp", "cosine", "condot", "ve"])
def test_deis_weights_are_the_integrals_over_the_path(path: str) -> None:
    p = noise_path(path)
    levels = tuple(grid("power", 8, 0.05, 20.0, path=p, to_zero=False).tolist())
    t = p.t_of_rho(torch.tensor(levels, dtype=torch.float64)).numpy()
    table = adams_weights(p, levels, 2)
    assert [len(row) for row in table] == [1, 2, 3, 3, 3, 3, 3, 3]
    for k in (1, 2, 7):
        nodes = t[max(k - 2, 0) : k + 1][::-1]
        for j, node in enumerate(nodes):

            def integrand(tau: float, j: int = j, node: float = node, nodes: np.ndarray = nodes) -> float:
                c = p.coefficients(tau)
                slope = (c.d_sigma * c.alpha - c.sigma * c.d_alpha) / c.alpha**2
                others = np.delete(nodes, j)
                return float(slope) * float(np.prod((tau - others) / (node - others)))

            value, _ = quad(integrand, t[k], t[k + 1], epsrel=1e-10, epsabs=1e-13)
            assert table[k][j] == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert adams_weights(p, levels, 2) is table  # computed once for a path and a grid
    for row, (a, b) in zip(table, pairwise(levels), strict=True):
        assert math.fsum(row) == pytest.approx(b - a, rel=1e-14)


def test_adams_weights_in_rho_are_the_classical_ones_on_even_levels() -> None:
    levels = tuple(np.linspace(5.0, 0.5, 10))
    row = np.array(adams_weights(None, levels, 3)[-1]) / -0.5
    np.testing.assert_allclose(row, np.array([55, -59, 37, -9]) / 24, rtol=1e-12)
    even = torch.tensor(levels)
    for order in (1, 2, 3, 4):
        same = [f"rhoab:{order - 1}", f"ipndm:{order}", f"ghvb:{order}", f"hb:1:{order}"]
        first, *others = (solve(MIXTURE, START / 2, even, name).y for name in same)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 3), ("rhork:kutta3", 3)])
def test_inverting_and_sampling_again_comes_back_at_the_order_of_the_solver(name: str, order: int) -> None:
    # A step there and back leaves h^(p+1) + (-h)^(p+1) of its errors: even orders p gain one.
    samples = MIXTURE.sample(40, seed=1).double()
    back = []
    for n in (80, 160):
        up = grid("karras", n, LOW, HIGH, to_zero=False).flip(0)
        noise = solve(MIXTURE, samples, up, name).y
        back.append(float((solve(MIXTURE, noise, up.flip(0), name).y - samples).abs().mean()))
    assert abs(math.log2(back[0] / back[1]) - order) < 0.2, back


def test_rk45_keeps_to_its_tolerance_for_every_sample(reference: Tensor) -> None:
    for tolerance in (1e-4, 1e-7):
        done = solve(MIXTURE, START, [HIGH, LOW], f"rk45:{tolerance}:{tolerance}")
        assert float((done.y - reference).abs().max()) < 10 * tolerance  # a step's error, over all steps
        assert done.calls > 20
    # One sample near a watershed among a thousand easy ones must not be averaged away.
    hard = torch.full((1, 1), -0.9, dtype=torch.float64)
    easy = torch.full((999, 1), 25.0, dtype=torch.float64)
    truth = dop853(hard, torch.tensor([HIGH, LOW], dtype=torch.float64))[-1]
    crowd = solve(MIXTURE, torch.cat([hard, easy]), [HIGH, LOW], "rk45:1e-5:1e-5").y[:1]
    assert float((crowd - truth).abs().max()) < 1e-4


def test_rk45_stops_where_somebody_looks_and_denoises_at_the_end() -> None:
    levels = torch.tensor([HIGH, 3.0, 0.4, 0.0], dtype=torch.float64)
    seen = solve(MIXTURE, START, levels, "rk45:1e-9:1e-9", trajectory=True)
    quiet = solve(MIXTURE, START, levels, "rk45:1e-9:1e-9")
    exact = dop853(START, torch.tensor([HIGH, 3.0, 0.4, MIXTURE.sigma_min], dtype=torch.float64))
    torch.testing.assert_close(seen.trajectory[:3], exact[:3], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(seen.y, MIXTURE(exact[3], MIXTURE.sigma_min), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(seen.y, quiet.y, rtol=1e-7, atol=1e-7)
    assert torch.equal(seen.trajectory[-1], seen.y)


@pytest.mark.parametrize("name", ["heun", "rhork:heun2", "rhork:kutta3", "rhork:rk4"])
def test_steps_from_the_pure_noise_of_a_flow_are_as_exact_as_the_others(name: str) -> None:
    """Gaussian data: y = m + (y0 - m) sqrt((s^2 + b^2) / (s^2 + a^2)) from level a to b, in even times t.

    From a = 1e8, and back; in sigma the first step alone would be wrong by 1e4 and more.
    """
    mean, variance, top = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.5, 1e8
    teacher = GaussianMixture([1.0], [[0.7, -0.3]], [variance], sigma_max=top)
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(name: str, steps: int) -> float:
        t = torch.linspace(top / (1 + top), 0.5, steps + 1, dtype=torch.float64)
        levels = t / (1 - t)
        found = solve(teacher, top * z, levels, name).y
        exact = mean + (top * z - mean) * ((variance + levels[-1] ** 2) / (variance + top**2)) ** 0.5
        back = solve(teacher, exact, levels.flip(0), name).y / top
        return float(torch.stack([found - exact, back - z]).abs().mean())

    coarse, fine = error(name, 16), error(name, 32)
    assert math.log2(coarse / fine) > 1.7, (coarse, fine)
    assert fine < 0.1 * error("euler", 32)
