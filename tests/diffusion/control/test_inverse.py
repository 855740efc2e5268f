"""Samples that agree with measurements, against exact posteriors. float64; seeds are fixed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.control.color import color_frame, from_frame, grey_map, grey_value, to_frame
from distmatch.diffusion.control.forward_model import ObservationGuided, quantile_loss, spread_quantiles
from distmatch.diffusion.control.inpainting import Replacement
from distmatch.diffusion.control.inverse import LinearPosterior, conjugate_gradients
from distmatch.diffusion.control.linear import linear_map, observed
from distmatch.diffusion.denoiser import is_diffused
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.ito import trajectory_log_density
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.priors import gaussian_prior
from distmatch.diffusion.solvers import grid, solve
from tests.helpers.draws import normal


def f64(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def autoregressive(dim: int, rho: float = 0.8) -> GaussianMixture:
    index = torch.arange(dim)
    covariance = f64(rho) ** (index[:, None] - index).abs()
    return GaussianMixture([1.0], [torch.linspace(-1, 1, dim).tolist()], covariance[None], sigma_max=20.0)


class Pictures:
    """A mixture of vectors seen as pictures."""

    def __init__(self, inner: GaussianMixture, shape: tuple[int, ...]) -> None:
        self.inner, self.shape, self.num_classes = inner, shape, 0
        self.sigma_data, self.sigma_min, self.sigma_max = inner.sigma_data, inner.sigma_min, inner.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.inner(x.flatten(1), sigma).reshape(x.shape)


PAIR = GaussianMixture([1.0], [[0.5, -0.5]], [[[1.0, 0.8], [0.8, 1.0]]], sigma_max=20.0)
KNOWN = observed(torch.tensor([True, False]), (2,))
VALUE = f64([2.0])  # 1.5 above its mean: the other is N(-0.5 + 1.2, 0.36)
N = 3000


def calibrated(x: Tensor) -> bool:
    """Whether mean and variance of the free coordinate are within four standard errors (and 1 per cent)."""
    mean, variance = float(x[:, 1].mean()), float(x[:, 1].var())
    return (
        abs(mean - 0.7) < 4 * 0.6 / math.sqrt(N) + 0.01
        and abs(variance / 0.36 - 1) < 4 * math.sqrt(2 / N) + 0.02
    )


def sampled(on_step: bool, levels: Tensor) -> Tensor:
    noise, y = SampleNoise(0, torch.arange(N), (2,)), levels[0] * normal(N, 2, seed=1)
    if on_step:
        keep = Replacement(KNOWN, VALUE, levels, noise)
        return solve(PAIR, keep.start(y), levels, "reverse-diffusion", noise=noise, on_step=keep).y
    exact = LinearPosterior(PAIR, KNOWN, VALUE)
    return solve(exact, y, levels, "reverse-diffusion", noise=noise).y


@pytest.mark.statistical
def test_the_corrected_posterior_is_calibrated_and_replacement_is_not() -> None:
    levels = grid("log", 100, 0.02, 20.0)
    corrected, replaced = sampled(False, levels), sampled(True, levels)
    torch.testing.assert_close(corrected[:, 0], VALUE.expand(N), rtol=0, atol=1e-6)
    torch.testing.assert_close(replaced[:, 0], VALUE.expand(N), rtol=0, atol=1e-12)
    assert calibrated(corrected)
    assert not calibrated(replaced)


MEASUREMENTS = {
    "matrix": (normal(3, 6, seed=2), 0.4),
    "mask": (torch.eye(6, dtype=torch.float64)[[0, 2, 5]], 0.0),
    "sum": (torch.ones(1, 6, dtype=torch.float64), 0.1),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_posterior_of_a_gaussian_is_exact(name: str) -> None:
    """Against Kalman's update of the mixture, at every level, with and without noise."""
    matrix, std = MEASUREMENTS[name]
    teacher, value = autoregressive(6), normal(len(matrix), seed=3)
    truth = teacher.condition_on(matrix, value, std**2)
    guided = LinearPosterior(teacher, linear_map(matrix, (6,)), value, std)
    for sigma in (0.05, 0.7, 15.0):
        y = (1 + sigma) * normal(20, 6, seed=4)
        level = torch.full((20,), sigma, dtype=torch.float64)
        torch.testing.assert_close(guided(y, level), truth(y, level), rtol=1e-7, atol=1e-7)


