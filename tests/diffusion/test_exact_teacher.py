"""The exact teacher and the sampler against autograd, quadrature, scipy and closed forms. Seeds are fixed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, expand, has_features, score
from distmatch.diffusion.guidance import CallCounter, Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras, LogNormal, karras_grid
from distmatch.diffusion.solvers import sample_teacher, solve
from distmatch.nets.config import MLPConfig
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import network_teacher

WEIGHTS = [0.2, 0.5, 0.3]
MEANS = [[-1.0, 0.5], [0.8, 0.0], [0.3, -1.2]]
COVARIANCES = [[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]], [[0.05, 0.0], [0.0, 0.05]]]


def mixture(classes: list[int] | None = None) -> GaussianMixture:
    return GaussianMixture(WEIGHTS, MEANS, COVARIANCES, classes)


def points(n: int = 64) -> Tensor:
    return 1.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 2.0, 40.0])
def test_log_density_is_that_of_scipy(sigma: float) -> None:
    x = points()
    parts = [
        w * stats.multivariate_normal(m, np.array(c) + sigma**2 * np.eye(2)).pdf(x.numpy())
        for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    ]
    np.testing.assert_allclose(mixture().log_prob(x, sigma).numpy(), np.log(sum(parts)), rtol=1e-10)


@pytest.mark.parametrize("conditioning", [None, 0, 1, -1])
def test_score_denoiser_and_posterior_covariance_hang_together(conditioning: int | None) -> None:
    teacher = mixture([0, 1, 0])
    x = points().requires_grad_()
    sigma = torch.linspace(0.05, 6, len(x), dtype=torch.float64)
    y = None if conditioning is None else torch.full((len(x),), conditioning)
    (slope,) = torch.autograd.grad(teacher.log_prob(x, sigma, y).sum(), x)
    rounding = {"rtol": 1e-9, "atol": 1e-9}  # float64, values up to 1 / 0.05^2
    torch.testing.assert_close(teacher.score(x, sigma, y), slope, **rounding)
    torch.testing.assert_close(teacher(x, sigma, y), x + expand(sigma, x) ** 2 * slope, **rounding)
    torch.testing.assert_close(score(teacher, x, sigma, y), slope, **rounding)
    jacobian = torch.stack(
        [torch.autograd.grad(teacher(x, sigma, y)[:, i].sum(), x)[0] for i in range(2)], dim=1
    )
    expected = sigma[:, None, None] ** 2 * jacobian
    torch.testing.assert_close(teacher.posterior_covariance(x, sigma, y), expected, **rounding)


def test_posterior_moments_are_those_of_bayes_rule() -> None:
    teacher = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.09])
    x = torch.tensor([[-2.0], [-0.4], [0.1], [1.7]], dtype=torch.float64)
    grid = torch.linspace(
        -6, 6, 20_001, dtype=torch.float64
    )  # trapezoids are exact for smooth, decaying tails
    for sigma in (0.1, 0.7, 5.0):
        joint = teacher.log_prob(grid[:, None]).exp() * torch.exp(-0.5 * ((x - grid) / sigma) ** 2)
        joint = joint / joint.sum(1, keepdim=True)
        mean = joint @ grid
        variance = joint @ grid**2 - mean**2
        torch.testing.assert_close(teacher(x, sigma)[:, 0], mean, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            teacher.posterior_covariance(x, sigma)[:, 0, 0], variance, rtol=1e-7, atol=1e-9
        )


def test_one_gaussian_is_the_wiener_filter() -> None:
    mean, covariance = torch.tensor([0.5, -1.0]).double(), torch.tensor(COVARIANCES[0]).double()
    teacher = GaussianMixture([1.0], mean[None], covariance[None])
    x, eye = points(), torch.eye(2, dtype=torch.float64)
    gain = covariance @ torch.linalg.inv(covariance + 0.49 * eye)
    torch.testing.assert_close(teacher(x, 0.7), mean + (x - mean) @ gain.T)
    spread = 0.49 * gain
    torch.testing.assert_close(teacher.posterior_covariance(x, 0.7), spread.expand(len(x), 2, 2))


def test_the_three_forms_of_covariance_agree_and_dtypes_follow_the_input() -> None:
    x = points()
    full = GaussianMixture(WEIGHTS, MEANS, 0.3 * torch.eye(2).expand(3, 2, 2))
    for other in (
        GaussianMixture(WEIGHTS, MEANS, [0.3] * 3),
        GaussianMixture(WEIGHTS, MEANS, [[0.3, 0.3]] * 3),
    ):
        torch.testing.assert_close(other(x, 0.5), full(x, 0.5), rtol=1e-6, atol=1e-7)  # 0.3 is float32 above
    single = mixture()(x.float(), torch.full((len(x),), 0.5))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), mixture()(x, 0.5), rtol=1e-4, atol=1e-5)
    assert isinstance(full, Denoiser)
    assert not has_features(full)


def test_conditioning_keeps_the_components_of_the_class() -> None:
    teacher, x = mixture([0, 1, 0]), points()
    assert teacher.num_classes == 2
    of_class = {
        0: GaussianMixture([0.4, 0.6], [MEANS[0], MEANS[2]], [COVARIANCES[0], COVARIANCES[2]]),
        1: GaussianMixture([1.0], [MEANS[1]], [COVARIANCES[1]]),
        -1: mixture(),
    }
    labels = torch.arange(len(x)) % 3 - 1
    for label, alone in of_class.items():
        chosen = labels == label
        torch.testing.assert_close(teacher(x, 0.6, labels)[chosen], alone(x[chosen], 0.6))
        torch.testing.assert_close(teacher.log_prob(x, 0.6, labels)[chosen], alone.log_prob(x[chosen], 0.6))


@pytest.mark.statistical
@pytest.mark.parametrize("conditioning", [None, 0])
def test_samples_have_the_moments_of_the_mixture(conditioning: int | None) -> None:
    teacher, n = mixture([0, 1, 0]), 40_000
    y = None if conditioning is None else torch.full((n,), conditioning)
    x, component = teacher.sample_with_components(n, seed=3, conditioning=y)
    assert torch.equal(x, teacher.sample(n, seed=3, conditioning=y))
    share = torch.tensor(WEIGHTS if conditioning is None else [0.4, 0.0, 0.6])
    counts = torch.bincount(component, minlength=3) / n
    assert ((counts - share).abs() <= 5 * (share * (1 - share) / n).sqrt()).all()
    means = torch.tensor(MEANS)
    mean = share @ means
    second = (share[:, None, None] * (torch.tensor(COVARIANCES) + means[:, :, None] * means[:, None])).sum(0)
    covariance = second - mean[:, None] * mean
    assert ((x.mean(0) - mean).abs() < 5 * (covariance.diag() / n).sqrt()).all()
    # The standard error of a covariance entry is at most sqrt(kurtosis-like 3) times the product of spreads.
    limit = 5 * math.sqrt(3 / n) * (covariance.diag()[:, None] * covariance.diag()).sqrt()
    assert ((x.T.cov() - covariance).abs() < limit).all()
    if conditioning is None:
        assert teacher.sigma_data == pytest.approx(float(covariance.trace() / 2) ** 0.5, rel=1e-6)


def test_heun_has_order_two_on_the_closed_form_end_map() -> None:
    mean, covariance = torch.tensor([0.5, -1.0]).double(), torch.tensor(COVARIANCES[0]).double()
    teacher = GaussianMixture([1.0], mean[None], covariance[None])
    values, vectors = torch.linalg.eigh(covariance)
    start = mean + 5 * points(16)
    errors = []
    for steps in (20, 40, 80):
        grid = karras_grid(steps, 0.05, 5.0)[:-1]  # without the last Euler step, whose error is another
        scale = ((values + 0.05**2) / (values + 25)).sqrt()
        exact = mean + (start - mean) @ (vectors * scale) @ vectors.T
        errors.append(float((solve(teacher, start, grid).y - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 1e-3
    assert all(abs(order - 2) < 0.15 for order in orders), orders


def test_heun_ends_in_a_denoising_step_and_makes_two_calls_less_one() -> None:
    counter = CallCounter(mixture())
    x = sample_teacher(counter, 33, steps=7, seed=1)
    assert counter.calls == 2 * 7 - 1
    assert x.dtype == torch.float32
    once = solve(mixture(), points(), [2.0, 0.0]).y
    torch.testing.assert_close(once, mixture()(points(), 2.0))  # Euler to 0 is D itself


def test_teacher_samples_do_not_depend_on_the_batch_and_follow_labels() -> None:
    teacher = mixture([0, 1, 0])
    labels = torch.arange(50) % 2
    whole = sample_teacher(teacher, 50, steps=10, conditioning=labels, seed=4)
    seen: list[int] = []
    parts = sample_teacher(teacher, 50, steps=10, conditioning=labels, seed=4, batch=7, on_batch=seen.append)
    assert_same_but_for_rounding(parts, whole)
    assert seen == [7] * 7 + [1]
    assert (whole[labels == 1] - torch.tensor(MEANS[1])).abs().max() < 3  # std <= 0.63, 50 draws
    assert sample_teacher(teacher, 0).shape == (0, 2)


@pytest.mark.statistical
def test_teacher_samples_have_the_moments_of_the_mixture() -> None:
    n = 3000
    x = sample_teacher(mixture(), n, steps=30, seed=0, batch=n)
    exact = mixture().sample(100_000, seed=1)
    # Five standard errors; the start at sigma 80 misses the true spread by 1e-4 of it.
    assert ((x.mean(0) - exact.mean(0)).abs() < 5 * exact.std(0) / math.sqrt(n)).all()
    torch.testing.assert_close(x.T.cov(), exact.T.cov(), rtol=0, atol=5 * math.sqrt(3 / n))


LEVELS = [LogNormal(), LogNormal(0.4, 0.7), Karras(), Karras(0.02, 20.0, 3.0)]


@pytest.mark.statistical
@pytest.mark.parametrize("noise", LEVELS)
def test_noise_levels_follow_their_quantiles(noise: LogNormal | Karras) -> None:
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(noise.cdf(noise.quantile(u)), u, rtol=1e-9, atol=1e-12)
    sample = noise.sample(20_000, torch.Generator().manual_seed(0))
    if isinstance(noise, LogNormal):
        law = stats.lognorm(noise.std, scale=math.exp(noise.mean)).cdf
    else:
        low, high = noise.low ** (1 / noise.rho), noise.high ** (1 / noise.rho)
        law = stats.uniform(low, high - low).cdf
        sample = sample ** (1 / noise.rho)
    assert stats.kstest(sample.double().numpy(), law).pvalue > 1e-3
    counts = torch.histc(noise.cdf(noise.sample(20_000, torch.Generator().manual_seed(1))), 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(20_000 * 0.1 * 0.9)


def test_the_sampling_grid_is_the_karras_distribution_at_even_quantiles() -> None:
    grid = karras_grid(18, 0.002, 80.0)
    assert grid[0] == pytest.approx(80)
    assert grid[-2] == pytest.approx(0.002)
    assert grid[-1] == 0
    assert len(grid) == 19
    torch.testing.assert_close(grid[:-1], Karras().quantile(torch.linspace(1, 0, 18, dtype=torch.float64)))
    assert karras_grid(1, 0.002, 80.0).tolist() == pytest.approx([80.0, 0.0])


def test_guidance_is_its_formula_and_costs_two_calls() -> None:
    teacher, x = mixture([0, 1, 2]), points()
    sigma = torch.full((len(x),), 0.8, dtype=torch.float64)
    labels = torch.arange(len(x)) % 4 - 1
    guided = CallCounter(Guided(teacher, 2.5))
    none = torch.full_like(labels, -1)
    expected = teacher(x, sigma, none) + 2.5 * (teacher(x, sigma, labels) - teacher(x, sigma, none))
    torch.testing.assert_close(guided(x, sigma, labels), expected)
    assert guided.calls == 2
    torch.testing.assert_close(guided(x, sigma), teacher(x, sigma))
    assert guided.calls == 3  # without a condition there is nothing to guide
    torch.testing.assert_close(guided(x, sigma, labels)[labels < 0], teacher(x, sigma)[labels < 0])
    plain = CallCounter(Guided(teacher, 1.0))
    assert torch.equal(plain(x, sigma, labels), teacher(x, sigma, labels))
    assert plain.calls == 1


def test_guidance_of_two_gaussians_is_their_algebra() -> None:
    # One component a class, equal variance v: D_k = mu_k + g (x - mu_k), g = v / (v + s^2), and the
    # unconditional one weighs them by responsibilities, so guidance adds (w - 1) rho_other (D_k - D_other).
    v, s, w = 0.3, 0.9, 3.0
    teacher = GaussianMixture([0.4, 0.6], [[-1.0], [1.0]], [v, v], [0, 1])
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    gain = v / (v + s**2)
    one, other = -1 + gain * (x + 1), 1 + gain * (x - 1)
    odds = torch.log(torch.tensor(0.6 / 0.4).double()) + 2 * x / (v + s**2)
    expected = one + (w - 1) * torch.sigmoid(odds) * (one - other)
    sigma = torch.full((31,), s, dtype=torch.float64)
    torch.testing.assert_close(Guided(teacher, w)(x, sigma, torch.zeros(31, dtype=torch.int64)), expected)


def test_guided_features_are_those_of_the_conditional_pass() -> None:
    teacher = network_teacher(classes=3)
    x, sigma, labels = points(8).float(), torch.linspace(0.1, 9, 8), torch.arange(8) % 3
    guided = Guided(teacher, 2.0)
    prediction, features = guided(x, sigma, labels, return_features=True)
    rounding = {"rtol": 1e-5, "atol": 1e-6}  # one batch of 16 against two of 8
    torch.testing.assert_close(prediction, guided(x, sigma, labels), **rounding)
    for mine, theirs in zip(features, teacher(x, sigma, labels, return_features=True)[1], strict=True):
        torch.testing.assert_close(mine, theirs, **rounding)
    assert torch.equal(
        Guided(teacher, 1.0)(x, sigma, labels, return_features=True)[0], teacher(x, sigma, labels)
    )
    assert isinstance(teacher.net.config, MLPConfig)


WRONG = {
    "do not match": lambda: GaussianMixture([1.0], MEANS, COVARIANCES),
    "sum to one": lambda: GaussianMixture([0.5, 0.6, 0.3], MEANS, COVARIANCES),
    "non-negative": lambda: GaussianMixture([-0.5, 1.2, 0.3], MEANS, COVARIANCES),
    "symmetric": lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]),
    "semi-definite": lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]),
    "one non-negative integer": lambda: mixture([0, -1, 0]),
    "no component": lambda: mixture([0, 2, 0]),
    "wrong shape": lambda: mixture()(torch.zeros(3, 5), 1.0),
    "does not have": lambda: mixture([0, 1, 0])(points(2), 1.0, torch.tensor([0, 2])),
    "conditional teacher": lambda: Guided(mixture(), 2.0),
    "has no features": lambda: Guided(mixture([0, 1, 0]), 2.0)(
        points(2), torch.ones(2), return_features=True
    ),
    "standard deviation": lambda: LogNormal(0.0, 0.0),
    "0 < low": lambda: Karras(0.0, 80.0),
    "rho": lambda: Karras(0.002, 80.0, 0.0),
    "number of steps": lambda: karras_grid(0, 0.002, 80.0),
    "low < high": lambda: karras_grid(5, 80.0, 0.002),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_answered_with_a_message(message: str) -> None:
    with pytest.raises(UserError, match=message):
        WRONG[message]()
