"""Guidance in an interval of noise levels: calls by themselves, and steps of solvers. Exact mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import CallCounter, Calls, GradientFree, Guided, Wrapper, at_step
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve
from tests.helpers.rounding import assert_same_but_for_rounding

MEANS = [[-1.0, 0.2], [1.0, 0.5], [0.3, -1.2]]
TEACHER = GaussianMixture([0.5, 0.3, 0.2], MEANS, [0.05, 0.1, 0.2], [0, 1, 2], sigma_max=20.0)
LABELS = torch.arange(24) % 3
X = 2 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMA = torch.linspace(0.1, 3, 24, dtype=torch.float64)


def test_in_a_call_each_sample_is_guided_by_its_own_level() -> None:
    low, high = float(SIGMA[5]), float(SIGMA[12])
    limited = Guided(TEACHER, 2.5, interval=(low, high))
    got = limited(X, SIGMA, LABELS)
    inside = (torch.arange(24) > 5) & (torch.arange(24) <= 12)  # (low, high]
    torch.testing.assert_close(got[inside], Guided(TEACHER, 2.5)(X, SIGMA, LABELS)[inside])
    assert_same_but_for_rounding(got[~inside], TEACHER(X, SIGMA, LABELS)[~inside])  # one batch of 48 there
    assert limited.cost(SIGMA, LABELS).total == 2
    assert limited.cost(SIGMA[:5], LABELS[:5]).total == 1
    everywhere = Guided(TEACHER, 2.5, interval=(0, math.inf))
    assert torch.equal(everywhere(X, SIGMA, LABELS), Guided(TEACHER, 2.5)(X, SIGMA, LABELS))


def heun_by_hand(model: Callable[[int, Tensor, Tensor], Tensor], y: Tensor, levels: list[float]) -> Tensor:
    for k, (now, after) in enumerate(pairwise(levels)):
        level = torch.full((len(y),), now, dtype=y.dtype)
        slope = (y - model(k, y, level)) / now
        if after == 0:
            return y - now * slope
        ahead = y + (after - now) * slope
        second = (ahead - model(k, ahead, torch.full((len(y),), after, dtype=y.dtype))) / after
        y = y + (after - now) * (slope + second) / 2
    return y


def test_a_step_of_heun_decides_once_and_costs_accordingly() -> None:
    levels = grid("karras", 12, 0.05, 20.0)
    low, high = float(levels[8]), float(levels[3])  # steps 3 to 7 start inside, both ends tested
    steps = range(3, 8)
    teacher, full = TEACHER, Guided(TEACHER, 2.0)

    def model(k: int, y: Tensor, sigma: Tensor) -> Tensor:
        return (full if k in steps else teacher)(y, sigma, LABELS)

    y = 20 * X
    counter = CallCounter(Guided(TEACHER, 2.0, interval=(low, high)))
    done = solve(counter, y, levels, "heun", conditioning=LABELS)
    torch.testing.assert_close(done.y, heun_by_hand(model, y, levels.tolist()), rtol=1e-10, atol=1e-12)
    assert done.calls == counter.calls == 23 + 2 * len(steps)
    assert counter.spent == Calls(main=23, reference=2 * len(steps))
    # A call by itself decides by its own level: other decisions at the borders, another result.
    assert not torch.allclose(
        done.y, heun_by_hand(lambda k, y, s: counter(y, s, LABELS), y, levels.tolist()), atol=1e-6
    )


@pytest.mark.parametrize("name", ["ddim", "rhoab:2", "dpmpp-2m", "rhork:rk4", "rk45"])
def test_an_interval_around_everything_or_nothing_changes_no_bit(name: str) -> None:
    levels = grid("karras", 6, 0.05, 20.0)
    runs = [
        solve(model, X * 20, levels, name, conditioning=LABELS)
        for model in (
            Guided(TEACHER, 2.0),
            Guided(TEACHER, 2.0, interval=(0, 100)),
            TEACHER,
            Guided(TEACHER, 2.0, interval=(50, 100)),
        )
    ]
    assert torch.equal(runs[0].y, runs[1].y)
    assert torch.equal(runs[2].y, runs[3].y)
    assert runs[0].calls == runs[1].calls
    assert runs[2].calls == runs[3].calls


class Recording(GaussianMixture):
    """The mixture, and the levels at which it was called."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.seen: list[float] = []

    def forward(self, x: Tensor, sigma: Tensor | float, conditioning: Tensor | None = None) -> Tensor:
        self.seen.append(round(float(torch.as_tensor(sigma).max()), 9))
        return super().forward(x, sigma, conditioning)


def test_the_way_up_guides_in_the_steps_of_the_way_down() -> None:
    levels = grid("log", 10, 0.1, 10.0, to_zero=False)
    weak = Recording([0.5, 0.3, 0.2], MEANS, [0.2, 0.3, 0.4], [0, 1, 2])
    limited = Guided(TEACHER, 1.5, reference=weak, interval=(0.5, 4.0))
    solve(limited, X, levels, "ddim", conditioning=LABELS)
    down, weak.seen = weak.seen, []
    solve(limited, X, levels.flip(0), "ddim", conditioning=LABELS)
    inside = [k for k, level in enumerate(levels.tolist()) if 0.5 < level <= 4.0]
    assert down == [round(float(levels[k]), 9) for k in inside]
    assert sorted(weak.seen, reverse=True) == [round(float(levels[k + 1]), 9) for k in inside]


