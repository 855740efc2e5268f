"""Guidance by a second prediction, its interval, what it costs, and what wrappers pass on. Exact mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, has_score, is_diffused, score
from distmatch.diffusion.guidance import (
    CallCounter,
    Calls,
    ClassifierGuided,
    GradientFree,
    Guided,
    at_step,
    guided,
)
from distmatch.diffusion.ito import trajectory_log_density
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.predictions import PREDICTIONS, convert
from distmatch.diffusion.solvers import grid, solve

MEANS, COVARIANCES = [[-1.0, 0.2], [1.0, 0.5], [0.3, -1.2]], [0.05, 0.1, 0.2]
TEACHER = GaussianMixture([0.5, 0.3, 0.2], MEANS, COVARIANCES, [0, 1, 2], sigma_max=20.0)
WEAK = GaussianMixture([0.5, 0.3, 0.2], MEANS, [0.2, 0.3, 0.4], [0, 1, 2], sigma_max=20.0)
PLAIN = GaussianMixture([0.5, 0.3, 0.2], MEANS, COVARIANCES, sigma_max=20.0)
PAIR = GaussianMixture([0.5, 0.5], [[0.0, 0.0]] * 2, [1.0, 1.0], [0, 1])
LABELS = torch.arange(24) % 3
X = 2 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMA = torch.linspace(0.1, 3, 24, dtype=torch.float64)


def logits(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Some classifier of three classes, of clean or noisy samples."""
    return x @ torch.tensor([[1.0, -1.0, 0.3], [0.2, 0.5, -1.0]], dtype=x.dtype)


def test_scale_one_is_the_denoiser_bit_for_bit_in_one_call() -> None:
    for wrapper in (
        Guided(TEACHER, 1),
        Guided(TEACHER, 1, reference=WEAK, interval=(0.1, 2)),
        ClassifierGuided(TEACHER, logits, 0, conditional=True),
        GradientFree(TEACHER, logits, 1),
    ):
        counter = CallCounter(wrapper)
        assert torch.equal(counter(X, SIGMA, LABELS), TEACHER(X, SIGMA, LABELS))
        assert counter.spent == Calls(main=1)
        assert is_diffused(counter)
    assert guided(TEACHER, 1) is TEACHER
    assert isinstance(guided(TEACHER, 2), Guided)


def test_equal_classes_leave_nothing_to_guide() -> None:
    alike = GaussianMixture([0.6, 0.4], [[0.3, 1.0]] * 2, [0.1, 0.1], [0, 1])
    for wrapper in (Guided(alike, 4.0), GradientFree(alike, lambda x: logits(x)[:, :2], 4.0)):
        torch.testing.assert_close(wrapper(X, SIGMA, LABELS % 2), alike(X, SIGMA), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["vp", "edm", "cosine", "condot", "trigflow"])
def test_guiding_any_prediction_is_guiding_the_denoiser(path: str) -> None:
    curve = noise_path(path)
    t = curve.t_of_rho(SIGMA)
    c = curve.coefficients(t)
    x_t = c.alpha[:, None] * X
    main, none = TEACHER(X, SIGMA, LABELS), TEACHER(X, SIGMA)
    expected = Guided(TEACHER, 2.7)(X, SIGMA, LABELS)
    for kind in PREDICTIONS:
        a, b = (convert(d, "x0", kind, x_t, c) for d in (main, none))
        back = convert(b + 2.7 * (a - b), kind, "x0", x_t, c)
        torch.testing.assert_close(back, expected, rtol=1e-9, atol=1e-10)


def test_autoguidance_of_gaussians_is_their_algebra() -> None:
    # Scores -(x - m) / (v + s^2): the guided one has the precision w / (v + s^2) - (w - 1) / (V + s^2).
    strong = GaussianMixture([1.0], [[0.5, -0.2]], [0.1])
    weak = GaussianMixture([1.0], [[0.5, -0.2]], [0.7])
    w, s2 = 2.2, SIGMA[:, None] ** 2
    got = score(Guided(strong, w, reference=weak), X, SIGMA)
    expected = -(X - torch.tensor([0.5, -0.2])) * (w / (0.1 + s2) - (w - 1) / (0.7 + s2))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_the_reference_is_told_the_same_labels_or_none() -> None:
    got = Guided(TEACHER, 3.0, reference=WEAK)(X, SIGMA, LABELS)
    main, weak = TEACHER(X, SIGMA, LABELS), WEAK(X, SIGMA, LABELS)
    torch.testing.assert_close(got, weak + 3 * (main - weak))
    # Without labels it still guides by the weaker model; a separate unconditional model is then no reference.
    torch.testing.assert_close(
        Guided(TEACHER, 3.0, reference=WEAK)(X, SIGMA), 3 * PLAIN(X, SIGMA) - 2 * WEAK(X, SIGMA)
    )
    apart = Guided(TEACHER, 3.0, reference=PLAIN)
    some = torch.where(LABELS == 0, -1, LABELS)
    torch.testing.assert_close(apart(X, SIGMA, some), Guided(TEACHER, 3.0)(X, SIGMA, some))
    assert torch.equal(apart(X, SIGMA), TEACHER(X, SIGMA))
    assert torch.equal(apart(X, SIGMA, some)[some < 0], TEACHER(X, SIGMA, some)[some < 0])


# The interval.


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


# What it costs, and what wrappers pass on.


