"""Fisher divergence, score matching and the kernel Stein discrepancy: Gaussians, autograd, levels."""

import math

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.discrepancies import (
    chunks,
    denoising_score_matching_loss,
    fisher_divergence,
    hyvarinen,
    kernel_stein,
    kernel_stein_loss,
    kernel_stein_test,
    score_matching_loss,
    score_of,
)
from distmatch.discrepancies.stein import _stein_rows
from tests.reference.discrepancy_truths import covered, samples, shifted_stein

PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)


def normal_score(x):
    return -(x - MEAN) @ PRECISION


@pytest.fixture(scope="module")
def fisher_truth():
    """E_p|s_p - s_q|^2 for p standard normal: |P m|^2 + tr (P - I)^2."""
    eye = torch.eye(2, dtype=torch.float64)
    return float((PRECISION @ MEAN).square().sum() + ((PRECISION - eye) @ (PRECISION - eye)).trace())


@pytest.mark.statistical
def test_fisher_intervals_cover_the_gaussian_form(fisher_truth):
    draws = [samples(200, 2, i) for i in range(200)]
    assert 0.90 <= covered([fisher_divergence(-x, normal_score(x)) for x in draws], fisher_truth) <= 0.99


@pytest.mark.statistical
@pytest.mark.parametrize("projections", [None, 1, 4])
def test_hyvarinen_is_half_the_fisher_divergence_plus_a_constant(projections, fisher_truth):
    # For p standard normal in 2-D the constant is -E|s_p|^2 / 2 = -1.
    g = torch.Generator().manual_seed(0)
    runs = [
        hyvarinen(normal_score, samples(200, 2, i), projections=projections, generator=g) for i in range(200)
    ]
    assert 0.90 <= covered(runs, fisher_truth / 2 - 1) <= 0.99


def test_score_matching_finds_the_score_of_the_sample():
    # With s_q = a + b x the exact minimum is at b = -1 / var, a = mean / var; both objectives have it.
    x = samples(4000, 1, 0, 0.7, 1.5)
    for loss in (
        lambda s: score_matching_loss(s, x, projections=None),
        lambda s: score_matching_loss(s, x, generator=torch.Generator().manual_seed(1)),
    ):
        a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
        step = torch.optim.LBFGS([a, b], max_iter=50, line_search_fn="strong_wolfe")

        def closure(loss=loss, a=a, b=b, step=step):
            step.zero_grad()
            value = loss(lambda z: a + b * z)
            value.backward()
            return value

        step.step(closure)
        variance = float(x.var(correction=0))
        assert float(b.detach()) == pytest.approx(-1 / variance, rel=1e-4)
        assert float(a.detach()) == pytest.approx(float(x.mean()) / variance, rel=1e-4)


def test_the_sliced_trace_is_exact_for_every_sign_in_one_dimension():
    x = samples(50, 1, 0)
    cubic = lambda z: -(z**3)  # noqa: E731
    exact, sliced = hyvarinen(cubic, x), hyvarinen(cubic, x, projections=1)
    assert sliced.value == pytest.approx(exact.value)
    assert exact.value == pytest.approx(float((-3 * x**2 + x**6 / 2).mean()))
    constant = hyvarinen(torch.ones_like, x)
    assert constant.value == pytest.approx(0.5)


@pytest.mark.statistical
def test_denoising_is_explicit_score_matching_to_the_blurred_law():
    # p = N(0, 1), sigma = 0.5: p blurred is N(0, 1.25), the constant is E|e / sigma|^2 - E|s|^2 = 4 - 0.8;
    # q with score -x / 2 is at (0.8 - 0.5)^2 1.25. n = 200000: five standard errors are 0.02.
    x = samples(200_000, 1, 0)
    g = torch.Generator().manual_seed(1)
    value = float(denoising_score_matching_loss(lambda z: -z / 2, x, 0.5, generator=g))
    assert value == pytest.approx((0.3**2 * 1.25 + 4 - 0.8) / 2, abs=0.02)


def test_fisher_is_blind_to_the_weights_of_modes_apart():
    def log_density(weight):
        def of(x):
            first, second = -((x[:, 0] + 10) ** 2) / 2, -((x[:, 0] - 10) ** 2) / 2
            return torch.logaddexp(first + math.log(weight), second + math.log(1 - weight))

        return of

    x = torch.cat([samples(100, 1, 0, -10), samples(100, 1, 1, 10)])
    assert fisher_divergence(score_of(log_density(0.5))(x), score_of(log_density(0.01))(x)).value < 1e-12


