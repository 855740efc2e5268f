"""Guidance by a second prediction, what it costs, and what wrappers pass on. Exact mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, has_score, is_diffused, score
from distmatch.diffusion.guidance import (
    CallCounter,
    Calls,
    ClassifierGuided,
    GradientFree,
    Guided,
    guided,
)
from distmatch.diffusion.ito import trajectory_log_density
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.pfgm import StudentTTeacher
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
    other = Guided(TEACHER, 3.0, reference=GaussianMixture([1.0], [[0.0, 0.0]], [1.0]))
    assert torch.equal(other(X, SIGMA), TEACHER(X, SIGMA))
    assert torch.equal(other(X, SIGMA, some)[some < 0], TEACHER(X, SIGMA, some)[some < 0])


class Counting(GaussianMixture):
    """The mixture, and how many rows it was called with."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.rows = 0

    def forward(self, x: Tensor, sigma: Tensor | float, conditioning: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        return super().forward(x, sigma, conditioning)


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
    done = solve(counter, X, levels, "heun", conditioning=LABELS)
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
    few, many = (StudentTTeacher(torch.eye(2), dims) for dims in (128.0, 2048.0))
    with pytest.raises(UserError, match="128 and 2048 extra dimensions"):
        Guided(few, 2.0, reference=CallCounter(many))


def test_guided_scores_are_not_those_of_one_density() -> None:
    # For two Gaussian classes, the guided score satisfies no Fokker-Planck equation: refuse what rests on it.
    counter = CallCounter(Guided(TEACHER, 2.0))
    assert not is_diffused(counter)
    states, levels = torch.stack([X, X]), [2.0, 1.0]
    with pytest.raises(UserError, match="belong to one density"):
        trajectory_log_density(counter, states, levels, conditioning=LABELS)
    trajectory_log_density(CallCounter(Guided(TEACHER, 1.0)), states, levels, conditioning=LABELS)


WRONG: dict[str, Callable[[], object]] = {
    "conditional teacher": lambda: Guided(PLAIN, 2.0),
    "finite": lambda: Guided(TEACHER, math.nan),
    "0 <= low < high": lambda: Guided(TEACHER, 2.0, interval=(2.0, 1.0)),
    "low=-1": lambda: Guided(TEACHER, 2.0, interval=(-1.0, 1.0)),
    "low=1, high=1": lambda: guided(TEACHER, 2.0, interval=(1.0, 1.0)),
    "low=nan": lambda: guided(TEACHER, 2.0, interval=(math.nan, 1.0)),
    "the same samples": lambda: Guided(TEACHER, 2.0, reference=GaussianMixture([1.0], [[0.0]], [1.0])),
    "other classes": lambda: Guided(TEACHER, 2.0, reference=PAIR),
    "has other classes": lambda: Guided(PLAIN, 2.0, reference=TEACHER),
    "no effect at guidance scale 1": lambda: guided(TEACHER, 1.0, interval=(0.1, 1.0)),
    "rescaling has no effect": lambda: guided(TEACHER, 1.0, reference=WEAK),
    "number of classes of the teacher": lambda: GradientFree(PLAIN, logits, 2.0),
    "receives another class": lambda: GradientFree(TEACHER, logits, 2.0, reference=PLAIN),
    "must be a fixed function": lambda: GradientFree(TEACHER, torch.nn.Dropout(0.1), 2.0),
    "one logit for each class": lambda: GradientFree(TEACHER, lambda x: x, 2.0)(X, SIGMA, LABELS),
    "no derivative": lambda: GradientFree(TEACHER, logits, 2.0)(X.clone().requires_grad_(), SIGMA, LABELS),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        WRONG[message]()
