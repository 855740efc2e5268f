"""Cauchy-Schwarz divergence: Gaussian closed form, scikit-learn's density estimate, conditional form."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KernelDensity

from distmatch.base.errors import UserError
from distmatch.discrepancies import (
    cauchy_schwarz,
    cauchy_schwarz_loss,
    chunks,
    conditional_cauchy_schwarz,
    conditional_cauchy_schwarz_loss,
    silverman_bandwidth,
)
from tests.reference.discrepancy_truths import covered, gaussian_cauchy_schwarz, samples


@pytest.mark.parametrize("elements", [100, 10**6])
def test_the_plug_in_is_the_integral_over_scikit_learns_density_estimate(elements, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", elements)
    x, y, h = samples(30, 1, 0), samples(20, 1, 1, 1.0), 0.4
    grid = np.linspace(-8, 9, 6001)
    p, q = (
        np.exp(KernelDensity(bandwidth=h, rtol=0, atol=0).fit(z.numpy()).score_samples(grid[:, None]))
        for z in (x, y)
    )
    expected = -math.log((p * q).sum() ** 2 / ((p * p).sum() * (q * q).sum()))
    assert cauchy_schwarz(x, y, bandwidth=h, estimator="biased").value == pytest.approx(expected, rel=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize(("d", "shift", "scale"), [(1, 0.0, 3.0), (1, 1.0, 1.0), (2, 1.0, 1.0)])
def test_intervals_cover_the_blurred_closed_form(d, shift, scale):
    # 200 repetitions (seeds 0..399): binomial sd 1.5 %.
    h = 0.5
    truth = gaussian_cauchy_schwarz(torch.full((d,), shift), 1.0, scale**2, h)
    runs = [
        cauchy_schwarz(samples(90, d, 2 * i), samples(70, d, 2 * i + 1, shift, scale), bandwidth=h)
        for i in range(200)
    ]
    claimed = [r for r in runs if r.reliable]
    assert len(claimed) >= 150
    assert 0.90 <= covered(claimed, truth) <= 0.99
    values = np.array([r.value for r in runs])
    assert values.mean() == pytest.approx(truth, abs=0.3 * values.std())


@pytest.mark.statistical
def test_equal_covariances_give_the_kl_divergence_as_the_blur_goes():
    # D_CS = |gap|^2 / (2 s^2) = KL for equal covariances; n = 1500, h = 0.2, within 4 standard errors.
    value = cauchy_schwarz(samples(1500, 1, 0), samples(1500, 1, 1, 1.0), bandwidth=0.2)
    assert value.value == pytest.approx(0.5 / 1.04, abs=4 * value.stderr)
    assert value.stderr < 0.06


def test_equal_sets_far_sets_and_units():
    x, y = samples(40, 2, 0), samples(30, 2, 1, 0.5)
    assert cauchy_schwarz(x, x, estimator="biased").value == pytest.approx(0, abs=1e-12)
    assert cauchy_schwarz(x, y, estimator="biased").value > 0
    # Units drop out with the default bandwidth; where exp would underflow the logarithm does not.
    assert cauchy_schwarz(1e3 * x, 1e3 * y).value == pytest.approx(cauchy_schwarz(x, y).value, rel=1e-9)
    far = cauchy_schwarz(torch.zeros(5, 1), torch.full((5, 1), 100.0), bandwidth=0.5)
    assert far.value == pytest.approx(100.0**2 / (2 * 0.25))  # gap^2 / (a + b) with a = b = h^2
    beyond = cauchy_schwarz(x, y + 50)
    assert math.isfinite(beyond.value)
    assert "overlap" in beyond.warning


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_gradients(estimator, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    x, y = samples(8, 2, 0).requires_grad_(), samples(7, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: cauchy_schwarz_loss(a, b, bandwidth=0.7, estimator=estimator), (x, y)
    )
    z, w = samples(8, 1, 2).requires_grad_(), samples(7, 1, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: conditional_cauchy_schwarz_loss(*a, bandwidth_x=0.7, bandwidth_y=0.7), (x, z, y, w)
    )


def conditional_sample(n, seed, gap):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=g, dtype=torch.float64)
    noise = 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    return x, torch.sin(3 * x) + gap + noise


def test_the_conditional_form_sees_the_conditional_only():
    # p(y|x) and q(y|x) are normal with one variance, blurred by h_y = 0.2: gap^2 / (2 (0.25 + 0.04)). The
    # blur in x, edges and self-pairs shift it by some percent; n = 800, seeds 0 and 1.
    options = {"bandwidth_x": 0.05, "bandwidth_y": 0.2}
    p, q = conditional_sample(800, 0, 0.0), conditional_sample(800, 1, 0.8)
    expected = 0.8**2 / (2 * 0.29)
    assert conditional_cauchy_schwarz(*p, *q, **options).value == pytest.approx(expected, rel=0.15)
    # Another law of x with the same conditional changes little.
    x, y = conditional_sample(1600, 2, 0.8)
    keep = torch.rand(1600, generator=torch.Generator().manual_seed(3)) < x[:, 0].float()
    other = conditional_cauchy_schwarz(*p, x[keep], y[keep], **options).value
    assert other == pytest.approx(expected, rel=0.2)
    same = conditional_cauchy_schwarz(*p, *conditional_sample(800, 4, 0.0), **options).value
    assert abs(same) < 0.1
    assert conditional_cauchy_schwarz(*p, *p).value == pytest.approx(0, abs=1e-12)


def test_the_conditional_form_is_the_matrix_formula():
    x, y, z = samples(20, 2, 0), samples(20, 1, 1), samples(20, 1, 2)
    k = torch.exp(-(torch.cdist(x, x) ** 2) / (4 * 0.6**2))
    own, other, cross = (
        torch.exp(-(torch.cdist(a, b) ** 2) / (4 * 0.5**2)) for a, b in ((y, y), (z, z), (y, z))
    )
    rows = k.sum(1) ** 2

    def log_sum(matrix):
        return math.log(float(((k * matrix).sum(1) / rows).sum()))

    expected = log_sum(own) + log_sum(other) - log_sum(cross) - log_sum(cross.T)
    found = conditional_cauchy_schwarz(x, y, x, z, bandwidth_x=0.6, bandwidth_y=0.5).value
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_normal_reference_bandwidth_and_refusals():
    x = samples(500, 1, 0)
    assert silverman_bandwidth(x) == pytest.approx((4 / 3 / 500) ** 0.2 * float(x.std()))
    assert cauchy_schwarz(torch.ones(5, 2), torch.ones(6, 2)).value == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="bandwidth"):
        cauchy_schwarz(x, x, bandwidth=0.0)
    with pytest.raises(UserError, match="unbiased"):
        cauchy_schwarz(x, x, estimator="u")
    with pytest.raises(UserError, match="paired"):
        conditional_cauchy_schwarz(x, x[:10], x, x)
