"""Stochastic interpolants between Gaussians, where velocity, noise and score are closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.interpolant_sampling import transport
from distmatch.diffusion.interpolants import Interpolant, noise_loss, velocity_loss
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import condot
from distmatch.diffusion.paths.on_path import OnPath
from tests.helpers.draws import normal

F64 = torch.float64
M0, M1 = torch.tensor([0.5, -0.2], dtype=F64), torch.tensor([-0.4, 0.8], dtype=F64)
C0 = torch.tensor([[0.5, 0.1], [0.1, 0.8]], dtype=F64)
C1 = torch.tensor([[0.3, -0.1], [-0.1, 0.2]], dtype=F64)
EYE = torch.eye(2, dtype=F64)
ALL = [
    *(Interpolant("linear", gamma) for gamma in ("brownian", "quadratic", "sine", "none")),
    Interpolant("linear", "brownian", 0.3),
    *(Interpolant("trig", gamma) for gamma in ("brownian", "quadratic", "none")),
    *(Interpolant("encoding-decoding", gamma) for gamma in ("brownian", "sine")),
    *(Interpolant("mirror", gamma) for gamma in ("brownian", "quadratic", "sine")),
]


def by_name(interpolant: Interpolant) -> str:
    return f"{interpolant.kind}-{interpolant.gamma}"


class Exact:
    """Velocity, noise and score between N(M0, C0) and N(M1, C1), independent."""

    def __init__(self, interpolant: Interpolant) -> None:
        self.interpolant = interpolant

    def law(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m = self.interpolant.at(t)
        a, b, d_a, d_b, gamma, slope = (v[:, None] for v in (m.a, m.b, m.d_a, m.d_b, m.gamma, m.gamma_slope))
        square = lambda v: v[..., None]  # noqa: E731
        covariance = square(a**2) * C0 + square(b**2) * C1 + square(gamma**2) * EYE
        moving = square(a * d_a) * C0 + square(b * d_b) * C1
        return a * M0 + b * M1, covariance, d_a * M0 + d_b * M1, moving + square(slope) * EYE

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        mean, covariance, _, _ = self.law(t)
        (p, q), (_, r) = covariance.movedim((1, 2), (0, 1))
        left, right = (x - mean).T
        solved = torch.stack([r * left - q * right, p * right - q * left], dim=1)
        return (solved / (p * r - q * q)[:, None])[..., None]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        _, _, drift, cross = self.law(t)
        return drift + (cross @ self.residual(x, t))[..., 0]

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.interpolant.at(t).gamma[:, None] * self.residual(x, t)[..., 0]

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.residual(x, t)[..., 0]


@pytest.mark.parametrize("interpolant", ALL, ids=by_name)
def test_the_coefficients_and_their_derivatives(interpolant: Interpolant) -> None:
    ends = interpolant.at(torch.tensor([0.0, 1.0], dtype=F64))
    assert ends.gamma.tolist() == pytest.approx([0, 0], abs=1e-15)
    expected = ([0, 0], [1, 1]) if interpolant.kind == "mirror" else ([1, 0], [0, 1])
    assert ends.a.tolist() == pytest.approx(expected[0], abs=1e-15)
    assert ends.b.tolist() == pytest.approx(expected[1], abs=1e-15)
    assert bool(ends.gamma_slope.isfinite().all())
    t = torch.linspace(0.02, 0.98, 48, dtype=F64, requires_grad=True)
    m = interpolant.at(t)
    for value, slope in ((m.a, m.d_a), (m.b, m.d_b), (m.gamma**2 / 2, m.gamma_slope)):
        if value.requires_grad:
            (found,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            torch.testing.assert_close(slope, found, rtol=0, atol=1e-12)
        else:
            assert not bool(slope.any())
    if interpolant.kind == "trig":
        torch.testing.assert_close(m.a**2 + m.b**2 + m.gamma**2, torch.ones_like(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("interpolant", [i for i in ALL if i.gamma != "none"], ids=by_name)
def test_velocity_is_the_transport_minus_the_noises_score(interpolant: Interpolant) -> None:
    # b = v - gamma gamma' s, v = E[I' | x] by regression of I' on x.
    exact, t, x = Exact(interpolant), torch.linspace(0.05, 0.95, 30, dtype=F64), normal(30, 2)
    m = interpolant.at(t)
    _, covariance, drift, _ = exact.law(t)
    moving = (m.a * m.d_a)[:, None, None] * C0 + (m.b * m.d_b)[:, None, None] * C1
    v = drift + (moving @ exact.residual(x, t))[..., 0]
    expected = v - m.gamma_slope[:, None] * exact.score(x, t)
    torch.testing.assert_close(exact.velocity(x, t), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.score(x, t), -exact.noise(x, t) / m.gamma[:, None], rtol=0, atol=1e-12)
    assert bool((torch.linalg.eigvalsh(covariance) > 0).all())


@pytest.mark.statistical
@pytest.mark.parametrize("interpolant", ALL, ids=by_name)
def test_the_losses_are_smallest_at_the_truth(interpolant: Interpolant) -> None:
    # loss(f + d) - loss(f) = E|d|^2 / 2 for the minimizer f, and only for it: to 4 standard errors.
    n, exact = 40000, Exact(interpolant)
    x0 = M0 + normal(n, 2, seed=1) @ torch.linalg.cholesky(C0).T
    x1 = M1 + normal(n, 2, seed=2) @ torch.linalg.cholesky(C1).T
    t, z = (
        torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=F64) * 0.98 + 0.01,
        normal(n, 2, seed=4),
    )
    pairs = [(velocity_loss, exact.velocity)]
    if interpolant.gamma != "none":
        pairs.append((noise_loss, exact.noise))
    for loss, truth in pairs:
        for bend in (lambda x, t: 0.3 * x, lambda x, t: 0.3 * (3 * t[:, None]).cos() * torch.ones_like(x)):
            other = lambda x, t, f=truth, d=bend: f(x, t) + d(x, t)  # noqa: E731
            gain = loss(other, interpolant, x0, x1, t, z) - loss(truth, interpolant, x0, x1, t, z)
            m = interpolant.at(t)
            x = m.a[:, None] * x0 + m.b[:, None] * x1 + m.gamma[:, None] * z
            excess = gain - bend(x, t).square().sum(1) / 2
            assert abs(float(excess.mean())) < 4 * float(excess.std()) / math.sqrt(n)


def test_noise_of_both_signs_tames_the_ends() -> None:
    interpolant, exact = Interpolant(), Exact(Interpolant())
    n = 4000
    x0, x1 = M0 + normal(n, 2, seed=1), M1 + normal(n, 2, seed=2)
    z = normal(n, 2, seed=3)
    spread = [
        float(velocity_loss(exact.velocity, interpolant, x0, x1, torch.full((n,), t, dtype=F64), z).std())
        for t in (1e-8, 1e-4, 0.1)
    ]
    assert max(spread) < 5 * min(spread)  # gamma' is 5000 at the first


@pytest.mark.statistical
@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.parametrize("diffusion", [0.0, 0.1, 1.0])
def test_ode_and_sdes_have_the_same_laws(diffusion: float, forwards: bool) -> None:
    interpolant = Interpolant("linear", "brownian")
    exact, n = Exact(interpolant), 4000
    ends = [0.02, 0.98] if forwards else [0.98, 0.02]
    times = torch.linspace(*ends, 201, dtype=F64)
    first, last = (exact.law(torch.tensor([t], dtype=F64)) for t in ends)
    x = first[0] + normal(n, 2) @ torch.linalg.cholesky(first[1][0]).T
    draws = SampleNoise(1, torch.arange(n), (2,))
    y = transport(
        exact.velocity, x, times, interpolant=interpolant, noise=exact.noise, diffusion=diffusion, draws=draws
    )
    # 4 standard errors of 4000 samples, and the 0.01 that Euler's 200 steps are wrong by at most.
    torch.testing.assert_close(y.mean(0), last[0][0], rtol=0, atol=4 * math.sqrt(0.5 / n) + 0.003)
    torch.testing.assert_close(torch.cov(y.T), last[1][0], rtol=0, atol=4 * math.sqrt(0.5 / n) + 0.01)
    if diffusion:  # the noise moved them: not the ODE's map
        assert float((y - transport(exact.velocity, x, times)).abs().mean()) > 0.1


@pytest.mark.parametrize("diffusion", [0.3, 1.0, 3.0])
def test_the_noise_bounds_what_a_wrong_velocity_does(diffusion: float) -> None:
    # KL(rho || rho_hat) <= int E|b + e s - b_hat - e s_hat|^2 dt / 4 e for an SDE; for the ODE no such thing.
    # A velocity that is wrong by a constant moves all samples alike when the noise is the same, so both laws
    # are Gaussian with one covariance.
    interpolant, wrong = Interpolant("linear", "brownian"), torch.tensor([0.4, -0.3], dtype=F64)
    exact, times = Exact(interpolant), torch.linspace(0.02, 0.98, 801, dtype=F64)
    _, (_, covariance, *_) = (exact.law(t[None]) for t in times[[0, -1]])
    x = M0 + normal(8, 2)

    def moved(diffusion: float) -> Tensor:
        ends = [
            transport(
                velocity,
                x,
                times,
                interpolant=interpolant,
                noise=exact.noise,
                diffusion=diffusion,
                draws=SampleNoise(1, torch.arange(8), (2,)),
            )
            for velocity in (exact.velocity, lambda x, t: exact.velocity(x, t) + wrong)
        ]
        shift = ends[1] - ends[0]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-9)
        return shift[0]

    shift = moved(diffusion)
    kl = 0.5 * float(shift @ torch.linalg.solve(covariance[0], shift))
    bound = 0.96 * float(wrong @ wrong) / (4 * diffusion)
    assert 0.02 * bound < kl <= bound
    shift = moved(0.0)
    assert 0.5 * float(shift @ torch.linalg.solve(covariance[0], shift)) > kl


def test_a_diffusion_that_vanishes_goes_from_end_to_end() -> None:
    interpolant = Interpolant("linear", "brownian")
    exact, n = Exact(interpolant), 10000
    x = M0 + normal(n, 2) @ torch.linalg.cholesky(C0).T
    y = transport(
        exact.velocity,
        x,
        torch.linspace(0, 1, 201, dtype=F64),
        interpolant=interpolant,
        noise=exact.noise,
        diffusion=lambda t: t * (1 - t),
        draws=SampleNoise(1, torch.arange(n), (2,)),
    )
    torch.testing.assert_close(y.mean(0), M1, rtol=0, atol=0.025)
    torch.testing.assert_close(torch.cov(y.T), C1, rtol=0, atol=0.025)


def test_the_ode_there_and_back() -> None:
    exact, x = Exact(Interpolant("trig", "quadratic")), normal(50, 2)
    times = torch.linspace(0, 1, 401, dtype=F64)
    there = transport(exact.velocity, x, times)
    torch.testing.assert_close(transport(exact.velocity, there, times.flip(0)), x, rtol=0, atol=1e-4)


def test_with_a_normal_base_it_is_a_noise_path() -> None:
    data = GaussianMixture([0.4, 0.6], [[-1.0, 0.3], [0.6, 0.1]], [0.1, 0.05])
    straight = Interpolant("linear", "none").noise_path(sigma_data=1.0)
    t = torch.linspace(0.01, 0.99, 21, dtype=F64)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(straight, name)(t), getattr(condot(), name)(t), rtol=0, atol=1e-12)
    # Its velocity, with time turned round, is that of the interpolant: regress on exact draws, here for one
    # Gaussian, where both are closed forms.
    one = GaussianMixture([1.0], M1[None], C1[None])
    for interpolant in (
        Interpolant("linear", "none"),
        Interpolant("linear"),
        Interpolant("trig", "quadratic"),
    ):
        path = interpolant.noise_path(sigma_data=1.0)
        x = normal(21, 2)
        m = interpolant.at(1 - t)
        a, b, d_a, d_b, slope = (v[:, None] for v in (m.a, m.b, m.d_a, m.d_b, m.gamma_slope))
        covariance = (a**2 + m.gamma[:, None] ** 2)[..., None] * EYE + (b**2)[..., None] * C1
        cross = (a * d_a + slope)[..., None] * EYE + (b * d_b)[..., None] * C1
        expected = d_b * M1 + (cross @ torch.linalg.solve(covariance, (x - b * M1)[..., None]))[..., 0]
        found = -OnPath(one, path, sigma_limit=1e6).velocity(x, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert OnPath(data, straight).velocity(normal(21, 2), t).shape == (21, 2)


def test_refusals() -> None:
    for options in ({"kind": "round"}, {"gamma": "blue"}, {"scale": 0.0}):
        with pytest.raises(UserError):
            Interpolant(**options)
    with pytest.raises(UserError, match="gamma below 1"):
        Interpolant("trig", "sine")
    with pytest.raises(UserError, match="gamma below 1"):
        Interpolant("trig", "brownian", 4.0)
    with pytest.raises(UserError, match="needs noise"):
        Interpolant("mirror", "none")
    with pytest.raises(UserError, match="must rise"):
        Interpolant("mirror").noise_path()
    exact, x = Exact(Interpolant()), normal(3, 2)
    with pytest.raises(UserError, match="increasing or decreasing"):
        transport(exact.velocity, x, [0.0, 0.5, 0.3])
    with pytest.raises(UserError, match="between 0 and 1"):
        transport(exact.velocity, x, [0.0, 1.5])
    with pytest.raises(UserError, match="random numbers"):
        transport(exact.velocity, x, [0.1, 0.5], diffusion=0.1)
