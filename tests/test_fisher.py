"""The Fisher family's gradients are those of the divergences they are named after.

The student is linear, x0 = m + A z, so its noised density is a Gaussian and everything is exact. The losses
are integrated over (z, eps) by Gauss-Hermite quadrature in float64, with teacher and fake score as frozen
functions of x_t, and their gradients compared with central differences of integrals over the densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import NAMES, Divergence, custom, divergence, divergence_1d
from distmatch.methods.matching.fisher import (
    distance_slope,
    sid_loss,
    sim_loss,
    uni_instruct_loss,
    weight_derivatives,
)

OWN = custom(lambda r: (r - 1) ** 2 / (r + 3) + 0.2 * r * r.log(), "own")
ALL: list[Divergence] = [divergence(n) for n in (*NAMES, "alpha:0.5", "alpha:1.3") if n != "tv"] + [OWN]
GAUSSIAN = GaussianMixture([1.0], [[0.0]], [1.3])
MIXTURE = GaussianMixture([0.4, 0.6], [[-0.7], [0.9]], [0.5, 0.8])
PLANE = GaussianMixture(
    [0.35, 0.65], [[-0.6, 0.2], [0.5, -0.3]], [[[0.6, 0.1], [0.1, 0.9]], [[0.8, -0.2], [-0.2, 0.6]]]
)
THETA_1D = torch.tensor([0.4, 0.9], dtype=torch.float64)
THETA_2D = torch.tensor([0.2, 0.1, 0.8, 0.15, -0.1, 0.75], dtype=torch.float64)


def student(theta: Tensor) -> GaussianMixture:
    """The law of m + A z for theta = (m, A)."""
    d = 1 if len(theta) == 2 else 2
    a = theta[d:].reshape(d, d)
    return GaussianMixture([1.0], theta[None, :d], (a @ a.T)[None])


@dataclass(frozen=True)
class Exact:
    """What a loss may look at, hanging on the student's samples, from networks that are perfect."""

    teacher: Tensor
    fake: Tensor
    x0: Tensor
    x: Tensor
    sigma: Tensor
    log_r: Tensor


def hermite(nodes: int, dims: int) -> tuple[Tensor, Tensor]:
    """Nodes (N, dims) and weights (N,) for the mean over a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.cartesian_prod(*[torch.as_tensor(x)] * dims)
    masses = torch.cartesian_prod(*[torch.as_tensor(w / math.sqrt(2 * math.pi))] * dims)
    points, weights = points.reshape(-1, dims), masses.reshape(-1, dims).prod(dim=1)
    keep = weights > 1e-60  # far out nothing is left of the weight, and ratios overflow
    return points[keep], weights[keep]


def mean_and_gradient(
    loss: Callable[[Exact], Tensor], teacher: GaussianMixture, theta: Tensor, sigma: float, nodes: int
) -> tuple[Tensor, Tensor]:
    """The mean of a loss over (z, eps), and its gradient by theta, networks frozen."""
    d = teacher.shape[0]
    points, mass = hermite(nodes, 2 * d)
    theta = theta.clone().requires_grad_()
    x0 = theta[:d] + points[:, :d] @ theta[d:].reshape(d, d).T
    x = x0 + sigma * points[:, d:]
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    fake = student(theta.detach())
    log_r = teacher.log_prob(x, level) - fake.log_prob(x, level)
    mean = (mass * loss(Exact(teacher(x, level), fake(x, level), x0, x, level, log_r))).sum()
    return mean.detach(), torch.autograd.grad(mean, theta)[0]


def differences(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 3e-5) -> Tensor:
    """Central differences of a function of a vector; the error is of order step^2 = 1e-9."""
    shifts = step * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(value(at + e) - value(at - e)) / (2 * step) for e in shifts])


def grid(dims: int) -> tuple[Tensor, float]:
    """Points for integrals over the densities, and the size of a cell: exact for densities this smooth."""
    axis = torch.linspace(-22, 22, 1201) if dims == 1 else torch.linspace(-11, 11, 181)
    axis = axis.double()
    x = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
    return x, float(axis[1] - axis[0]) ** dims


def scores(teacher: GaussianMixture, theta: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log r and the score difference at x."""
    own = student(theta)
    log_p, log_q = teacher.log_prob(x, sigma), own.log_prob(x, sigma)
    return log_q, log_p - log_q, teacher.score(x, sigma) - own.score(x, sigma)


