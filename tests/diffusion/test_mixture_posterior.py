"""Exact conditioning, divergence of the score and flow map, against quadrature, autograd and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.mixture import GaussianMixture

WEIGHTS = [0.2, 0.5, 0.3]
MEANS = [[-1.0, 0.5], [0.8, 0.0], [0.3, -1.2]]
COVARIANCES = [[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]], [[0.05, 0.0], [0.0, 0.05]]]


def mixture(classes: list[int] | None = None) -> GaussianMixture:
    return GaussianMixture(WEIGHTS, MEANS, COVARIANCES, classes)


def points(n: int = 32) -> Tensor:
    return 1.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("noise", [0.1, [[0.3, 0.1], [0.1, 0.2]]])
def test_the_conditional_mixture_is_bayes_rule(noise: float | list[list[float]]) -> None:
    """log p(x | y) - log p(x) - log N(y; A x, R) is one constant, -log p(y), found by quadrature."""
    prior = mixture()
    a = torch.tensor(
        [[1.0, 0.5]] if isinstance(noise, float) else [[1.0, 0.5], [0.2, -1.0]], dtype=torch.float64
    )
    value = torch.tensor([0.3, -0.4], dtype=torch.float64)[: len(a)]
    r = torch.as_tensor(noise, dtype=torch.float64) * (
        torch.eye(1).double() if isinstance(noise, float) else 1
    )
    posterior = prior.condition_on(a, value, noise)
    likelihood = torch.distributions.MultivariateNormal(value, r)
    x = points()
    evidence = prior.log_prob(x) + likelihood.log_prob(x @ a.mT) - posterior.log_prob(x)
    torch.testing.assert_close(evidence, evidence[:1].expand(32), rtol=0, atol=1e-10)

    nodes, w = np.polynomial.legendre.leggauss(160)
    grid = torch.cartesian_prod(*(torch.as_tensor(5 * nodes),) * 2)
    mass = (prior.log_prob(grid) + likelihood.log_prob(grid @ a.mT)).exp()
    total = float((mass * torch.as_tensor(25 * np.outer(w, w).ravel())).sum())
    assert float(evidence[0].exp()) == pytest.approx(total, rel=1e-8)


def test_the_conditional_mixture_denoises_as_the_posterior_of_a_noised_sample_and_a_measurement() -> None:
    """E[x0 | x, y] is the posterior mean when x itself is taken as a second measurement."""
    prior, sigma = mixture([0, 1, 0]), 0.7
    posterior = prior.condition_on([[1.0, 0.5]], [0.3], 0.1)
    assert posterior.num_classes == 2
    for x in points(4):
        both = prior.condition_on([[1.0, 0.5], [1, 0], [0, 1]], [0.3, *x.tolist()], diagonal(0.1, sigma**2))
        torch.testing.assert_close(
            posterior(x[None], sigma)[0], both.weights @ both.means, rtol=1e-10, atol=1e-12
        )


def diagonal(first: float, rest: float) -> list[list[float]]:
    return [[first, 0, 0], [0, rest, 0], [0, 0, rest]]


def test_an_exact_measurement_leaves_no_spread_where_it_looked() -> None:
    posterior = mixture().condition_on([[1.0, 0.5]], [0.3], 0.0)
    seen = posterior.sample(100) @ torch.tensor([1.0, 0.5])
    torch.testing.assert_close(seen, torch.full((100,), 0.3), rtol=0, atol=1e-6)
    assert posterior.sample(100).std(0).min() > 0.1
    with pytest.raises(UserError, match="rows are repeated"):
        mixture().condition_on([[1.0, 0.0], [2.0, 0.0]], [0.0, 0.0], 0.0)


def test_a_measurement_may_rule_out_a_class() -> None:
    far = GaussianMixture([0.5, 0.5], [[0.0], [1e3]], [0.01, 0.01], [0, 1])
    posterior = far.condition_on([[1.0]], [0.0], 0.01)
    assert posterior.num_classes == 2
    assert posterior.weights.tolist() == pytest.approx([1, 0])


def test_measurements_that_do_not_fit_are_refused() -> None:
    for a, value, noise in (
        ([[1.0]], [0.0], 0.1),
        ([[1.0, 0.0]], [0.0, 1.0], 0.1),
        ([[1.0, 0.0]], [0.0], [[1, 0], [0, 1]]),
    ):
        with pytest.raises(UserError, match="do not match"):
            mixture().condition_on(a, value, noise)
    with pytest.raises(UserError, match="covariance matrix"):
        mixture().condition_on([[1.0, 0.0]], [0.0], -0.1)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("conditioning", [None, 0])
def test_divergence_of_the_score_is_the_trace_of_the_hessian(sigma: float, conditioning: int | None) -> None:
    teacher, x = mixture([0, 1, 0]), points()
    labels = None if conditioning is None else torch.full((1,), conditioning)
    hessian = torch.func.vmap(torch.func.jacrev(lambda z: teacher.score(z[None], sigma, labels)[0]))
    if labels is not None:  # labels are checked on the host, which vmap cannot do
        trace = torch.stack([jacobian_trace(teacher, z, sigma, labels) for z in x])
    else:
        trace = hessian(x).diagonal(dim1=1, dim2=2).sum(1)
    many = None if labels is None else labels.expand(len(x))
    torch.testing.assert_close(teacher.divergence_of_score(x, sigma, many), trace, rtol=1e-9, atol=1e-9)
    if sigma > 0:
        covariance = teacher.posterior_covariance(x, sigma, many).diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(trace, covariance / sigma**4 - 2 / sigma**2, rtol=1e-8, atol=1e-9)


def jacobian_trace(teacher: GaussianMixture, z: Tensor, sigma: float, labels: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda v: teacher.score(v[None], sigma, labels)[0], z).trace()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 20.0])
def test_the_posterior_covariance_is_symmetric_and_positive_and_the_jacobian(sigma: float) -> None:
    teacher, x = mixture(), points()
    covariance = teacher.posterior_covariance(x, sigma)
    torch.testing.assert_close(covariance, covariance.mT, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: teacher(z[None], sigma)[0]))(x)
    torch.testing.assert_close(sigma**2 * jacobian, covariance, rtol=1e-9, atol=1e-9)


def test_the_flow_map_of_a_gaussian_is_the_solution_of_its_flow() -> None:
    one = GaussianMixture([1.0], [[0.5, -1.0]], [[[0.3, 0.1], [0.1, 0.2]]])
    x = points(4)

    def slope(sigma: float, flat: np.ndarray) -> np.ndarray:
        y = torch.as_tensor(flat).reshape(4, 2)
        return ((y - one(y, sigma)) / sigma).numpy().ravel()

    solved = integrate.solve_ivp(slope, (3.0, 0.05), x.numpy().ravel(), rtol=1e-10, atol=1e-12).y[:, -1]
    there = one.exact_map(x, 3.0, 0.05)
    np.testing.assert_allclose(there.numpy().ravel(), solved, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(one.exact_map(there, 0.05, 3.0), x, rtol=1e-12, atol=1e-12)
    # From pure noise to data: the right mean and covariance, exactly.
    levels = torch.full((4,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(one.exact_map(x, levels, torch.zeros(4)), one.exact_map(x, 3.0, 0.0))
    columns = one.exact_map(torch.cat([one.means, one.means + torch.eye(2)]), 3.0, 0.0) - one.means
    start = torch.linalg.cholesky(one.covariances[0] + 9 * torch.eye(2))
    end = (columns[1:].mT @ start) @ (columns[1:].mT @ start).mT
    torch.testing.assert_close(end, one.covariances[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="single Gaussian"):
        mixture().exact_map(x, 3.0, 0.0)
