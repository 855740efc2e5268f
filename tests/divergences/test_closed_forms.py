"""Closed forms of Gaussians: against quadrature, torch.distributions, SciPy, special cases and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.distributions import MultivariateNormal, kl_divergence

from distmatch.base.errors import UserError
from distmatch.divergences import Renyi, divergence_1d, divergence_2d
from distmatch.divergences.closed_forms import (
    Gaussian,
    cauchy_schwarz,
    f_divergence,
    fisher,
    mmd_squared,
    wasserstein2_squared,
)

CLOSED = ["kl", "reverse_kl", "jeffreys", "hellinger", "pearson", "neyman"]
ORDERS = [*(f"alpha:{a}" for a in (-0.6, 1e-6, 0.3, 1.4)), *(f"renyi:{a}" for a in (0.3, 0.999999, 1, 1.6))]


def gaussian(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def random_gaussian(d, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, d, dtype=torch.float64, generator=generator) / math.sqrt(d)
    mean = 0.5 * torch.randn(d, dtype=torch.float64, generator=generator)
    return Gaussian(mean, factor @ factor.T + torch.eye(d, dtype=torch.float64))


# Neither variance is twice the other in any direction: all the orders above are finite.
LINE = gaussian([0.3], [[1.44]]), gaussian([-0.5], [[1.6]])
PLANE = gaussian([0.3, -0.2], [[1.2, 0.3], [0.3, 0.9]]), gaussian([-0.4, 0.1], [[1.1, 0.1], [0.1, 1.1]])


@pytest.mark.parametrize("name", [*CLOSED, *ORDERS])
def test_agree_with_quadrature_on_a_line_and_in_the_plane(name):
    p, q = LINE
    line = divergence_1d(name, p.log_prob, q.log_prob, -40, 40, n=96)
    # Orders 1e-6 from a KL limit divide rounding of 1e-16 by 1e-6.
    rel = 1e-8 if "e-06" in name or "999999" in name else 1e-10
    assert f_divergence(name, p, q).item() == pytest.approx(line.item(), rel=rel)
    p, q = PLANE
    # p^2 / q is wider than p or q: up to a standard deviation of 2 here.
    plane = divergence_2d(name, p.log_prob, q.log_prob, (-22.0, -22.0), (22.0, 22.0), n=20)
    assert f_divergence(name, p, q).item() == pytest.approx(plane.item(), rel=max(rel, 1e-8))


def test_kl_agrees_with_torch_distributions():
    for d in (1, 2, 10, 50):
        p, q = random_gaussian(d, 0), random_gaussian(d, 1)
        theirs = [MultivariateNormal(g.mean, g.covariance) for g in (p, q)]
        assert f_divergence("kl", p, q).item() == pytest.approx(kl_divergence(*theirs).item(), rel=1e-11)
        back = kl_divergence(theirs[1], theirs[0]).item()
        assert f_divergence("rkl", p, q).item() == pytest.approx(back, rel=1e-11)
        x = torch.randn(7, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(p.log_prob(x), theirs[0].log_prob(x))


def test_the_alpha_family_passes_through_its_special_cases_in_ten_dimensions():
    p, q = random_gaussian(10, 3), random_gaussian(10, 4)
    value = {name: f_divergence(name, p, q).item() for name in CLOSED}
    for order, name, factor in [(0, "reverse_kl", 1), (0.5, "hellinger", 2), (1, "kl", 1)]:
        assert f_divergence(f"alpha:{order}", p, q).item() == pytest.approx(factor * value[name], rel=1e-12)
    assert f_divergence("renyi:1", p, q).item() == pytest.approx(value["kl"])
    # Renyi of order 1/2 is -2 log of the Bhattacharyya coefficient, and R_a(p, q) (1-a) = R_{1-a}(q, p) a.
    assert f_divergence("renyi:0.5", p, q).item() == pytest.approx(-2 * math.log(1 - value["hellinger"] / 2))
    forward, back = f_divergence("renyi:0.3", p, q).item(), f_divergence("renyi:0.7", q, p).item()
    assert forward * 0.7 == pytest.approx(back * 0.3)
    for a in (0.3, 0.9):
        order = Renyi(a)
        assert f_divergence(order, p, q).item() == pytest.approx(
            order.from_alpha(f_divergence(f"alpha:{a}", p, q)).item(), rel=1e-9
        )


def test_chi_squares_are_infinite_where_the_ratio_is_too_heavy():
    narrow, wide = (
        gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]),
        gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 2.1]]),
    )
    assert f_divergence("pearson", wide, narrow).item() == math.inf
    assert f_divergence("pearson", narrow, wide).isfinite()
    assert f_divergence("neyman", narrow, wide).item() == math.inf
    assert f_divergence("renyi:2", wide, narrow).item() == math.inf
    assert f_divergence("alpha:1.5", wide, narrow).isfinite()


@pytest.mark.parametrize("d", [1, 3, 10])
def test_equal_covariances(d):
    p = random_gaussian(d, 5)
    q = Gaussian(p.mean + 0.4 / math.sqrt(d), p.covariance)
    gap = p.mean - q.mean
    distance2 = (gap @ torch.linalg.solve(p.covariance, gap)).item()
    assert f_divergence("kl", p, q).item() == pytest.approx(distance2 / 2)
    assert f_divergence("pearson", p, q).item() == pytest.approx(math.expm1(distance2))
    assert cauchy_schwarz(p, q).item() == pytest.approx(distance2 / 2)
    assert fisher(p, q).item() == pytest.approx(torch.linalg.solve(p.covariance, gap).square().sum().item())
    assert wasserstein2_squared(p, q).item() == pytest.approx((gap @ gap).item())
    # Along the line of the means both are N(0, 1) and N(distance, 1), which is all a divergence sees.
    delta = math.sqrt(distance2)
    one, other = gaussian([0.0], [[1.0]]), gaussian([delta], [[1.0]])
    # The kink lies at delta / 2: a panel edge.
    line = divergence_1d("tv", one.log_prob, other.log_prob, delta / 2 - 12, delta / 2 + 12, n=48)
    assert f_divergence("tv", p, q).item() == pytest.approx(line.item(), rel=1e-10)


def test_discrepancies_agree_with_integrals_on_a_line():
    p, q = LINE
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x, w = torch.from_numpy(14 * nodes), torch.from_numpy(14 * weights)
    density_p, density_q = p.log_prob(x).exp(), q.log_prob(x).exp()
    overlaps = [
        (w * a * b).sum() for a, b in [(density_p, density_q), (density_p, density_p), (density_q,) * 2]
    ]
    assert cauchy_schwarz(p, q).item() == pytest.approx(
        -math.log(overlaps[0] ** 2 / (overlaps[1] * overlaps[2])), rel=1e-10
    )
    signed = w * (density_p - density_q)
    kernel = torch.exp(-((x[:, None] - x) ** 2) / (2 * 0.7**2))
    assert mmd_squared(p, q, 0.7).item() == pytest.approx((signed @ kernel @ signed).item(), rel=1e-9)
    y = x.clone().requires_grad_()
    (push,) = torch.autograd.grad((p.log_prob(y) - q.log_prob(y)).sum(), y)
    assert fisher(p, q).item() == pytest.approx((w * density_p * push**2).sum().item(), rel=1e-10)
    # On a line W2 couples quantiles: mean shift and difference of the standard deviations.
    assert wasserstein2_squared(p, q).item() == pytest.approx(0.8**2 + (1.2 - math.sqrt(1.6)) ** 2)


@pytest.mark.statistical
def test_discrepancies_agree_with_direct_formulas_in_many_dimensions():
    p, q = random_gaussian(6, 7), random_gaussian(6, 8)
    a, b = p.covariance.numpy(), q.covariance.numpy()
    root = sqrtm(a)
    gap = (p.mean - q.mean).numpy()
    bures = gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(root @ b @ root)))
    assert wasserstein2_squared(p, q).item() == pytest.approx(bures, rel=1e-10)
    # Samples: 4e5 pairs, errors of the means below 0.4 % (four standard errors).
    generator = torch.Generator().manual_seed(9)
    n = 400_000

    def draw(g):
        noise = torch.randn(n, 6, dtype=torch.float64, generator=generator)
        return g.mean + noise @ torch.linalg.cholesky(g.covariance).T

    x, y, x2, y2 = draw(p), draw(q), draw(p), draw(q)

    def k(u, v):
        return torch.exp(-(u - v).square().sum(-1) / (2 * 2.0**2))

    terms = k(x, x2) + k(y, y2) - k(x, y) - k(x2, y2)
    error = (terms.std() / math.sqrt(n)).item()
    assert mmd_squared(p, q, 2.0).item() == pytest.approx(terms.mean().item(), abs=4 * error)
    score = torch.linalg.solve(p.covariance, (p.mean - x).T) - torch.linalg.solve(
        q.covariance, (q.mean - x).T
    )
    assert fisher(p, q).item() == pytest.approx(score.square().sum(0).mean().item(), rel=1e-2)


@pytest.mark.parametrize("order", [0, 2])
def test_the_kl_over_noise_levels_is_a_fisher_divergence_of_other_weights(order):
    # Diff-Instruct's objective: with v = sigma^2, p and q both blurred by it, and W(v) = int_0^v w,
    # int w KL(q_v || p_v) dv = int W E_q|s_q - s_p|^2 dv / 2 over all v, for every w.
    p, q = PLANE
    nodes, weights = np.polynomial.legendre.leggauss(80)
    eye = torch.eye(2, dtype=torch.float64)
    integral, other = 0.0, 0.0
    for u, step in zip((nodes + 1) / 2, weights / 2, strict=True):
        v, dv = u / (1 - u), step / (1 - u) ** 2
        w = v**order * math.exp(-v)
        cumulated = (2 if order else 1) - math.exp(-v) * (v**2 + 2 * v + 2 if order else 1)
        blurred = [Gaussian(g.mean, g.covariance + v * eye) for g in (p, q)]
        integral += dv * w * f_divergence("reverse_kl", *blurred).item()
        other += dv * cumulated * fisher(*reversed(blurred)).item() / 2
    # The second falls as v^-4 at high levels only: 80 nodes leave 1e-9 of it.
    assert integral == pytest.approx(other, rel=1e-7)


def test_half_of_cauchy_schwarz_is_below_both_kls():
    for seed in range(20):
        p, q = random_gaussian(3, seed), random_gaussian(3, seed + 100)
        least = min(f_divergence("kl", p, q), f_divergence("rkl", p, q))
        assert cauchy_schwarz(p, q) / 2 <= least + 1e-12


def test_de_bruijn_links_kl_and_fisher():
    # Under X_t = X + W_t: d/dt KL(p_t || q_t) = -Fisher(p_t || q_t) / 2.
    p, q = PLANE
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    eye = torch.eye(2, dtype=torch.float64)
    value = f_divergence("kl", *(Gaussian(g.mean, g.covariance + t * eye) for g in (p, q)))
    (slope,) = torch.autograd.grad(value, t)
    assert slope.item() == pytest.approx(-0.5 * fisher(p, q).item(), rel=1e-12)


@pytest.mark.parametrize("name", [*CLOSED, "alpha:0.3", "renyi:1.6", "cs", "mmd", "w2", "fisher"])
def test_gradients_are_right_even_at_equal_covariances(name):
    other = {"cs": cauchy_schwarz, "mmd": lambda p, q: mmd_squared(p, q, 1.3), "w2": wasserstein2_squared}
    function = {**other, "fisher": fisher}.get(name, lambda p, q: f_divergence(name, p, q))
    target = random_gaussian(3, 11)

    def value(mean, factor):
        return function(target, Gaussian(mean, factor @ factor.T))

    mean = (target.mean + 0.2).requires_grad_()
    factor = torch.linalg.cholesky(target.covariance).clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (mean, factor))


def test_equal_gaussians_are_at_distance_zero():
    p = random_gaussian(4, 12)
    same = Gaussian(p.mean.clone(), p.covariance.clone())
    for name in [*CLOSED, *ORDERS, "tv"]:
        # Orders 1e-6 from a limit divide rounding by 1e-6.
        assert f_divergence(name, p, same).item() == pytest.approx(0, abs=1e-8)
    for function in (cauchy_schwarz, fisher, wasserstein2_squared, lambda a, b: mmd_squared(a, b, 1.0)):
        assert function(p, same).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("mean", "covariance", "says"),
    [
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (torch.zeros(2), torch.zeros(2, 2), "positive definite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.zeros(2), torch.eye(3), "does not match"),
        (torch.zeros(2), torch.ones(2), "wrong shape"),
        (torch.zeros(()), torch.eye(1), "wrong shape"),
        (torch.zeros(0), torch.zeros(0, 0), "wrong shape"),
        (torch.tensor([0.0, math.nan]), torch.eye(2), "not finite"),
        (torch.zeros(2), torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), "not finite"),
        (torch.zeros(2, dtype=torch.int64), torch.eye(2), "float"),
        ([0.0], torch.eye(1), "float"),
        (torch.zeros(1), torch.eye(1, dtype=torch.float64), "dtypes of mean"),
    ],
)
def test_what_is_no_gaussian_is_a_user_error(mean, covariance, says):
    with pytest.raises(UserError, match=says):
        Gaussian(mean, covariance)


def test_pairs_without_a_closed_form_are_user_errors():
    p, q = LINE
    with pytest.raises(UserError, match="divergence_1d"):
        f_divergence("js", p, q)
    with pytest.raises(UserError, match="equal covariances"):
        f_divergence("tv", p, q)
    with pytest.raises(UserError, match="dimensions"):
        f_divergence("kl", p, PLANE[1])
    with pytest.raises(UserError, match="dtypes"):
        f_divergence("kl", p, Gaussian(torch.zeros(1), torch.eye(1)))
    with pytest.raises(UserError, match="width"):
        mmd_squared(p, q, 0.0)
    with pytest.raises(UserError, match="positions"):
        p.log_prob(torch.zeros(3, 2, dtype=torch.float64))