def test_the_score_of_a_log_density():
    x = samples(20, 2, 0)
    distribution = torch.distributions.MultivariateNormal(MEAN, precision_matrix=PRECISION)
    torch.testing.assert_close(score_of(distribution.log_prob)(x), normal_score(x))
    torch.testing.assert_close(score_of(lambda z: distribution.log_prob(z) + 7)(x), normal_score(x))
    # Through it score matching reaches the parameters of an energy.
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    score_matching_loss(score_of(lambda z: -w * z.square().sum(1)), x).backward()
    assert float(w.grad) != 0


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_the_stein_kernel_is_the_definition_by_autograd(kernel):
    x, s = samples(5, 3, 0), 1.3
    score = torch.sin(x)

    def k(a, b):
        v = (a - b).square().sum()
        return (1 + v / s**2) ** -0.4 if kernel == "imq" else torch.exp(-v / (2 * s**2))

    found = _stein_rows(x, score, 0, 5, kernel, s, -0.4)
    for i, j in ((0, 1), (3, 2), (4, 4)):
        a, b = x[i].clone(), x[j].clone()
        grad_a, grad_b = torch.func.grad(k, 0)(a, b), torch.func.grad(k, 1)(a, b)
        cross = torch.func.jacfwd(torch.func.grad(k, 0), 1)(a, b).trace()
        expected = score[i] @ score[j] * k(a, b) + score[i] @ grad_b + score[j] @ grad_a + cross
        assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("shift", [0.5, 0.8])
def test_stein_intervals_cover_the_closed_form(shift):
    truth = shifted_stein(torch.full((2,), shift), 1.0)
    draws = [samples(100, 2, i, shift) for i in range(200)]
    runs = [kernel_stein(x, -x, kernel="gaussian", bandwidth=1.0) for x in draws]
    claimed = [r for r in runs if r.reliable]
    assert len(claimed) >= 180
    assert 0.90 <= covered(claimed, truth) <= 0.99
    values = np.array([r.value for r in runs])
    assert values.mean() == pytest.approx(truth, abs=3.5 * values.std() / 200**0.5)  # unbiased


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_stein_sums_and_gradients(kernel, estimator, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    x = samples(9, 2, 0, 3.0).requires_grad_()
    u = _stein_rows(x.detach() - 3, -x.detach(), 0, 9, kernel, 1.0, -0.5)
    expected = u.mean() if estimator == "biased" else (u.sum() - u.trace()) / 72
    options = {"kernel": kernel, "bandwidth": 1.0, "estimator": estimator}
    assert kernel_stein(x, -x, **options).value == pytest.approx(float(expected), rel=1e-9)
    assert kernel_stein_loss(x, -x, **options).item() == pytest.approx(float(expected), rel=1e-9)
    assert torch.autograd.gradcheck(lambda a: kernel_stein_loss(a, -a, **options), x)


@pytest.mark.statistical
@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_the_level_and_power_of_the_stein_test(kernel):
    # 200 nulls at 10 %: binomial sd 2.1 %; the wild bootstrap is asymptotic, n = 80.
    g = torch.Generator().manual_seed(0)
    draws = [samples(80, 2, i) for i in range(200)]
    p = [kernel_stein_test(x, -x, kernel=kernel, resamples=99, generator=g).p_value for x in draws]
    assert 0.037 <= np.mean([v <= 0.1 for v in p]) <= 0.163
    wide = samples(200, 2, 1000, scale=1.5)
    assert kernel_stein_test(wide, -wide, kernel=kernel, resamples=199, generator=g).p_value <= 0.02


def test_refusals():
    x = samples(10, 2, 0)
    with pytest.raises(UserError, match="shapes of the samples and of their score"):
        hyvarinen(lambda z: z[:, :1], x)
    with pytest.raises(UserError, match="projections"):
        hyvarinen(lambda z: -z, x, projections=0)
    with pytest.raises(UserError, match="sigma"):
        denoising_score_matching_loss(lambda z: -z, x, 0.0)
    with pytest.raises(UserError, match="not finite"):
        hyvarinen(lambda z: z / 0, x)
    with pytest.raises(UserError, match="paired"):
        fisher_divergence(x, x[:5])
    with pytest.raises(UserError, match="dimension"):
        kernel_stein(x, x[:, :1])
    with pytest.raises(UserError, match="Stein kernel"):
        kernel_stein(x, x, kernel="laplace")
    with pytest.raises(UserError, match="exponent"):
        kernel_stein(x, x, exponent=0.5)
    with pytest.raises(UserError, match="bandwidth"):
        kernel_stein(x, x, bandwidth=-1.0)
    with pytest.raises(UserError, match="unbiased"):
        kernel_stein_loss(x, x, estimator="u")