def test_a_function_measures_as_its_matrix() -> None:
    """A blur on pictures, its transpose derived; one measurement for each sample."""
    kernel = f64([0.25, 0.5, 0.25])[None, None, None]

    def blur(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, kernel.to(x), padding=(0, 1))

    basis = torch.eye(6, dtype=torch.float64).reshape(6, 1, 2, 3)
    matrix = blur(basis).flatten(1).mT
    teacher, y, value = autoregressive(6), normal(5, 6, seed=1), normal(5, 1, 2, 3, seed=5)
    pictures = Pictures(teacher, (1, 2, 3))
    guided = LinearPosterior(pictures, linear_map(blur, (1, 2, 3)), value, 0.3)
    level = torch.full((5,), 0.8, dtype=torch.float64)
    got = guided(y.reshape(5, 1, 2, 3), level).flatten(1)
    for i in range(5):
        truth = teacher.condition_on(matrix, value[i].flatten(), 0.09)
        torch.testing.assert_close(got[i], truth(y, level)[i], rtol=1e-7, atol=1e-7)


def test_an_isotropic_guess_is_exact_where_it_is_true_and_only_there() -> None:
    level, y = torch.full((9,), 0.6, dtype=torch.float64), normal(9, 3)
    matrix, value = normal(2, 3, seed=1), f64([0.3, -1.0])
    for variances, exact in (([0.7, 0.7, 0.7], True), ([0.1, 0.7, 1.5], False)):
        teacher = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [variances])
        guided = LinearPosterior(teacher, linear_map(matrix, (3,)), value, 0.2, covariance="isotropic")
        gap = guided(y, level) - teacher.condition_on(matrix, value, 0.04)(y, level)
        assert (float(gap.abs().max()) < 1e-8) == exact


def test_a_posterior_of_a_mixture_finds_the_component() -> None:
    """Not exact for several components; the samples still go to the components that the value allows."""
    teacher = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 1.0]], [0.05, 0.05], sigma_max=20.0)
    levels = grid("log", 60, 0.02, 20.0)
    guided = LinearPosterior(teacher, KNOWN, f64([1.0]), 0.1)
    x = solve(guided, 20 * normal(500, 2), levels, "heun").y
    assert float((x[:, 1] > 0).double().mean()) > 0.97


def test_an_approximate_posterior_claims_no_density() -> None:
    """Its log-density along a trajectory is right for Gaussian data, and wrong for two components."""
    levels = grid("log", 40, 0.1, 20.0, to_zero=False)
    two = GaussianMixture([0.5, 0.5], [[-1.0, -1.0], [1.0, 0.5]], [0.1, 0.3], sigma_max=20.0)
    for teacher, right in ((PAIR, True), (two, False)):
        guided = LinearPosterior(teacher, KNOWN, VALUE, 0.3)
        assert not is_diffused(CallCounter(guided))
        noise = SampleNoise(0, torch.arange(50), (2,))
        states = solve(guided, 20 * normal(50, 2), levels, "reverse-diffusion", noise=noise, trajectory=True)
        assert states.trajectory is not None
        with pytest.raises(UserError, match="approximate posterior"):
            trajectory_log_density(guided, states.trajectory, levels)
        guided.diffused = True  # what is known of the first one
        truth = teacher.condition_on(f64([[1.0, 0.0]]), VALUE, 0.09)
        path, prior = states.trajectory, gaussian_prior(400.0)
        ends = [trajectory_log_density(d, path, levels, prior=prior)[-1] for d in (guided, truth)]
        gap = float((ends[0] - ends[1]).abs().mean())  # nats
        assert gap < 1e-6 if right else gap > 0.05


def test_conjugate_gradients_solve_and_stay_finite() -> None:
    half = normal(4, 7, 7)
    matrix = half @ half.mT
    right = normal(4, 7, seed=1)
    right[3] = 0
    u = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrix, v), right, 40)
    torch.testing.assert_close(u, torch.linalg.solve(matrix, right), rtol=1e-6, atol=1e-6)
    singular = conjugate_gradients(lambda v: v * f64([1.0, 0.0]), f64([[2.0, 0.0], [2.0, 3.0]]), 10)
    assert bool(singular.isfinite().all())
    torch.testing.assert_close(singular[0], f64([2.0, 0.0]))


