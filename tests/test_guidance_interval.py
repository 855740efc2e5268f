"""Guidance in an interval of noise levels: calls by themselves, and steps of solvers. Exact mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmatch.diffusion.guidance import CallCounter, Calls, GradientFree, Guided, at_step
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, solve

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
    assert torch.equal(got[~inside], torch.cat([TEACHER(X, SIGMA, LABELS)])[~inside])
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
    done = solve(counter, y, levels, "heun", condition=LABELS)
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
        solve(model, X * 20, levels, name, condition=LABELS)
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

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None) -> Tensor:
        self.seen.append(round(float(torch.as_tensor(sigma).max()), 9))
        return super().forward(x, sigma, condition)


def test_the_way_up_guides_in_the_steps_of_the_way_down() -> None:
    levels = grid("log", 10, 0.1, 10.0, to_zero=False)
    weak = Recording([0.5, 0.3, 0.2], MEANS, [0.2, 0.3, 0.4], [0, 1, 2])
    limited = Guided(TEACHER, 1.5, reference=weak, interval=(0.5, 4.0))
    solve(limited, X, levels, "ddim", condition=LABELS)
    down, weak.seen = weak.seen, []
    solve(limited, X, levels.flip(0), "ddim", condition=LABELS)
    inside = [k for k, level in enumerate(levels.tolist()) if 0.5 < level <= 4.0]
    assert down == [round(float(levels[k]), 9) for k in inside]
    assert sorted(weak.seen, reverse=True) == [round(float(levels[k + 1]), 9) for k in inside]


def test_a_step_looks_at_no_value() -> None:
    class NoLook(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func)
            return func(*args, **(kwargs or {}))

    class Still(GaussianMixture):
        def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None) -> Tensor:
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
