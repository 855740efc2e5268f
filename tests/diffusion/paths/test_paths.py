"""Noise paths against high precision, autograd, the literature's formulas and the continuity equation."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath
import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import (
    PATHS,
    NoisePath,
    betas,
    check_prior,
    condot,
    cosine,
    discrete_path,
    edm,
    noise_path,
    path_of,
    sub_vp,
    trigflow,
    ve,
    vp,
)

CLOSED = [vp(), vp(0.5, 0.5, t_max=16.0), sub_vp(), ve(), edm(), cosine(), cosine(0.0), condot()]
CLOSED += [condot(0.01), trigflow(), trigflow(1.3)]
GIVEN = [
    path_of(lambda t: 1 - t, lambda t: t, 1e-6, 1 - 1e-6, name="straight lines"),
    path_of(torch.ones_like, torch.exp, -5.0, 5.0, name="exponential noise"),
    path_of(lambda t: torch.exp(-5.025 * t**2), lambda t: (-torch.expm1(-10.05 * t**2)).sqrt(), 1e-3, 1.0),
    discrete_path((1 - betas("cosine", 50)).cumprod(0), name="fifty levels"),
]
ALL = [*CLOSED, *GIVEN]


def named(path: NoisePath) -> str:
    return "-".join([path.name, *(f"{v:g}" for v in path.options.values() if isinstance(v, float))])


def times(path: NoisePath, n: int = 20) -> Tensor:
    """Times of the path from end to end, both ends among them."""
    return torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64)


def precise(path: NoisePath, t: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """alpha and sigma of the textbook, to fifty digits."""
    t, o = mpmath.mpf(t), path.options
    if path.name in ("vp", "sub-vp"):
        b = mpmath.mpf(o["beta_min"]) * t + (mpmath.mpf(o["beta_max"]) - mpmath.mpf(o["beta_min"])) * t**2 / 2
        variance = 1 - mpmath.exp(-b)
        return mpmath.exp(-b / 2), mpmath.sqrt(variance) if path.name == "vp" else variance
    if path.name == "ve":
        low, high = mpmath.mpf(o["sigma_min"]), mpmath.mpf(o["sigma_max"])
        return mpmath.mpf(1), low * (high / low) ** t
    if path.name == "edm":
        return mpmath.mpf(1), t
    if path.name == "cosine":
        k = mpmath.mpf(o["k"])
        alpha = mpmath.cos(mpmath.pi / 2 * (t + k) / (1 + k)) / mpmath.cos(mpmath.pi / 2 * k / (1 + k))
        return alpha, mpmath.sqrt(1 - alpha**2)
    if path.name == "condot":
        return 1 - t, 1 - (1 - mpmath.mpf(o["sigma_floor"])) * (1 - t)
    return mpmath.cos(t), mpmath.mpf(o["sigma_data"]) * mpmath.sin(t)


@pytest.mark.parametrize("path", CLOSED, ids=named)
def test_alpha_and_sigma_are_exact_to_rounding_at_both_ends(path: NoisePath) -> None:
    c = path.coefficients(times(path))
    with mpmath.workdps(50):
        exact = [precise(path, t) for t in times(path).tolist()]
        for own, column in ((c.alpha, 0), (c.sigma, 1)):
            errors = [abs(mpmath.mpf(v) / e[column] - 1) for v, e in zip(own.tolist(), exact, strict=True)]
            # A few roundings; near pure noise alpha is as well known as 1 - t is, 1e3 roundings here.
            assert max(errors) < 1e-12 if path.name in ("cosine", "trigflow") else max(errors) < 1e-14


@pytest.mark.parametrize("path", ALL, ids=named)
def test_derivatives_are_those_of_autograd_and_of_differences(path: NoisePath) -> None:
    t = times(path)
    if path.name == "fifty levels":
        t = t + torch.where(t < path.t_max, 0.3, -0.3)  # between the levels, where it has derivatives
    c = path.coefficients(t)
    for own, curve in ((c.d_alpha, path.alpha), (c.d_sigma, path.sigma)):
        if path in CLOSED:
            at = t.clone().requires_grad_()
            value = curve(at)
            slope = torch.autograd.grad(value.sum(), at)[0] if value.requires_grad else torch.zeros_like(t)
            torch.testing.assert_close(own, slope, rtol=1e-11, atol=1e-13)
        h = 1e-6 * torch.minimum(t.abs(), torch.ones_like(t)).clamp_min(1e-6)
        inside = (t - h >= path.t_min) & (t + h <= path.t_max)
        difference = (curve(t + h) - curve(t - h)) / (2 * h)
        # Rounding of values up to 150 over 2e-6 of them; the second derivative's part is smaller.
        torch.testing.assert_close(own[inside], difference[inside], rtol=1e-6, atol=1e-8)


def test_drift_and_diffusion_are_those_of_the_literature() -> None:
    t = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    rate = 0.1 + 19.9 * t
    b = 0.1 * t + 19.9 * t**2 / 2
    tan = torch.tan(math.pi / 2 * (t + 0.008) / 1.008)
    expected = {
        "vp": (-rate / 2, rate),
        "sub-vp": (-rate / 2, rate * (1 - torch.exp(-2 * b))),
        "ve": (0 * t, 2 * math.log(5000) * ve().sigma(t) ** 2),
        "edm": (0 * t, 2 * t),
        "cosine": (-math.pi / 2 / 1.008 * tan, math.pi / 1.008 * tan),
        "condot": (-1 / (1 - t), 2 * t / (1 - t)),
        "trigflow": (-torch.tan(t), 2 * 0.25 * torch.tan(t)),
    }
    for name, (f, g2) in expected.items():
        torch.testing.assert_close(noise_path(name).f(t), f, rtol=1e-11, atol=0)
        torch.testing.assert_close(noise_path(name).g2(t), g2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("path", ALL, ids=named)
def test_time_and_noise_to_signal_ratio_are_inverse_to_each_other(path: NoisePath) -> None:
    low, high = max(path.rho_min, 1e-6), min(path.rho_max, 1e3)
    rho = torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64)
    # Near pure noise rho moves by rho times the rounding of t.
    torch.testing.assert_close(path.rho(path.t_of_rho(rho)), rho, rtol=1e-12, atol=0)
    t = times(path, 200)[1:]
    torch.testing.assert_close(path.t_of_rho(path.rho(t)), t, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(path.log_snr(t), (path.alpha(t) ** 2 / path.sigma(t) ** 2).log())
    assert (path.rho(t).diff() > 0).all()


@pytest.mark.parametrize("name", ["cosine", "condot", "trigflow"])
def test_paths_reach_pure_noise(name: str) -> None:
    """alpha(end) = 0 to rounding; nothing but f, g2 and rho is infinite there."""
    end = math.pi / 2 if name == "trigflow" else 1.0
    path = noise_path(name)
    c = path.coefficients(end)
    assert abs(float(c.alpha)) < 1e-16
    assert all(v.isfinite() for v in (c.sigma, c.d_alpha, c.d_sigma))
    assert float(path.t_of_rho(math.inf)) == end
    assert float(path.t_of_rho(0.0)) == 0


def mixture() -> GaussianMixture:
    return GaussianMixture(
        [0.3, 0.7], [[-1.0, 0.5], [0.8, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0], [0, 0.4]]]
    )


@pytest.mark.parametrize("path", ALL, ids=named)
def test_velocity_transports_the_density(path: NoisePath) -> None:
    """f x - g^2 s / 2 is E[alpha' x0 + sigma' eps | x] and solves the continuity equation, by autograd."""
    teacher, g = mixture(), torch.Generator().manual_seed(0)
    span = path.t_max - path.t_min
    for t in (path.t_min + span * torch.tensor([0.11, 0.43, 0.87], dtype=torch.float64)).unbind():
        c = path.coefficients(t)
        x = c.alpha * torch.randn(5, 2, generator=g, dtype=torch.float64)
        x = x + c.sigma * torch.randn(5, 2, generator=g, dtype=torch.float64)

        def velocity(x: Tensor, t: Tensor = t) -> Tensor:
            score = teacher.score(x / path.alpha(t), path.rho(t)) / path.alpha(t)
            return path.f(t) * x - 0.5 * path.g2(t) * score

        x0 = teacher(x / c.alpha, path.rho(t))
        mean = c.d_alpha * x0 + c.d_sigma * (x - c.alpha * x0) / c.sigma
        scale = max(velocity(x).abs().max(), (path.f(t) * x).abs().max())  # they cancel near pure noise
        torch.testing.assert_close(velocity(x) / scale, mean / scale, rtol=0, atol=1e-12)

        def log_density(x: Tensor, t: Tensor) -> Tensor:
            return teacher.log_prob(x / path.alpha(t), path.rho(t)) - 2 * path.alpha(t).log()

        h = 1e-5 * min(span, float(t - path.t_min))
        change = (log_density(x, t + h) - log_density(x, t - h)) / (2 * h)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z: velocity(z[None])[0]))(x)
        divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
        slope = teacher.score(x / c.alpha, path.rho(t)) / c.alpha
        flux = (velocity(x) * slope).sum(1) + divergence
        size = divergence.abs().max()
        # Second-order differences with a step of 1e-5 of the time.
        torch.testing.assert_close(change / size, -flux / size, rtol=0, atol=1e-6)


def test_names_options_and_copies() -> None:
    for name in PATHS:
        path = noise_path(name)
        assert noise_path(path) is path
        assert noise_path(path.name, **path.options) == path == pickle.loads(pickle.dumps(path))
        assert len({path, copy.deepcopy(path)}) == 1
    assert noise_path("rectified-flow") == noise_path("flow-matching") == condot()
    assert vp(beta_max=19.1) != vp()
    assert noise_path("ve", sigma_min=0.02, sigma_max=100.0) == ve(0.02, 100.0)


@pytest.mark.parametrize("path", CLOSED, ids=named)
def test_usual_paths_reach_their_prior(path: NoisePath) -> None:
    check_prior(path, 0.5)
    check_prior(path, path.rho_max / 10.1)
    with pytest.raises(UserError, match="does not reach its prior"):
        check_prior(path, path.rho_max / 9.9)


def test_paths_that_do_not_reach_their_prior_are_refused() -> None:
    half = (lambda t: 1 - 0.5 * t, lambda t: t)
    with pytest.raises(UserError, match=r"ratio of 2 for data of standard deviation 0.5.*at least 5.*scale"):
        path_of(*half)
    assert path_of(*half, sigma_data=0.1).rho_max == pytest.approx(2)


def test_paths_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean sub-vp"):
        noise_path("subvp")
    with pytest.raises(UserError, match="does not take these options"):
        noise_path("edm", beta_max=3.0)
    with pytest.raises(UserError, match="takes no options"):
        noise_path(edm(), sigma_min=1.0)
    with pytest.raises(UserError, match="replace t by 1 - t"):
        path_of(lambda t: t, lambda t: 1 - t)
    with pytest.raises(UserError, match=r"between t=0.5 and"):
        path_of(torch.ones_like, lambda t: 30 * torch.minimum(t, 0.5 * torch.ones_like(t)))
    with pytest.raises(UserError, match=r"sigma\(0\) = nan"):
        path_of(torch.ones_like, lambda t: t / t)
    with pytest.raises(UserError, match=r"torch.ones_like"):
        path_of(lambda t: torch.ones(()), torch.exp)
    for broken in (
        lambda: vp(beta_min=0.0),
        lambda: vp(20.0, 0.1),
        lambda: vp(t_min=1.0, t_max=0.5),
        lambda: sub_vp(t_min=-0.1),
        lambda: ve(50.0, 0.01),
        lambda: edm(sigma_max=math.inf),
        lambda: cosine(-0.1),
        lambda: cosine(t_max=1.1),
        lambda: condot(1.0),
        lambda: condot(t_min=0.5, t_max=0.2),
        lambda: trigflow(0.0),
        lambda: trigflow(rho_min=3.0, rho_max=1.0),
        lambda: path_of(lambda t: 1 - t, lambda t: t, 1.0, 0.0),
    ):
        with pytest.raises(UserError):
            broken()