class Counting(GaussianMixture):
    """The mixture, and how many rows it was called with."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.rows = 0

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        return super().forward(x, sigma, condition)


STACKS: dict[str, tuple[Callable[[Denoiser, Denoiser], Denoiser], Calls]] = {
    "classifier-free": (lambda a, b: Guided(a, 2), Calls(1, 1)),
    "autoguidance": (lambda a, b: Guided(a, 2, reference=b), Calls(1, 1)),
    "autoguidance, both guided": (lambda a, b: Guided(Guided(a, 2), 2, reference=Guided(b, 3)), Calls(1, 3)),
    "classifier": (lambda a, b: ClassifierGuided(a, logits, 2), Calls(1, 0, 1, 1)),
    "clean classifier": (lambda a, b: ClassifierGuided(a, logits, 2, on="clean"), Calls(1, 0, 1, 1)),
    "free of classifier": (
        lambda a, b: Guided(ClassifierGuided(a, logits, 2, conditional=True), 2),
        Calls(1, 1, 2, 2),
    ),
    "gradient-free": (lambda a, b: GradientFree(a, logits, 2), Calls(1, 1, 1)),
    "gradient-free with a weak one": (lambda a, b: GradientFree(a, logits, 2, reference=b), Calls(1, 1, 1)),
    "counter in a counter": (lambda a, b: CallCounter(Guided(a, 2)), Calls(1, 1)),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_is_counted_is_what_is_called(name: str) -> None:
    build, expected = STACKS[name]
    parts = ([0.5, 0.3, 0.2], MEANS, COVARIANCES, [0, 1, 2])
    leaves = Counting(*parts), Counting(*parts)
    counter = CallCounter(build(*leaves))
    counter(X, SIGMA, LABELS)
    assert counter.spent == expected
    assert counter.calls * len(X) == sum(leaf.rows for leaf in leaves)
    levels = grid("karras", 4, 0.1, 5.0)
    done = solve(counter, X, levels, "heun", condition=LABELS)
    assert done.calls == 7 * expected.total
    assert counter.calls * len(X) == sum(leaf.rows for leaf in leaves)
    assert counter.spent.classifier == 8 * expected.classifier


def test_wrappers_pass_on_what_a_denoiser_is() -> None:
    class Electric(GaussianMixture):
        gaussian_kernel = False
        path = noise_path("edm")

    electric = Electric([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], [1.0, 1.0], [0, 1], sigma_max=33.0)
    for wrapper in (
        Guided(electric, 2.0),
        CallCounter(Guided(electric, 2.0)),
        GradientFree(electric, logits, 2.0),
    ):
        assert not has_score(wrapper)
        assert wrapper.path is electric.path
        assert wrapper.sigma_max == 33
        assert wrapper.shape == (2,)
        assert wrapper.num_classes == 2
        assert has_score(CallCounter(Guided(TEACHER, 2.0)))
    with pytest.raises(UserError, match="classifier guidance needs the score"):
        ClassifierGuided(electric, logits, 1.0)
    with pytest.raises(UserError, match="different kinds of noise"):
        Guided(electric, 2.0, reference=GaussianMixture([1.0], [[0.0, 0.0]], [1.0]))


def test_guided_scores_are_not_those_of_one_density() -> None:
    # For two Gaussian classes, the guided score satisfies no Fokker-Planck equation: refuse what rests on it.
    counter = CallCounter(Guided(TEACHER, 2.0))
    assert not is_diffused(counter)
    states, levels = torch.stack([X, X]), [2.0, 1.0]
    with pytest.raises(UserError, match="belong to one density"):
        trajectory_log_density(counter, states, levels, condition=LABELS)
    trajectory_log_density(CallCounter(Guided(TEACHER, 1.0)), states, levels, condition=LABELS)


WRONG: dict[str, Callable[[], object]] = {
    "class-conditional": lambda: Guided(PLAIN, 2.0),
    "finite": lambda: Guided(TEACHER, math.nan),
    "0 <= low < high": lambda: Guided(TEACHER, 2.0, interval=(2.0, 1.0)),
    "low=-1": lambda: Guided(TEACHER, 2.0, interval=(-1.0, 1.0)),
    "low=1, high=1": lambda: guided(TEACHER, 2.0, interval=(1.0, 1.0)),
    "low=nan": lambda: guided(TEACHER, 2.0, interval=(math.nan, 1.0)),
    "model of other samples": lambda: Guided(TEACHER, 2.0, reference=GaussianMixture([1.0], [[0.0]], [1.0])),
    "other classes": lambda: Guided(TEACHER, 2.0, reference=PAIR),
    "has other classes": lambda: Guided(PLAIN, 2.0, reference=TEACHER),
    "nothing at guidance scale 1": lambda: guided(TEACHER, 1.0, interval=(0.1, 1.0)),
    "reference does nothing": lambda: guided(TEACHER, 1.0, reference=WEAK),
    "two classes or more": lambda: GradientFree(PLAIN, logits, 2.0),
    "told another class": lambda: GradientFree(TEACHER, logits, 2.0, reference=PLAIN),
    "must be a fixed function": lambda: GradientFree(TEACHER, torch.nn.Dropout(0.1), 2.0),
    "one logit for each class": lambda: GradientFree(TEACHER, lambda x: x, 2.0)(X, SIGMA, LABELS),
    "no derivative": lambda: GradientFree(TEACHER, logits, 2.0)(X.clone().requires_grad_(), SIGMA, LABELS),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        WRONG[message]()
