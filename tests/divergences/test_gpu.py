"""The same numbers on an accelerator, where the inputs are."""

from __future__ import annotations

import pytest
import torch

from distmatch.divergences import (
    FAMILIES,
    NAMES,
    custom,
    divergence,
    divergence_1d,
    divergence_2d,
    divergence_discrete,
    mixture,
)
from distmatch.divergences.closed_forms import Gaussian, cauchy_schwarz, f_divergence, fisher, mmd_squared
from distmatch.divergences.closed_forms import wasserstein2_squared as w2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


@pytest.mark.parametrize("which", [*NAMES, *(f"{family}:0.3" for family in FAMILIES), "custom", "mixture"])
def test_functions_agree_with_the_cpu(which):
    made = {"custom": lambda: custom(lambda r: r * r.log()), "mixture": lambda: mixture([divergence("js")])}
    d = made.get(which, lambda: divergence(which))()
    x = torch.linspace(-80, 80, 321, dtype=torch.float64)
    for function in (d.f, d.df, d.d2f, d.weight):
        torch.testing.assert_close(function(x.cuda()).cpu(), function(x), rtol=1e-12, atol=1e-14)
    t = torch.linspace(-3, 0.1, 50, dtype=torch.float64)
    torch.testing.assert_close(d.conjugate(t.cuda()).cpu(), d.conjugate(t), rtol=1e-10, atol=1e-12)
    noise = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = torch.softmax(noise, -1)
    value = divergence_discrete(d, p.cuda(), q.cuda())
    assert value.is_cuda
    torch.testing.assert_close(value.cpu(), divergence_discrete(d, p, q), rtol=1e-10, atol=1e-12)


def test_closed_forms_and_quadrature_agree_with_the_cpu():
    mean, covariance = torch.tensor([0.2, -0.3]).double(), torch.tensor([[1.2, 0.3], [0.3, 0.9]]).double()
    q = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    pair = Gaussian(mean, covariance), q
    there = Gaussian(mean.cuda(), covariance.cuda()), Gaussian(q.mean.cuda(), q.covariance.cuda())
    for function in (
        cauchy_schwarz,
        fisher,
        w2,
        lambda a, b: mmd_squared(a, b, 0.8),
        lambda a, b: f_divergence("kl", a, b),
        lambda a, b: f_divergence("renyi:0.4", a, b),
    ):
        torch.testing.assert_close(function(*there).cpu(), function(*pair))
    box = ((-9.0, -9.0), (9.0, 9.0))
    here = divergence_2d("js", pair[0].log_prob, pair[1].log_prob, *box, n=6)
    far = divergence_2d("js", there[0].log_prob, there[1].log_prob, *box, n=6, device="cuda")
    torch.testing.assert_close(far.cpu(), here)
    normal = torch.distributions.Normal(torch.zeros((), device="cuda").double(), 1.0).log_prob
    assert divergence_1d("renyi:2", normal, normal, -9, 9, device="cuda").is_cuda