def test_costs_are_counted() -> None:
    counter = CallCounter(LinearPosterior(autoregressive(6), linear_map(normal(3, 6), (6,)), normal(3)))
    solve(counter, 20 * normal(4, 6), grid("log", 5, 0.1, 20.0), "euler")
    assert (counter.calls, counter.spent.backward) == (5, 20)


def test_the_frame_of_colors_is_orthonormal_and_grey_is_its_first_channel() -> None:
    frame, x = color_frame(), normal(3, 3, 2, 4)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(frame[:, 0], torch.full((3,), 3**-0.5, dtype=torch.float64))
    torch.testing.assert_close(from_frame(to_frame(x)), x)
    grey = grey_map((3, 2, 4))
    torch.testing.assert_close(grey.apply(x), to_frame(x)[:, :1])
    torch.testing.assert_close(grey.apply(x), grey_value(x.mean(1, keepdim=True)))
    v = normal(3, 1, 2, 4, seed=1)
    torch.testing.assert_close(grey.apply(grey.transpose(v)), v)
    torch.testing.assert_close((grey.apply(x) * v).sum(), (x * grey.transpose(v)).sum())


def test_colorization_keeps_the_grey() -> None:
    """Replacement in the frame, written out as rotating, masking and rotating back, and its samples."""
    pictures = Pictures(autoregressive(12), (3, 2, 2))
    grey, levels = normal(1, 2, 2, seed=2), grid("log", 20, 0.05, 20.0)
    noise = SampleNoise(0, torch.arange(6), (3, 2, 2))
    keep = Replacement(grey_map((3, 2, 2)), grey_value(grey), levels, noise)
    state = normal(6, 3, 2, 2)
    rotated = to_frame(state)
    rotated[:, :1] = to_frame(keep(4, state))[:, :1]
    torch.testing.assert_close(keep(4, state), from_frame(rotated))
    drawn = keep(4, state).mean(1, keepdim=True) - grey  # sigma z / sqrt 3
    assert 0.3 < float(drawn.std() * math.sqrt(3) / levels[5]) < 2
    assert not torch.equal(keep(4, state), keep(5, state))
    y = keep.start(20 * normal(6, 3, 2, 2))
    done = solve(pictures, y, levels, "reverse-diffusion", noise=noise, on_step=keep).y
    torch.testing.assert_close(done.mean(1, keepdim=True), grey.expand(6, -1, -1, -1))


def test_observations_draw_a_series_towards_its_posterior() -> None:
    """AR(1), the first four of six values seen with noise: the mean goes most of the way; scale 0 nowhere."""
    teacher, std = autoregressive(6, 0.9), 0.5
    seen = f64([1.0, 1.2, 0.8, 1.0])
    truth = teacher.condition_on(torch.eye(6)[:4], seen, std**2).means[0]
    levels, y = grid("log", 60, 0.02, 20.0), 20 * normal(400, 6)

    def mean(scale: float) -> Tensor:
        guided = ObservationGuided(teacher, lambda x: x[:, :4], seen, scale)
        return solve(guided, y, levels, "heun").y.mean(0)

    before = float((teacher.means[0] - truth).norm())
    assert float((mean(1 / std**2) - truth).norm()) < 0.35 * before
    torch.testing.assert_close(mean(0.0), solve(teacher, y, levels, "heun").y.mean(0), rtol=0, atol=0)


def test_guidance_by_an_observation_adds_the_gradient_to_the_score() -> None:
    """Against finite differences of the loss of f(D(y)), with a forward model that is not linear."""
    teacher, y, level = autoregressive(3), normal(4, 3), f64([0.3, 1.0, 2.0, 9.0])
    guided = ObservationGuided(teacher, lambda x: x.square().sum(1, keepdim=True), f64([2.0]), 1.7)

    def loss(v: Tensor) -> Tensor:
        return 0.5 * (teacher(v, level).square().sum(1) - 2).square()

    shift = (guided(y, level) - teacher(y, level)) / level[:, None] ** 2
    for i in range(3):
        e = 1e-5 * torch.eye(3, dtype=torch.float64)[i]
        slope = (loss(y + e) - loss(y - e)) / 2e-5
        torch.testing.assert_close(shift[:, i], -1.7 * slope, rtol=1e-5, atol=1e-6)


