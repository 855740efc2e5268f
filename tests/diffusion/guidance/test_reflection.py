"""Weak-to-strong reflection: identities, first-order directions and its limit, on Gaussians and mixtures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.guidance import CallCounter, Guided
from distmatch.diffusion.guidance.reflection import reflect, solve_reflected
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve

STRONG = GaussianMixture([0.5, 0.5], [[-1.0, 0.2], [1.0, 0.5]], [0.05, 0.1], [0, 1], sigma_max=20.0)
WEAK = GaussianMixture([0.5, 0.5], [[-1.0, 0.2], [1.0, 0.5]], [0.3, 0.4], [0, 1], sigma_max=20.0)
X = 2 * torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 2
NOW = 0.8


def size(x: Tensor) -> float:
    return float(x.norm(dim=1).mean())


def test_the_same_noise_twice_is_the_identity() -> None:
    eps = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(1))

    def model(y: Tensor, sigma: float) -> Tensor:
        return y - sigma * eps

    for level in (None, 0.3):
        torch.testing.assert_close(
            reflect(model, model, X, NOW, 0.3, weak_level=level, sigma_data=1.0), X, rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("at_end", [False, True])
def test_a_model_reflected_in_itself_moves_by_the_square_of_the_step(at_end: bool) -> None:
    moves = []
    for step in (0.02, 0.01):
        level = NOW - step if at_end else None
        moves.append(size(reflect(STRONG, STRONG, X, NOW, NOW - step, weak_level=level, sigma_data=1.0) - X))
    assert moves[0] > 0
    assert moves[0] / moves[1] == pytest.approx(4, rel=0.1)


def test_it_moves_along_the_difference_of_the_scores() -> None:
    # Variances v_s < v_w: by sigma (sigma - sigma') (s_strong - s_weak), with scores -x / (v + sigma^2).
    strong, weak = (GaussianMixture([1.0], [[0.0, 0.0]], [v]) for v in (0.2, 0.9))
    gaps = []
    for step in (0.02, 0.01):
        expected = NOW * step * (-X / (0.2 + NOW**2) + X / (0.9 + NOW**2))
        moved = reflect(strong, weak, X, NOW, NOW - step, sigma_data=weak.sigma_data) - X
        gaps.append(size(moved - expected) / size(expected))
    assert gaps[1] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)


def test_a_step_is_one_of_autoguidance_to_second_order() -> None:
    double = Guided(STRONG, 2.0, reference=WEAK)
    gaps = []
    for step in (0.02, 0.01):
        y = reflect(STRONG, WEAK, X, NOW, NOW - step, sigma_data=WEAK.sigma_data)
        y = y - step * (y - STRONG(y, NOW)) / NOW
        level = torch.full((32,), NOW, dtype=X.dtype)
        gaps.append(size(y - (X - step * (X - double(X, level)) / NOW)))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_on_a_fine_grid_it_is_autoguidance_of_scale_two() -> None:
    gaps = []
    for steps in (100, 200):
        levels = grid("log", steps, 0.1, 20.0, to_zero=False)
        mine = solve_reflected(STRONG, WEAK, 10 * X, levels, conditioning=LABELS).y
        double = solve(Guided(STRONG, 2.0, reference=WEAK), 10 * X, levels, "ddim", conditioning=LABELS).y
        gaps.append(size(mine - double))
    assert gaps[1] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)


def test_it_is_what_it_says_and_counts_what_it_calls() -> None:
    levels = grid("karras", 5, 0.1, 20.0)
    counters = CallCounter(STRONG), CallCounter(WEAK)
    done = solve_reflected(*counters, 10 * X, levels, conditioning=LABELS, trajectory=True)
    assert (counters[0].calls, counters[1].calls, done.calls) == (9, 4, 13)  # three a step, one in the last
    strong, weak = (partial(_call, model) for model in (STRONG, WEAK))
    y, numbers = 10 * X, levels.tolist()
    for k in range(5):
        now, after = numbers[k], numbers[k + 1]
        if k < 4:
            y = reflect(strong, weak, y, now, after, sigma_data=WEAK.sigma_data)
            if k:
                torch.testing.assert_close(done.trajectory[k], y)
        y = y + (after - now) / now * (y - strong(y, now))
    torch.testing.assert_close(done.y, y)
    assert torch.equal(done.trajectory[0], 10 * X)
    alone = solve_reflected(STRONG, WEAK, 10 * X, levels[-2:], conditioning=LABELS)
    assert torch.equal(alone.y, solve(STRONG, 10 * X, levels[-2:], "ddim", conditioning=LABELS).y)


def _call(model: GaussianMixture, y: Tensor, sigma: float) -> Tensor:
    return model(y, sigma, LABELS)


def test_guided_pairs_and_other_solvers() -> None:
    levels = grid("karras", 6, 0.1, 20.0)
    pair = Guided(STRONG, 3.0, interval=(0.5, 4.0)), Guided(STRONG, 1.0)
    inside = sum(0.5 < level <= 4 for level in levels.tolist())
    done = solve_reflected(*pair, 10 * X, levels, conditioning=LABELS)
    assert done.calls == 16 + 2 * inside  # the strong one is called twice a step, both in the interval or not
    noise = SampleNoise(0, torch.arange(32), (2,))
    for name in ("heun", "dpmpp-2m", "ddim:1"):
        end = solve_reflected(
            STRONG, WEAK, 10 * X, levels, name, conditioning=LABELS, noise=noise, weak_at="end"
        )
        assert bool(end.y.isfinite().all())
    unlabeled = GaussianMixture([1.0], [[0.0, 0.3]], [1.0])
    same = solve_reflected(STRONG, unlabeled, 10 * X, levels, conditioning=LABELS)
    assert bool(same.y.isfinite().all())


LEVELS = torch.tensor([2.0, 1.0, 0.0])
WRONG: dict[str, Callable[[], object]] = {
    "the same samples": lambda: solve_reflected(STRONG, GaussianMixture([1.0], [[0.0]], [1.0]), X, LEVELS),
    "increasing": lambda: solve_reflected(STRONG, WEAK, X, [0.1, 1.0]),
    "wrong shape": lambda: solve_reflected(STRONG, WEAK, X[:, :1], LEVELS),
    "level for the weak": lambda: solve_reflected(STRONG, WEAK, X, LEVELS, weak_at="middle"),  # type: ignore
    "draws noise": lambda: solve_reflected(STRONG, WEAK, X, LEVELS, "ddim:1"),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        WRONG[message]()
