"""Minority guidance: the score in closed form, its classes, and samples that go to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.guidance import (
    NoisyClassifier,
    QuantileClasses,
    fit_noisy_classifier,
    minority_guided,
    minority_score,
)
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, solve
from tests.helpers.rounding import assert_same_but_for_rounding

GENERATOR = torch.Generator().manual_seed(0)
X = 2 * torch.randn(24, 2, dtype=torch.float64, generator=GENERATOR)
PLAIN = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])


@pytest.mark.statistical
def test_the_minority_score_of_a_gaussian_is_its_algebra() -> None:
    # D = k y with k = v / (v + s^2): E|x0 - D|^2 = (1 - k)^2 |x0|^2 + d k^2 s^2.
    v, s = 0.5, 0.8
    gaussian = GaussianMixture([1.0], [[0.0, 0.0]], [v])
    k = v / (v + s**2)
    expected = (1 - k) ** 2 * X.square().sum(1) + 2 * k**2 * s**2
    got = minority_score(gaussian, X, s, draws=1000, seed=1)
    torch.testing.assert_close(got, expected, rtol=0.2, atol=0.0)  # four standard errors
    assert_same_but_for_rounding(
        minority_score(gaussian, X, s, seed=3), minority_score(gaussian, X, s, seed=3, batch=5)
    )
    far = minority_score(gaussian, X, s, draws=1000, seed=1, distance=lambda a, b: (a - b)[:, 0])
    torch.testing.assert_close(far, (1 - k) * X[:, 0], rtol=0, atol=5 * k * s / math.sqrt(1000))


def test_thin_regions_have_large_scores() -> None:
    thin = GaussianMixture([0.9, 0.1], [[-1.5, 0.0], [2.5, 0.0]], [0.1, 0.1], sigma_max=20.0)
    x, component = thin.sample_with_components(2000, seed=0)
    scores = minority_score(thin, x.double(), 1.5, seed=1)
    assert spearmanr(scores, -thin.log_prob(x.double(), 0.3)).statistic > 0.4
    assert scores[component == 1].mean() > 3 * scores[component == 0].mean()


def test_quantile_classes_have_equal_counts() -> None:
    scores = torch.randn(1003, generator=GENERATOR)
    classes = QuantileClasses.of(scores, 100)
    counts = classes.labels(scores).bincount(minlength=100)
    assert classes.count == len(counts) == 100
    assert counts.min() >= 10
    assert counts.max() <= 11
    assert (classes.labels(torch.tensor([-9.0, 9.0])) == torch.tensor([0, 99])).all()
    tied = QuantileClasses.of(torch.tensor([1.0, 1, 1, 1, 2, 3]), 3).labels(torch.tensor([1.0, 2.0, 3.0]))
    assert tied.tolist() == [0, 2, 2]  # equal scores stay together


def test_minority_guidance_moves_samples_to_the_minority() -> None:
    thin = GaussianMixture([0.85, 0.15], [[-1.0, 0.0], [1.5, 0.0]], [0.1, 0.1], sigma_max=20.0)
    x0 = thin.sample(6000, seed=0)
    classes = QuantileClasses.of(minority_score(thin, x0, 1.0, seed=1), 4)
    labels = classes.labels(minority_score(thin, x0, 1.0, seed=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NoisyClassifier(4, (2,), width=64, sigma_data=thin.sigma_data)
    fit_noisy_classifier(net, x0, labels, steps=300, lr=3e-3, seed=2)
    start, levels = 20 * torch.randn(1500, 2, generator=GENERATOR), grid("karras", 10, 0.02, 20.0)
    base = solve(thin, start, levels, "ddim").y
    means, histograms = [], []
    for scale in (0.0, 1.0, 2.0, 3.5):
        done = solve(minority_guided(thin, net, scale), start, levels, "ddim")
        if scale == 0:
            assert torch.equal(done.y, base)
        scores = minority_score(thin, done.y, 1.0, seed=4)
        means.append(float(classes.labels(scores).double().mean()))
        histograms.append(float((classes.labels(scores) == 3).double().mean()))
    assert means == sorted(means)
    assert histograms == sorted(histograms)
    assert histograms[0] < 0.4 < 0.6 < histograms[-1]


def blind(x: Tensor, sigma: Tensor) -> Tensor:
    return x


WRONG: dict[str, Callable[[], object]] = {
    "minority score needs": lambda: minority_score(PLAIN, X, 0.0),
    "minority score is not known": lambda: minority_guided(PLAIN, blind),
    "quantile classes need": lambda: QuantileClasses.of(torch.zeros(3), 4),
    "finite": lambda: minority_guided(PLAIN, blind, math.nan, num_classes=2),
    "target": lambda: minority_guided(PLAIN, blind, num_classes=3, level=5),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        WRONG[message]()