def test_the_pinball_loss_orders_the_samples() -> None:
    q = f64([0.1, 0.5, 0.9])
    predicted, seen = f64([[0.0], [0.0], [0.0]]), f64([[1.0], [1.0], [1.0]])
    torch.testing.assert_close(quantile_loss(q)(predicted, seen), q)
    torch.testing.assert_close(quantile_loss(q)(seen, predicted), 1 - q)
    torch.testing.assert_close(spread_quantiles(3), f64([0.25, 0.5, 0.75]))
    teacher, n = autoregressive(2), 200
    guided = ObservationGuided(
        teacher, lambda x: x[:, :1], f64([0.0]), 4.0, quantile_loss(spread_quantiles(n))
    )
    levels = grid("log", 40, 0.05, 20.0)
    x = solve(guided, 20 * normal(n, 2), levels, "heun").y[:, 0]
    # The noise of a sample has nothing to do with its quantile, so any order comes from the loss.
    assert float(x[n // 2 :].mean() - x[: n // 2].mean()) > 0.3


class Heavy(GaussianMixture):
    gaussian_kernel = False


def test_measurements_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="mask must be boolean"):
        observed(torch.ones(2), (2,))
    with pytest.raises(UserError, match="mask must be boolean"):
        observed(torch.ones(1, 4, 4, dtype=torch.bool), (3, 4, 4))
    with pytest.raises(UserError, match="True somewhere"):
        observed(torch.zeros(2, dtype=torch.bool), (2,))
    with pytest.raises(UserError, match="matrix does not match"):
        linear_map(torch.ones(2, 5), (2, 2))
    with pytest.raises(UserError, match="not linear"):
        linear_map(lambda x: x + 1, (3,))
    with pytest.raises(UserError, match="transpose does not match"):
        linear_map(lambda x: 2 * x, (3,), transpose=lambda v: v)
    with pytest.raises(UserError, match="three channels"):
        grey_map((1, 4, 4))
    noise = SampleNoise(0, torch.arange(2), (2,))
    with pytest.raises(UserError, match="orthonormal"):
        Replacement(linear_map(torch.ones(1, 2), (2,)), f64([1.0]), [1.0, 0.0], noise)
    with pytest.raises(UserError, match="value does not match"):
        Replacement(KNOWN, f64([1.0, 2.0]), [1.0, 0.0], noise)


def test_guidance_by_an_observation_is_no_noised_density() -> None:
    def guided(scale: float) -> CallCounter:
        return CallCounter(ObservationGuided(PAIR, lambda x: x[:, :1], f64([1.0]), scale))

    assert is_diffused(guided(0.0))
    assert not is_diffused(guided(1.0))


def test_wrong_guidance_is_refused() -> None:
    level = torch.ones(3, dtype=torch.float64)
    with pytest.raises(UserError, match="shapes of a measured sample"):
        LinearPosterior(autoregressive(3), KNOWN, VALUE)
    with pytest.raises(UserError, match="value does not match"):
        LinearPosterior(PAIR, KNOWN, f64([1.0, 2.0, 3.0]))
    with pytest.raises(UserError, match="needs the score"):
        LinearPosterior(Heavy([1.0], [[0.0, 0.0]], [1.0]), KNOWN, VALUE)
    with pytest.raises(UserError, match="one for each"):
        LinearPosterior(PAIR, KNOWN, f64([[1.0], [2.0]]))(normal(3, 2), level)
    with pytest.raises(UserError, match="noise of a measurement"):
        LinearPosterior(PAIR, KNOWN, VALUE, -1.0)
    with pytest.raises(UserError, match="unknown covariance"):
        LinearPosterior(PAIR, KNOWN, VALUE, covariance="full")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must not be negative"):
        ObservationGuided(PAIR, lambda x: x, f64([0.0, 0.0]), -1.0)
    with pytest.raises(UserError, match="does not have the shape"):
        ObservationGuided(PAIR, lambda x: x, f64([0.0]), 1.0)(normal(3, 2), level)
    with pytest.raises(UserError, match="differentiable loss"):
        ObservationGuided(PAIR, lambda x: x, f64([0.0, 0.0]), 1.0, lambda p, o: p)(normal(3, 2), level)
    with pytest.raises(UserError, match="between 0 and 1"):
        quantile_loss(f64([0.0, 0.5]))