def test_a_step_looks_at_no_value() -> None:
    class NoLook(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func)
            return func(*args, **(kwargs or {}))

    class Still(GaussianMixture):
        def forward(self, x: Tensor, sigma: Tensor | float, conditioning: Tensor | None = None) -> Tensor:
            return 0.5 * x

    still = Still([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], [1.0, 1.0], [0, 1])
    limited = CallCounter(Guided(still, 2.0, interval=(0.5, 4.0)))
    free = CallCounter(GradientFree(still, lambda x: x, 2.0, interval=(0.5, 4.0)))
    with NoLook():
        for start in (8.0, 2.0):
            at_step(limited, start, start / 2)(X, SIGMA, LABELS % 2)
            at_step(free, start, start / 2)(X, SIGMA, LABELS % 2)
    assert limited.spent == Calls(main=2, reference=1)
    assert free.spent == Calls(main=2, reference=1, classifier=1)


class Carrying(Wrapper):
    """Keeps to itself where the guided denoiser changes, so that solvers carry their memory over."""

    def regime(self, conditioning: Tensor | None) -> None:
        return None


def solved_exactly(model: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    """Each step's denoiser followed by Runge-Kutta 4 through the step: the same decisions, no other error."""
    for now, after in pairwise(levels.tolist()):
        within = torch.linspace(now, after, 9, dtype=torch.float64)
        y = solve(at_step(model, now, after), y, within, "rhork:rk4", conditioning=LABELS).y
    return y


REMEMBERING = [pytest.param("ipndm:3", marks=pytest.mark.slow), "tab:2", "dpmpp-2m", "ghvb:2.5"]
LIMITED = Guided(TEACHER, 3.0, interval=(0.3, 4.0))


@cache
def in_steps(steps: int) -> tuple[Tensor, Tensor]:
    """Levels, and where LIMITED leads through them."""
    levels = grid("karras", steps, 0.05, 20.0, to_zero=False)
    return levels, solved_exactly(LIMITED, 20 * X, levels)


@pytest.mark.parametrize("name", REMEMBERING)
def test_starting_anew_at_the_ends_of_the_interval_keeps_the_order(name: str) -> None:
    # The slope jumps by J there. Carried over, it leaves an error of order J h; started anew, of order h^2.
    errors = []
    for steps in (80, 160):
        levels, truth = in_steps(steps)
        for model in (LIMITED, Carrying(LIMITED)):
            end = solve(model, 20 * X, levels, name, conditioning=LABELS, path="vp").y
            errors.append(float((end - truth).norm(dim=1).mean()))
    anew, carried = errors[::2], errors[1::2]
    assert carried[1] > 2 * anew[1]
    assert math.log2(anew[0] / anew[1]) > 1.8
    assert math.log2(carried[0] / carried[1]) < 1.6


class Later(SampleNoise):
    """The noise of a solve from its step ``first`` on."""

    first = 0

    def normal(self, step: int, draw: int = 0) -> Tensor:
        return super().normal(self.first + step, draw)


@pytest.mark.parametrize("name", [*REMEMBERING, "hb:0.9:2", "hb-2m:0.8", "rhoab:1", "dpmpp-2m-sde"])
def test_starting_anew_is_a_new_solve_bit_for_bit(name: str) -> None:
    levels = grid("log", 60, 0.05, 20.0, to_zero=False)
    ends = [0, 20, 40, 60]  # pieces of at least 15 steps: dpmpp-2m ends shorter solves with order 1
    limited = Guided(TEACHER, 3.0, interval=(float(levels[40]), float(levels[20])))
    noise = Later(0, torch.arange(24), (2,), "cpu")
    run = {"conditioning": LABELS, "path": "vp", "noise": noise}
    whole = solve(limited, 20 * X, levels, name, **run).y
    y = 20 * X
    for start, end in pairwise(ends):
        noise.first = start
        y = solve(limited, y, levels[start : end + 1], name, **run).y
    assert torch.equal(whole, y)
    noise.first = 0
    assert not torch.allclose(whole, solve(Carrying(limited), 20 * X, levels, name, **run).y, atol=1e-5)


def test_only_a_change_of_the_guidance_starts_anew() -> None:
    levels = grid("karras", 12, 0.05, 20.0)

    def end(model: Denoiser, conditioning: Tensor | None = LABELS) -> Tensor:
        return solve(model, 20 * X, levels, "rhoab:2", conditioning=conditioning).y

    some = {"interval": (0.3, 4.0)}
    assert torch.equal(end(Guided(TEACHER, 2.0, **some), None), end(TEACHER, None))
    assert torch.equal(end(Guided(TEACHER, 1.0, **some)), end(TEACHER))
    within = Guided(Guided(TEACHER, 2.0, **some), 1.5, reference=TEACHER)  # found inside another guidance
    assert not torch.equal(end(within), end(Carrying(within)))
    weak = Guided(GaussianMixture([0.5, 0.3, 0.2], MEANS, [0.2, 0.3, 0.4], [0, 1, 2]), 2.0, **some)
    led = Guided(TEACHER, 1.5, reference=weak)  # and in a reference
    assert not torch.equal(end(led), end(Carrying(led)))
