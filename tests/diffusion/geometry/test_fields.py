"""Fokker-Planck residuals, curl and gauge freedom against closed forms. Seeds fixed; float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.composition.targets import reward_and_slope
from distmatch.diffusion.denoiser import expand, score
from distmatch.diffusion.geometry.dimension import flipd
from distmatch.diffusion.geometry.fields import curl_share, gauge_residual
from distmatch.diffusion.geometry.fokker_planck import ScoreResidual, potential_residual, score_residual
from distmatch.diffusion.geometry.jacobian import denoise_with_trace
from distmatch.diffusion.likelihood import log_likelihood
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig
from distmatch.nets.edm import EDMDenoiser

PAIR = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [0.8, 0.5]], [[0.2, 0.05], [0.4, 0.3]], [0, 1])


def places(n: int, dim: int, sigma: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(n, dim, generator=g, dtype=torch.float64) * math.hypot(1.0, sigma)
    return y, torch.full((n,), sigma, dtype=torch.float64)


class Twisted:
    """A Gaussian N(0, diag(v)) whose score has r = A y on top, A antisymmetric."""

    num_classes, sigma_min, sigma_max = 0, 0.002, 80.0

    def __init__(self, variances: list[float], twist: float) -> None:
        self.shape = (len(variances),)
        self.teacher = GaussianMixture([1.0], [[0.0] * len(variances)], [variances])
        self.sigma_data = self.teacher.sigma_data
        matrix = torch.zeros(len(variances), len(variances), dtype=torch.float64)
        matrix[0, 1], matrix[1, 0] = twist, -twist
        self.matrix = matrix

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        # Fading at high noise, so that the flow turns by a finite angle.
        strength = expand(sigma**2 / (1 + sigma**2) ** 2, x)
        return self.teacher(x, sigma) + strength * (x @ self.matrix.T)


# Fokker-Planck.


def variance_preserving(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(t, -1.0), torch.full_like(t, 2.0)


@pytest.mark.parametrize("process", ["exploding", "preserving"])
def test_the_potential_residual_of_a_mixture_is_zero_and_sees_its_normalizer(process: str) -> None:
    x, _ = places(20, 2, 1.0)
    t = torch.linspace(0.3, 2, 20, dtype=torch.float64)
    options = {} if process == "exploding" else {"process": variance_preserving}

    def potential(x: Tensor, t: Tensor) -> Tensor:
        if process == "exploding":
            return PAIR.log_prob(x, t)
        # dx = -x dt + sqrt(2) dw: alpha = e^-t, sigma^2 = 1 - e^-2t, and x = alpha y.
        alpha = torch.exp(-t)
        sigma = (1 - alpha**2).sqrt()
        return PAIR.log_prob(x / alpha[:, None], sigma / alpha) + 2 * t

    residual = potential_residual(potential, x, t, **options)  # type: ignore[arg-type]
    assert float(residual.abs().max()) < 1e-10
    shifted = potential_residual(lambda x, t: potential(x, t) + t**3, x, t, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(shifted, 3 * t**2, rtol=1e-10, atol=1e-10)
    scaled = potential_residual(lambda x, t: 1.1 * potential(x, t), x, t, **options)  # type: ignore[arg-type]
    assert float(scaled.abs().mean()) > 0.01


class Shrinking:
    """The denoiser of N(0, 1), affine in its input: its second derivatives have no graph."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (3,), 0, 1.0, 0.002, 80.0

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return x / (1 + expand(sigma, x) ** 2)


