"""The key proof: the gradient that distillation assembles is that of the divergence it is named after.

The student is linear, x0 = m + A z, so that its noised density is a Gaussian and everything is exact. The
gradient of `score_difference` is integrated over (z, eps) by Gauss-Hermite quadrature in float64 and compared
with central finite differences of D_f(p_sigma || q_sigma), itself computed by quadrature.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import NAMES, Divergence, custom, divergence, divergence_1d
from distmatch.losses import (
    adversarial_discriminator_loss,
    adversarial_generator_loss,
    approximate_r1,
    score_difference,
)

OWN = custom(lambda r: (r - 1) ** 2 / (r + 3) + 0.2 * r * r.log(), "own")
ALL: list[Divergence] = [divergence(n) for n in (*NAMES, "alpha:0.5", "alpha:1.3") if n != "tv"] + [OWN]
GAUSSIAN_1D = GaussianMixture([1.0], [[0.0]], [1.3])
MIXTURE_1D = GaussianMixture([0.4, 0.6], [[-0.7], [0.9]], [0.5, 0.8])
MIXTURE_2D = GaussianMixture(
    [0.35, 0.65], [[-0.6, 0.2], [0.5, -0.3]], [[[0.6, 0.1], [0.1, 0.9]], [[0.8, -0.2], [-0.2, 0.6]]]
)


def hermite(nodes: int, dims: int) -> tuple[Tensor, Tensor]:
    """Nodes (N, dims) and weights (N,) for the mean over a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.as_tensor(x), torch.as_tensor(w / math.sqrt(2 * math.pi))
    points = torch.cartesian_prod(*[x] * dims)
    weights = torch.cartesian_prod(*[w] * dims).prod(dim=1)
    return points, weights


def student_gradients(
    teacher: GaussianMixture, mean: Tensor, matrix: Tensor, sigma: float, nodes: int
) -> Callable[[Divergence], tuple[Tensor, Tensor]]:
    """The mean over (z, eps) of the assembled gradient, with respect to ``mean`` and ``matrix``."""
    dim = len(mean)
    points, mass = hermite(nodes, 2 * dim)
    mean, matrix = mean.clone().requires_grad_(), matrix.clone().requires_grad_()
    x0 = mean + points[:, :dim] @ matrix.T
    x = (x0 + sigma * points[:, dim:]).detach()
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    fake = GaussianMixture([1.0], mean.detach()[None], (matrix @ matrix.T).detach()[None])
    log_r = teacher.log_prob(x, level) - fake.log_prob(x, level)
    prediction, own = teacher(x, level), fake(x, level)

    def gradients(measure: Divergence) -> tuple[Tensor, Tensor]:
        weight = measure.weight(log_r)
        g = score_difference(prediction, own, x0, level, weight, scaling="score")
        return torch.autograd.grad(x0, (mean, matrix), g * mass[:, None], retain_graph=True)

    return gradients