def expanded(measure: Divergence, teacher: GaussianMixture, sigma: float) -> Callable[[Tensor], Tensor]:
    """theta -> E_q[h(r) |s_p - s_q|^2] at a noise level."""
    x, cell = grid(teacher.shape[0])

    def value(theta: Tensor) -> Tensor:
        log_q, log_r, delta = scores(teacher, theta, x, sigma)
        # Far out, where 22 spreads leave q no digits, h may overflow: log r is held where q h is still 0.
        h = measure.weight(log_r.clamp(-200, 200))
        return cell * (log_q.exp() * h * delta.square().sum(1)).sum()

    return value


# ------------------------------------------------------------------ SiD

# By m and s, for p = N(0, 1.3), q = N(0.4, s^2) at s = 0.9, sigma = 0.5, of |Delta|^2 of the denoisers.
SID = {
    0.0: (0.0100549, 0.005596, -0.021646),
    0.5: (0.0050274, 0.010406, -0.026649),
    1.0: (0.0, 0.015216, -0.031652),
    1.2: (-0.0020110, 0.017140, -0.033654),
}


@pytest.mark.parametrize("alpha", SID)
def test_golden_values_of_sid(alpha: float) -> None:
    mean, gradient = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=alpha, scaling="score"),
        GAUSSIAN,
        THETA_1D,
        0.5,
        40,
    )
    # Denoisers differ by sigma^2 times what scores do.
    values = torch.cat([mean[None], gradient]) * 0.5**4
    torch.testing.assert_close(values, torch.tensor(SID[alpha]).double(), rtol=0, atol=6e-7)


@pytest.mark.parametrize("sigma", [0.5, 1.4])
@pytest.mark.parametrize(("teacher", "theta"), [(MIXTURE, THETA_1D), (PLANE, THETA_2D)], ids=["1d", "2d"])
def test_sid_at_one_half_is_half_the_fisher_divergence(
    teacher: GaussianMixture, theta: Tensor, sigma: float
) -> None:
    _, mine = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=0.5, scaling="score"),
        teacher,
        theta,
        sigma,
        80 if len(theta) == 2 else 22,
    )
    true = 0.5 * differences(expanded(divergence("reverse_kl"), teacher, sigma), theta)
    assert (mine - true).norm() < 1e-5 * true.norm()
    assert true.norm() > 1e-3


def test_the_mean_of_sid_changes_sign_at_one() -> None:
    def mean(alpha: float) -> Tensor:
        return mean_and_gradient(
            lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=alpha, scaling="score"),
            MIXTURE,
            THETA_1D,
            0.5,
            80,
        )[0]

    fisher = expanded(divergence("reverse_kl"), MIXTURE, 0.5)(THETA_1D)
    for alpha in (0.0, 0.7, 1.0, 1.2):
        torch.testing.assert_close(
            mean(alpha), (1 - alpha) * fisher, rtol=2e-5, atol=1e-9
        )  # quadrature: 5e-6


# ------------------------------------------------------------------ SIM


def distance(y: Tensor, name: str, c: float) -> Tensor:
    """The distances as they are written in the docstring."""
    if name == "huber":
        return y.shape[1] * (y.square().mean(1) + c * c).sqrt()
    return y.square().sum(1) if name == "squared" else (y.square() + c * c).sqrt().sum(1)


@pytest.mark.parametrize("name", ["huber", "squared", "absolute"])
@pytest.mark.parametrize(("teacher", "theta"), [(MIXTURE, THETA_1D), (PLANE, THETA_2D)], ids=["1d", "2d"])
def test_sim_differentiates_the_student_s_score_alone(
    teacher: GaussianMixture, theta: Tensor, name: str
) -> None:
    sigma, c = 0.5, 0.3
    _, mine = mean_and_gradient(
        lambda e: sim_loss(e.teacher, e.fake, e.x0, e.sigma, distance=name, c=c, scaling="score"),  # type: ignore[arg-type]
        teacher,
        theta,
        sigma,
        80 if len(theta) == 2 else 22,
    )
    x, cell = grid(teacher.shape[0])
    held = student(theta).log_prob(x, sigma).exp()
    true = differences(
        lambda t: cell * (held * distance(scores(teacher, t, x, sigma)[2], name, c)).sum(), theta
    )
    # The square roots have poles at distance c from the real axis, where quadratures lose digits.
    assert (mine - true).norm() < (1e-5 if name == "squared" else 1e-3) * true.norm()
    assert true.norm() > 1e-2


def test_distances_have_the_slopes_that_are_written_down() -> None:
    y = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for name in ("huber", "squared", "absolute"):
        (slope,) = torch.autograd.grad(distance(y, name, 0.3).sum(), y)
        torch.testing.assert_close(distance_slope(y.detach(), name, 0.3), slope)  # type: ignore[arg-type]
    repeated = distance_slope(y.detach().repeat(1, 4), "huber", 0.3)  # c does not know the dimension
    torch.testing.assert_close(repeated[:, :5], distance_slope(y.detach(), "huber", 0.3))