class Constant(Shrinking):
    """The denoiser of a single point: it depends on nothing."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 0.7)


class Hidden(Shrinking):
    """A denoiser that keeps its derivatives to itself."""

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return super().__call__(x, sigma)


class Detached(Shrinking):
    """The same with parameters, so that its output has a graph, but none that leads to the input."""

    gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.gain * super().__call__(x.detach(), sigma)


@pytest.mark.parametrize("denoiser", [Shrinking(), Constant()])
@pytest.mark.parametrize("trace", ["exact", "rademacher:4"])
def test_affine_and_constant_denoisers_have_second_derivatives(denoiser: Shrinking, trace: str) -> None:
    y, sigma = places(8, 3, 0.7)
    residual = score_residual(denoiser, y, sigma, trace=trace)
    torch.testing.assert_close(residual.residual, torch.zeros_like(residual.residual), rtol=0, atol=1e-10)
    # N(0, 1): s = -y / (1 + sigma^2). A point: s = (0.7 - y) / sigma^2.
    rate = 2 * 0.7 * y / (1 + 0.7**2) ** 2 if type(denoiser) is Shrinking else -2 * (0.7 - y) / 0.7**3
    torch.testing.assert_close(residual.rate, rate)


def test_potentials_that_are_affine_or_constant_have_residuals() -> None:
    x, t = places(6, 2, 0.5)
    linear = potential_residual(lambda x, t: x[:, 0] * t, x, t)
    torch.testing.assert_close(linear, x[:, 0] - t**3)  # d_t phi - t |grad phi|^2
    torch.testing.assert_close(potential_residual(lambda x, t: 0 * t, x, t), torch.zeros_like(t))
    torch.testing.assert_close(potential_residual(lambda x, t: t**2, x, t), 2 * t)
    still = potential_residual(lambda x, t: -x.square().sum(1) / 2, x, t)  # div and |grad|^2 alone
    torch.testing.assert_close(still, -t * (x.square().sum(1) - 2))
    shrinking = potential_residual(lambda x, t: torch.zeros(6).double(), x, t, process=variance_preserving)
    torch.testing.assert_close(shrinking, torch.full_like(t, -2.0))  # f d


@pytest.mark.parametrize("denoiser", [Hidden(), Detached()])
def test_a_hidden_graph_is_refused_and_not_taken_for_a_constant(denoiser: Shrinking) -> None:
    y, sigma = places(4, 3, 0.7)
    for ask in (score_residual, curl_share, flipd):
        level: object = 0.7 if ask is flipd else sigma
        with pytest.raises(UserError, match="cannot be differentiated"):
            ask(denoiser, y, level)  # type: ignore[operator]
    with pytest.raises(UserError, match="this potential cannot be differentiated"):
        potential_residual(lambda x, t: denoiser(x, t).sum(1), y, sigma)


def test_what_depends_on_nothing_has_the_derivative_zero() -> None:
    y, sigma = places(4, 3, 0.7)
    clean, trace = denoise_with_trace(Constant(), y, sigma)
    assert float(trace.abs().max()) == 0
    torch.testing.assert_close(clean, torch.full_like(y, 0.7))
    # A point has dimension 0; its likelihood at level s is that of N(0.7, s^2).
    at = torch.full((1, 3), 0.7, dtype=torch.float64)
    assert float(flipd(Constant(), at, 0.1).values) == pytest.approx(0, abs=1e-9)
    flat = log_likelihood(Shrinking(), y, prior=lambda y, c: torch.zeros(len(y), dtype=torch.float64))
    assert bool(flat.prior_gap.isfinite().all())
    reward, slope = reward_and_slope(lambda x: torch.ones(len(x)), y)
    assert float(slope.abs().max()) == 0
    assert float(reward.min()) == 1


def test_the_potential_residual_takes_probes_and_gradients() -> None:
    x, sigma = places(6, 2, 0.7)
    wrong = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    exact = potential_residual(lambda x, t: wrong * PAIR.log_prob(x, t), x, sigma, create_graph=True)
    exact.square().mean().backward()
    assert wrong.grad is not None
    eps = 1e-5
    ahead, behind = (
        potential_residual(lambda x, t, w=w: w * PAIR.log_prob(x, t), x, sigma).square().mean()
        for w in (1.3 + eps, 1.3 - eps)
    )
    assert float(wrong.grad) == pytest.approx(float(ahead - behind) / (2 * eps), rel=1e-6)
    probed = torch.stack(
        [
            potential_residual(PAIR.log_prob, x, sigma, trace="rademacher:3", seed=s)  # type: ignore[arg-type]
            for s in range(100)
        ]
    )
    assert bool((probed.mean(0).abs() < 4 * probed.std(0) / 10 + 1e-12).all())


def test_the_score_residual_of_a_mixture_is_zero() -> None:
    y, _ = places(12, 2, 0.7)
    sigma = torch.linspace(0.3, 2, 12, dtype=torch.float64)
    exact = score_residual(PAIR, y, sigma, conditioning=torch.arange(12) % 3 - 1)
    assert float(exact.residual.abs().max()) < 1e-10
    step = 1e-6
    labels = torch.arange(12) % 3 - 1
    slope = (PAIR.score(y, sigma + step, labels) - PAIR.score(y, sigma - step, labels)) / (2 * step)
    torch.testing.assert_close(exact.rate, slope, rtol=1e-6, atol=1e-6)
    assert exact.relative().value < 1e-9


def test_equal_probes_give_the_size_of_the_residual() -> None:
    row = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    for k in (2, 5):
        found = ScoreResidual(row.expand(k, 8, 2), torch.full((8, 2), 5.0).double(), exact=False)
        assert found.relative().value == pytest.approx(5 / math.sqrt(50))


class Blurred(GaussianMixture):
    """A denoiser that is handed the wrong noise level: its scores are gradients but no diffusion."""

    def forward(self, x: Tensor, sigma: Tensor | float, conditioning: Tensor | None = None) -> Tensor:
        return super().forward(x, 1.2 * sigma, conditioning)


def test_the_score_residual_of_a_wrong_model_is_not_zero_and_probes_agree() -> None:
    wrong = Blurred([0.3, 0.7], [[-1.0, 0.0], [0.8, 0.5]], [[0.2, 0.05], [0.4, 0.3]])
    y, sigma = places(300, 2, 0.7)
    exact = score_residual(wrong, y, sigma).relative()
    assert exact.value > 20 * exact.stderr > 0
    assert exact.value > 0.02
    probed = score_residual(wrong, y, sigma, trace="rademacher:8").relative()
    assert abs(probed.value - exact.value) < 4 * math.hypot(probed.stderr, exact.stderr)
    # With a true score only the probes' noise is left, and it must not be taken for a residual.
    null = score_residual(PAIR, y, sigma, trace="rademacher:8")
    raw = math.sqrt(float(null.residual.square().sum(-1).mean() / null.rate.square().sum(-1).mean()))
    assert null.relative().value < max(4 * null.relative().stderr, 0.3 * raw)
    with pytest.raises(UserError, match="at least 2"):
        score_residual(PAIR, y, sigma, trace="rademacher")


def test_networks_with_attention_have_second_derivatives() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(DiTConfig(width=16, depth=1, heads=2), (1, 4, 4), 3).double()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        y = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    denoiser = EDMDenoiser(net, shape=(1, 4, 4), num_classes=3, sigma_data=0.5).eval()
    sigma, labels = torch.tensor([0.3, 0.5, 2.0], dtype=torch.float64), torch.tensor([0, -1, 2])
    found = score_residual(denoiser, y, sigma, conditioning=labels, trace="rademacher:2")
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (score(denoiser, y, sigma + s, labels) for s in (step, -step))
    torch.testing.assert_close(found.rate, ((ahead - behind) / (2 * step)).flatten(1), rtol=1e-5, atol=1e-5)


# Gauge freedom.


def test_a_rotation_of_an_isotropic_gaussian_changes_no_density() -> None:
    twisted = Twisted([0.5, 0.5], twist=1.5)
    y, sigma = places(50, 2, 0.6)
    residual = gauge_residual(twisted, twisted.teacher, y, sigma)
    assert float(residual.residual.abs().max()) < 1e-12
    assert float(residual.size.min()) > 1e-3
    assert float(curl_share(twisted, y, sigma).value) > 0.1
    x = 0.7 * y[:6]
    ours = log_likelihood(twisted, x, sigma=0.05, prior="moments")
    assert float((ours.log_prob - twisted.teacher.log_prob(x, 0.05)).abs().max()) < 1e-6
    plain = log_likelihood(twisted.teacher, x, sigma=0.05)
    assert float((ours.latents - plain.latents).norm(dim=1).min()) > 1  # it does move the samples


def test_a_rotation_of_another_gaussian_changes_it() -> None:
    twisted = Twisted([0.1, 1.0], twist=1.5)
    y, sigma = places(1000, 2, 0.6)
    relative = gauge_residual(twisted, twisted.teacher, y, sigma).relative()
    assert relative.value > 5 * relative.stderr > 0
    x = 0.7 * y[:6]
    ours = log_likelihood(twisted, x, sigma=0.05)
    assert float((ours.log_prob - twisted.teacher.log_prob(x, 0.05)).abs().max()) > 0.1


def test_the_gauge_residual_is_its_formula() -> None:
    y, sigma = places(9, 2, 0.8)
    other = GaussianMixture([1.0], [[0.2, -0.1]], [[0.3, 0.9]])
    result = gauge_residual(other, PAIR, y, sigma)

    def extra(x: Tensor) -> Tensor:
        return other.score(x, 0.8) - PAIR.score(x, 0.8)

    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: extra(x[None])[0]))(y)
    expected = jacobian.diagonal(dim1=1, dim2=2).sum(1) + (extra(y) * PAIR.score(y, 0.8)).sum(1)
    torch.testing.assert_close(result.residual, expected, rtol=1e-9, atol=1e-9)
    probed = gauge_residual(other, PAIR, y, sigma, trace="rademacher:4000", chunk=4000)
    torch.testing.assert_close(probed.residual, expected, rtol=0, atol=0.2)
    assert gauge_residual(PAIR, PAIR, y, sigma).relative().value == 0


def test_the_curl_share_is_that_of_the_jacobian() -> None:
    twisted = Twisted([0.5, 0.2, 0.9], twist=0.8)
    y, sigma = places(4, 3, 0.6)
    share = curl_share(twisted, y, sigma, probes=4000)
    strength = 0.36 / 1.36**2
    v = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    jacobian = torch.diag(v / (v + 0.36)) + strength * twisted.matrix
    expected = float((jacobian - jacobian.T).square().sum() / (4 * jacobian.square().sum()))
    assert share.value == pytest.approx(expected, rel=0.05)  # 16000 probes: 1 % each for mean and scale
    assert curl_share(PAIR, *places(4, 2, 0.6)).value < 1e-20