def differences(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of a function of a vector; the error is of order step^2 = 1e-8."""
    out = []
    for i in range(len(at)):
        shift = torch.zeros_like(at)
        shift[i] = step
        out.append((value(at + shift) - value(at - shift)) / (2 * step))
    return torch.stack(out)


@pytest.mark.parametrize("measure", ALL, ids=str)
@pytest.mark.parametrize("sigma", [0.5, 1.4])
@pytest.mark.parametrize("teacher", [GAUSSIAN_1D, MIXTURE_1D], ids=["gaussian", "mixture"])
def test_the_assembled_gradient_is_that_of_the_divergence_in_1d(
    teacher: GaussianMixture, sigma: float, measure: Divergence
) -> None:
    mean, scale = torch.tensor([0.4]).double(), torch.tensor([[0.9]]).double()
    assembled = torch.cat([g.flatten() for g in student_gradients(teacher, mean, scale, sigma, 80)(measure)])

    def value(theta: Tensor) -> Tensor:
        student = GaussianMixture([1.0], theta[None, :1], theta[None, 1:] ** 2)
        return divergence_1d(
            measure,
            lambda x: teacher.log_prob(x[:, None], sigma),
            lambda x: student.log_prob(x[:, None], sigma),
            -25.0,
            25.0,
            64,
        )

    true = differences(value, torch.cat([mean, scale[0]]))
    # Relative to the gradient's own size; measured at most 4.4e-7 (finite differences), asked 1e-5.
    assert (assembled - true).norm() < 1e-5 * true.norm()
    assert true.norm() > 0.01


@pytest.fixture(scope="module")
def plane() -> tuple[Callable[[Divergence], tuple[Tensor, Tensor]], Callable[[Divergence], Tensor]]:
    """The assembled gradient and the true one of a student with a full matrix, in two dimensions."""
    sigma = 0.5
    mean = torch.tensor([0.2, 0.1]).double()
    matrix = torch.tensor([[0.8, 0.15], [-0.1, 0.75]]).double()
    axis = torch.linspace(-11, 11, 181, dtype=torch.float64)  # spacing 0.12, spreads above 0.8: exact
    x, cell = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
    log_p = MIXTURE_2D.log_prob(x, sigma)

    def log_q(theta: Tensor) -> Tensor:
        a = theta[2:].reshape(2, 2)
        return GaussianMixture([1.0], theta[None, :2], (a @ a.T)[None]).log_prob(x, sigma)

    step, at = 1e-4, torch.cat([mean, matrix.flatten()])
    sides = [[log_q(at + sign * step * e) for sign in (1, -1)] for e in torch.eye(6, dtype=torch.float64)]

    def true(measure: Divergence) -> Tensor:
        def value(log_q: Tensor) -> Tensor:
            log_r = (
                log_p - log_q
            )  # as in divergence_1d: E_p of the dual where p > q, so that nothing overflows
            below = log_q.exp() * measure.f(log_r.clamp(max=0))
            above = log_p.exp() * measure.dual().f((-log_r).clamp(max=0))
            return cell * torch.where(log_r <= 0, below, above).sum()

        return torch.stack([(value(plus) - value(minus)) / (2 * step) for plus, minus in sides])

    return student_gradients(MIXTURE_2D, mean, matrix, sigma, 22), true


@pytest.mark.parametrize("measure", ALL, ids=str)
def test_the_assembled_gradient_is_that_of_the_divergence_in_2d(plane, measure: Divergence) -> None:
    assembled, true = plane
    mine, theirs = torch.cat([g.flatten() for g in assembled(measure)]), true(measure)
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()  # measured at most 2e-7
    assert theirs.norm() > 0.01


# d/dm and d/ds of D_f(p || q), p = N(0, 1.3) and q = N(0.4, s^2) at s = 0.9, both noised with sigma^2 = 0.25.
# js and hellinger are given for other multiples of the divergence than ours: 2 JS and half of Hellinger.
GOLDEN = {
    "reverse_kl": (1.0, 0.258065, -0.268411),
    "softened_reverse_kl": (1.0, 0.115408, -0.106740),
    "js": (2.0, 0.142656, -0.161671),
    "hellinger": (0.5, 0.074789, -0.088103),
    "kl": (1.0, 0.377358, -0.520648),
    "jeffreys": (1.0, 0.635423, -0.789059),
    "pearson": (1.0, 2.095680, -4.8269),
    "neyman": (1.0, 0.447081, -0.386109),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_gradients_of_two_gaussians(name: str) -> None:
    scale, by_mean, by_scale = GOLDEN[name]
    start = torch.tensor([0.4]).double(), torch.tensor([[0.9]]).double()
    gradient = student_gradients(GAUSSIAN_1D, *start, 0.5, 60)(divergence(name))
    assert scale * float(gradient[0]) == pytest.approx(by_mean, abs=6e-7)
    assert scale * float(gradient[1]) == pytest.approx(by_scale, abs=6e-7 if name != "pearson" else 5e-5)


def test_kl_vanishes_at_matched_moments_and_reverse_kl_does_not() -> None:
    # grad KL(p || q) of a Gaussian q is a difference of moments, whatever p is.
    teacher = GaussianMixture([0.2, 0.8], [[-1.5], [1.0]], [0.2, 0.4])
    mean = torch.tensor([0.2 * -1.5 + 0.8 * 1.0]).double()
    scale = torch.tensor([[teacher.sigma_data]]).double()
    gradients = student_gradients(teacher, mean, scale, 0.5, 120)
    assert torch.cat([g.flatten() for g in gradients(divergence("kl"))]).abs().max() < 1e-6
    assert torch.cat([g.flatten() for g in gradients(divergence("reverse_kl"))]).abs().max() > 0.02


def test_scalings_weights_and_dtypes_of_the_score_difference() -> None:
    g = torch.Generator().manual_seed(0)
    p, q, x0 = (torch.randn(5, 3, 2, 2, generator=g) for _ in range(3))
    sigma, weight = torch.linspace(0.1, 4, 5), torch.rand(5, generator=g)
    for i in range(5):
        size = (x0[i] - p[i]).abs().mean()
        dmd2 = score_difference(p, q, x0, sigma, weight)[i]
        torch.testing.assert_close(dmd2, weight[i] * (q[i] - p[i]) / size)
        plain = score_difference(p, q, x0, sigma, scaling="score")[i]
        torch.testing.assert_close(plain, (q[i] - p[i]) / sigma[i] ** 2)
    ones = score_difference(p, q, x0, sigma, torch.ones(5))
    assert torch.equal(ones, score_difference(p, q, x0, sigma))
    twice = score_difference(p, p + 3 * (q - p), x0, sigma)  # the denominator does not move with the critic
    torch.testing.assert_close(twice, 3 * score_difference(p, q, x0, sigma))
    assert not score_difference(p, p, x0, sigma, weight).any()
    both = score_difference(p + 2.0, q + 2.0, x0 + 2.0, sigma)  # what both have in common does not matter
    torch.testing.assert_close(both, ones)
    torch.testing.assert_close(
        score_difference(p + x0, q + x0, x0, sigma, scaling="score"),
        score_difference(p, q, x0, sigma, scaling="score"),
        rtol=1e-5,
        atol=1e-4,  # sigma = 0.1 blows a rounding up a hundredfold
    )
    assert (
        score_difference(p, q, p, sigma).isfinite().all()
    )  # x0 where the teacher wants it: no division by 0
    half = score_difference(p.bfloat16(), q.bfloat16(), x0, sigma, weight)
    assert half.dtype == torch.float32
    double = score_difference(p.double(), q.double(), x0.double(), sigma, weight)
    assert double.dtype == torch.float64
    for tensor, parts in itertools.product((p, q, x0), ("dmd2", "score")):
        tensor.requires_grad_()
        assert not score_difference(p, q, x0, sigma, weight, scaling=parts).requires_grad  # type: ignore[arg-type]


def test_the_discriminator_is_at_rest_where_its_logit_is_the_log_ratio() -> None:
    # Two points with p = (3/4, 1/4) and q = (1/4, 3/4), as samples in those proportions.
    logit = torch.tensor([3.0, 1 / 3]).log().requires_grad_()
    loss = adversarial_discriminator_loss(real=logit[[0, 0, 0, 1]], fake=logit[[0, 1, 1, 1]])
    (slope,) = torch.autograd.grad(loss, logit)
    torch.testing.assert_close(slope, torch.zeros(2), rtol=0, atol=1e-6)
    assert adversarial_discriminator_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(
        2 * math.log(2), rel=1e-6
    )


def test_the_adversarial_term_pulls_towards_the_real() -> None:
    logit = torch.linspace(-5, 5, 11).requires_grad_()
    (slope,) = torch.autograd.grad(adversarial_generator_loss(logit).mean(), logit)
    torch.testing.assert_close(slope, -torch.sigmoid(-logit.detach()) / 11)
    r1 = approximate_r1(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]))
    assert r1.item() == pytest.approx((0.25 + 1.0) / 2)