def test_sim_with_the_squared_distance_is_twice_sid_at_one() -> None:
    teacher, fake, x0 = torch.randn(3, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 3, 6)
    for scaling in ("dmd2", "score"):
        sim = sim_loss(teacher, fake, x0, sigma, distance="squared", scaling=scaling)  # type: ignore[arg-type]
        sid = sid_loss(teacher, fake, x0, sigma, alpha=1.0, scaling=scaling)  # type: ignore[arg-type]
        torch.testing.assert_close(sim, 2 * sid)


# ------------------------------------------------------------------ Uni-Instruct

# What the weights of the three terms are in closed form: h, h - r h', -r^2 h'', in our scale of each.
WEIGHTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "reverse_kl": lambda r: (r**0, r**0, 0 * r),
    "kl": lambda r: (r, 0 * r, 0 * r),
    "jeffreys": lambda r: (r + 1, r**0, 0 * r),
    "js": lambda r: (r / (r + 1) / 2, r**2 / (r + 1) ** 2 / 2, r**2 / (r + 1) ** 3),
    "softened_reverse_kl": lambda r: (
        1 / (r + 1),
        (2 * r + 1) / (r + 1) ** 2,
        -2 * r**2 / (r + 1) ** 3,
    ),
    "hellinger": lambda r: (r.sqrt() / 2, r.sqrt() / 4, r.sqrt() / 8),
    "pearson": lambda r: (2 * r**2, -2 * r**2, -4 * r**2),
    "neyman": lambda r: (2 / r, 4 / r, -4 / r),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_weights_are_those_of_the_table(name: str, dtype: torch.dtype) -> None:
    log_r = torch.linspace(-3, 3, 61, dtype=dtype)
    h, first, second = weight_derivatives(divergence(name), log_r)
    for mine, true in zip((h, h - first, -second), WEIGHTS[name](log_r.exp()), strict=True):
        torch.testing.assert_close(mine, true)
        assert mine.dtype == dtype
        assert not mine.requires_grad


def test_a_custom_divergence_has_the_weights_of_the_built_in_one() -> None:
    log_r = torch.linspace(-3, 3, 61, dtype=torch.float64)
    own = custom(lambda r: 0.5 * (r * r.log() - (r + 1) * ((r + 1) / 2).log()), "my js")
    for mine, true in zip(
        weight_derivatives(own, log_r), weight_derivatives(divergence("js"), log_r), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-9)


def uni(measure: Divergence, detached: bool = False) -> Callable[[Exact], Tensor]:
    def loss(e: Exact) -> Tensor:
        log_r = e.log_r.detach() if detached else e.log_r
        return uni_instruct_loss(e.teacher, e.fake, e.x0, e.x, e.sigma, log_r, measure, scaling="score")

    return loss


@pytest.mark.parametrize("measure", ALL, ids=str)
@pytest.mark.parametrize("sigma", [0.5, 1.4])
@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_uni_instruct_is_the_exact_gradient_in_1d(
    teacher: GaussianMixture, sigma: float, measure: Divergence
) -> None:
    _, mine = mean_and_gradient(uni(measure), teacher, THETA_1D, sigma, 110)
    true = differences(expanded(measure, teacher, sigma), THETA_1D)
    assert (mine - true).norm() < 1e-5 * true.norm()
    assert true.norm() > 1e-3


@pytest.mark.parametrize("name", ["kl", "js", "softened_reverse_kl", "own"])
def test_uni_instruct_is_the_exact_gradient_in_2d(name: str) -> None:
    measure = OWN if name == "own" else divergence(name)
    _, mine = mean_and_gradient(uni(measure), PLANE, THETA_2D, 0.5, 22)
    true = differences(expanded(measure, PLANE, 0.5), THETA_2D)
    assert (mine - true).norm() < 1e-5 * true.norm()


def test_a_detached_ratio_biases_the_spread_alone() -> None:
    exact, biased = (
        mean_and_gradient(uni(divergence("kl"), detached), GAUSSIAN, THETA_1D, 0.5, 80)[1]
        for detached in (False, True)
    )
    torch.testing.assert_close(exact[0], biased[0])
    assert float(exact[1]) == pytest.approx(-1.965, abs=5e-4)
    assert float(biased[1]) == pytest.approx(-1.489, abs=5e-4)


