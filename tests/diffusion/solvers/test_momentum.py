"""Heavy ball and GHVB: weights, limits of stability, what momentum is good for."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from distmatch.diffusion.solvers import GHVB, DPMpp, HeavyBall, Solver, solve
from distmatch.diffusion.solvers.momentum import ghvb_weights
from distmatch.diffusion.solvers.multistep import AB
from tests.reference.solver_cases import MIXTURE, START

BETAS = [0.2, 0.5, 0.8, 1.0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_weights_sum_to_one_and_have_their_order(order: int, beta: float) -> None:
    weights = np.array(ghvb_weights(order, beta))
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    # The velocities of slopes n^p are their geometric means over the past; the weights must turn them into
    # the mean slope of the coming step, for every power p below the order.
    ages = np.arange(4000)
    share = beta * (1 - beta) ** ages if beta < 1 else (ages == 0).astype(float)
    for power in range(order):
        velocities = [float(share @ (-(ages + j) * 1.0) ** power) for j in range(order)]
        assert weights @ velocities == pytest.approx(1 / (power + 1), rel=1e-7, abs=1e-7)


def test_beta_one_is_adams_bashforth() -> None:
    for order, weights in enumerate(AB, 1):
        np.testing.assert_allclose(ghvb_weights(order, 1.0), weights, rtol=1e-14)
    np.testing.assert_allclose(
        ghvb_weights(5, 1.0), np.array([1901, -2774, 2616, -1274, 251]) / 720, rtol=1e-12
    )


def test_the_order_of_the_authors_is_velocities_and_beta() -> None:
    assert (GHVB(1.8).velocities, GHVB(1.8).beta) == (2, pytest.approx(0.8))
    assert (GHVB(3).velocities, GHVB(3).beta) == (3, 1.0)
    assert (GHVB(0.5).velocities, GHVB(0.5).beta) == (1, 0.5)


class Linear:
    """eps = rate y, so that the flow is y' = rate y in the level."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (1,), 0, 1.0, 0.002, 80.0

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return x - sigma[:, None] * self.rate * x


def radius(solver: Solver, z: float) -> float:
    """Largest root of the characteristic polynomial on y' = rate y with z = step * rate."""
    beta = solver.beta
    if isinstance(solver, GHVB):
        # (w - 1) (w - 1 + beta) w^(r-2) = z beta (weights), from y+ = y + z' sum m_j v_-j, v = (1-b) v- + b y
        weights = np.array(ghvb_weights(solver.velocities, beta))
        left = np.polymul([1, -1], [1, beta - 1])
        size = max(len(left), len(weights) + 1)
        left = np.concatenate([left, np.zeros(size - len(left))])
        right = np.concatenate([[0.0], z * beta * weights, np.zeros(size - len(weights) - 1)])
        return float(np.abs(np.roots(left - right)).max())
    return float(np.abs(np.roots([1, -(2 - beta + beta * z), 1 - beta])).max())


def growth(solver: Solver, z: float, steps: int = 400) -> float:
    """By how much the solver itself lets y grow over the second half of its steps, in nats a step."""
    levels = torch.arange(2 * steps, steps - 1, -1, dtype=torch.float64)
    sizes = solve(
        Linear(-z), torch.ones(1, 1, dtype=torch.float64), levels, solver, trajectory=True
    ).trajectory.abs()
    tail = sizes[steps // 2 :, 0, 0].log()
    return float(tail[-20:].max() - tail[:20].max()) / (steps // 2 - 20)


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        *((HeavyBall(b), -(4 / b - 2)) for b in (0.3, 0.5, 0.8, 1.0)),
        *((GHVB(1 + b), -(2 - b)) for b in (0.3, 0.5, 0.8)),
        (GHVB(2.0), -1.0),
    ],
)
def test_limits_of_stability(solver: Solver, limit: float) -> None:
    found = brentq(lambda z: radius(solver, z) - 1 - 1e-9, 1.5 * limit, 0.5 * limit)
    assert found == pytest.approx(limit, abs=1e-3)
    assert growth(solver, 0.98 * limit) < 0  # the solver, run on the equation, agrees with the polynomial
    assert growth(solver, 1.02 * limit) > 1e-3
    assert growth(solver, 1.02 * limit) == pytest.approx(math.log(radius(solver, 1.02 * limit)), rel=0.05)


def test_heavy_ball_is_its_recursion_and_so_it_is_on_dpmpp_2m() -> None:
    levels = torch.tensor([8.0, 5.0, 3.0, 1.5, 0.7, 0.3], dtype=torch.float64)
    y, v, past = START, None, []
    for now, after in pairwise(levels):
        past.insert(0, (y - MIXTURE(y, now)) / now)
        mean = past[0] if len(past) == 1 else 1.5 * past[0] - 0.5 * past[1]
        v = mean if v is None else 0.4 * v + 0.6 * mean
        y = y + (after - now) * v
    torch.testing.assert_close(solve(MIXTURE, START, levels, HeavyBall(0.6, 2)).y, y, rtol=1e-12, atol=1e-12)
    y, v, before = START, None, None
    for k in range(5):
        now, after = levels[k], levels[k + 1]
        clean = MIXTURE(y, now)
        mean = clean
        if before is not None:
            r = (levels[k - 1] / now).log() / (now / after).log()
            mean = clean + (clean - before) / (2 * r)
        before = clean
        v = mean if v is None else 0.4 * v + 0.6 * mean
        y = after / now * y + (1 - after / now) * v
    ours = solve(MIXTURE, START, levels, DPMpp(2, 0.6, low_end=0)).y
    torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)