def test_reverse_kl_is_twice_sid_at_one_half_and_forward_kl_weighted_sim() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, fake, x0, x = torch.randn(4, 6, 1, 4, 4, generator=g)
    sigma, log_r = torch.linspace(0.1, 3, 6), torch.randn(6, generator=g)
    for scaling in ("dmd2", "score"):
        reverse, forward = (
            uni_instruct_loss(
                teacher,
                fake,
                x0,
                x,
                sigma,
                log_r,
                divergence(name),
                scaling=scaling,  # type: ignore[arg-type]
            )
            for name in ("reverse_kl", "kl")
        )
        half = sid_loss(teacher, fake, x0, sigma, alpha=0.5, scaling=scaling)  # type: ignore[arg-type]
        sim = sim_loss(teacher, fake, x0, sigma, distance="squared", scaling=scaling)  # type: ignore[arg-type]
        torch.testing.assert_close(reverse, 2 * half)
        torch.testing.assert_close(forward, log_r.exp() * sim)


# D_f(p_0||q_0) of the same two Gaussians. js and hellinger are given for other multiples than ours.
EXPANSION = {
    "reverse_kl": (1.0, 0.109620),
    "softened_reverse_kl": (1.0, 0.047962),
    "js": (2.0, 0.061657),
    "hellinger": (0.5, 0.032284),
    "kl": (1.0, 0.164692),
    "jeffreys": (1.0, 0.274311),
    "pearson": (1.0, 1.07055),
    "neyman": (1.0, 0.180576),
}


@pytest.mark.parametrize("name", EXPANSION)
def test_the_expansion_over_all_noise_levels_is_the_divergence(name: str) -> None:
    scale, golden = EXPANSION[name]
    measure = divergence(name)
    nodes, weights = np.polynomial.legendre.leggauss(48)
    total = torch.zeros((), dtype=torch.float64)
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        variance = 2.0 * u / (1 - u)  # all of (0, infinity); beyond every spread the integrand falls as v^-2
        level = math.sqrt(variance)
        x, mass = hermite(90, 1)
        spread = math.sqrt(0.81 + variance)
        _, log_r, delta = scores(GAUSSIAN, THETA_1D, 0.4 + spread * x, level)
        h = measure.weight(log_r)
        total = total + w * 2.0 / (1 - u) ** 2 * 0.5 * (mass * h * delta[:, 0].square()).sum()
    own = student(THETA_1D)
    value = divergence_1d(
        measure, lambda x: GAUSSIAN.log_prob(x[:, None]), lambda x: own.log_prob(x[:, None]), -25.0, 25.0, 64
    )
    assert scale * float(total) == pytest.approx(golden, rel=1e-4 if name == "pearson" else 2e-5)
    assert float(total) == pytest.approx(float(value), rel=1e-4 if name == "pearson" else 2e-5)


# ------------------------------------------------------------------ common to all


@pytest.mark.parametrize("scaling", ["dmd2", "score"])
def test_a_fake_score_equal_to_the_teacher_leaves_no_gradient(scaling: str) -> None:
    _, first = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.teacher, e.x0, e.sigma, scaling=scaling),  # type: ignore[arg-type]
        MIXTURE,
        THETA_1D,
        0.5,
        20,
    )
    assert not first.any()
    for name in ("huber", "squared", "absolute"):
        _, zero = mean_and_gradient(
            lambda e, name=name: sim_loss(  # type: ignore[misc]
                e.teacher, e.teacher, e.x0, e.sigma, distance=name, scaling=scaling
            ),
            MIXTURE,
            THETA_1D,
            0.5,
            20,
        )
        # d'(y) is 0 to the bit; the two ways to D - D may round differently in the backward pass.
        assert zero.abs().max() < 1e-12
    for measure in ALL:
        _, zero = mean_and_gradient(
            lambda e, f=measure: uni_instruct_loss(  # type: ignore[misc]
                e.teacher, e.teacher, e.x0, e.x, e.sigma, e.log_r, f, scaling=scaling
            ),
            MIXTURE,
            THETA_1D,
            0.5,
            20,
        )
        assert zero.abs().max() < 1e-12


def test_losses_of_half_precision_are_float32_and_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, fake, x0, x = torch.randn(4, 6, 2, generator=g).bfloat16()
    sigma, log_r = torch.linspace(0.1, 3, 6), torch.randn(6, generator=g)
    losses = (
        sid_loss(teacher, fake, x0, sigma),
        sim_loss(teacher, fake, x0, sigma),
        uni_instruct_loss(teacher, fake, x0, x, sigma, log_r, divergence("js")),
        sid_loss(teacher, fake, teacher, sigma),  # x0 where the teacher wants it: no division by 0
    )
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
