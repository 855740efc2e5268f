"""Lower bounds: exact values at the best critic, and the labeled warnings."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import skew
from sklearn.metrics import log_loss

from distmatch.divergences import NAMES, divergence
from distmatch.divergences.estimators import (
    LowerBound,
    chi_square_bound,
    classifier_bound,
    donsker_varadhan_bound,
    f_gan_bound,
    monte_carlo,
    nwj_bound,
)
from distmatch.divergences.estimators.tails import both_tails, unseen

# Atoms repeated as often as p says, and q uniform: means over samples are expectations.
COUNTS = torch.tensor([1, 2, 3, 3, 4, 5, 6, 1, 2, 3])
LOG_P = torch.log(COUNTS.double() / COUNTS.sum())
LOG_Q = torch.full((10,), -math.log(10.0), dtype=torch.float64)
LOG_R = LOG_P - LOG_Q
AT_P = torch.repeat_interleave(torch.arange(10), COUNTS)


def draw(n: int, d: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [*NAMES, "alpha:-0.5", "alpha:3"])
def test_the_best_critic_gives_the_divergence_and_others_less(name):
    exact = monte_carlo(name, LOG_P, LOG_Q, method="plain").value
    best = f_gan_bound(name, LOG_R[AT_P], LOG_R)
    assert best.value == pytest.approx(exact, rel=1e-9)
    for seed in range(5):
        critic = 0.5 * draw(10, seed=seed).squeeze(1) + (LOG_R if seed % 2 else 0.0)
        assert f_gan_bound(name, critic[AT_P], critic).value <= exact + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_that_of_the_conjugate(name):
    """E_p[T] - E_q[f*(T)] with T = f'(e^critic), by the package's separate conjugate."""
    measure, critic = divergence(name), draw(10, seed=3).squeeze(1)
    slope = measure.df(critic)
    expected = slope[AT_P].mean() - measure.conjugate(slope).mean()
    assert f_gan_bound(name, critic[AT_P], critic).value == pytest.approx(float(expected), rel=1e-7)


def test_the_js_bound_is_log_two_less_the_logistic_loss():
    logit = draw(10, seed=4).squeeze(1)
    on_p, on_q = logit[AT_P], logit.repeat(3)  # as many of each
    labels = [1] * 30 + [0] * 30
    loss = log_loss(labels, torch.sigmoid(torch.cat([on_p, on_q])).numpy())
    assert f_gan_bound("js", on_p, on_q).value == pytest.approx(math.log(2) - loss, rel=1e-9)
    odds = classifier_bound("js", on_p + 1.5, on_q + 1.5, prior_log_odds=1.5)
    assert odds.value == pytest.approx(math.log(2) - loss, rel=1e-9)


def test_the_tv_bound_is_the_accuracy():
    found = f_gan_bound("tv", torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, -2.0]))
    assert found.value == pytest.approx((3 / 4 + 1) - 1)


def test_nwj_and_donsker_varadhan_are_their_formulas():
    critic = draw(10, seed=5).squeeze(1)
    on_p, on_q = critic[AT_P].numpy(), critic.numpy()
    nwj, dv = nwj_bound(critic[AT_P], critic), donsker_varadhan_bound(critic[AT_P], critic)
    assert nwj.value == pytest.approx(on_p.mean() - np.exp(on_q - 1).mean(), rel=1e-12)
    assert dv.value == pytest.approx(on_p.mean() - math.log(np.exp(on_q).mean()), rel=1e-12)
    assert dv.value >= nwj.value
    exact = monte_carlo("kl", LOG_P, LOG_Q, method="plain").value
    assert nwj_bound(1 + LOG_R[AT_P], 1 + LOG_R).value == pytest.approx(exact, rel=1e-9)
    assert donsker_varadhan_bound(3 + LOG_R[AT_P], 3 + LOG_R).value == pytest.approx(exact, rel=1e-9)
    # The error of DV is that of two independent means, by the delta method, each widened for its skewness.
    relative = np.exp(on_q) / np.exp(on_q).mean()
    parts = (x.std(ddof=1) / math.sqrt(len(x)) * (1 + 2 * skew(x) ** 2 / len(x)) for x in (on_p, relative))
    tails = (
        *both_tails(torch.as_tensor(on_p - on_p.mean()), lambda x: x),
        *both_tails(torch.as_tensor(np.log(relative)), lambda x: x.exp() - 1),
    )
    expected = math.hypot(*parts, *(t.amount for t in tails))
    assert dv.stderr == pytest.approx(expected, rel=1e-9)


def test_the_chi_square_bound_is_the_corrected_quotient():
    critic = draw(10, seed=6).squeeze(1)
    on_p, on_q = critic[AT_P].numpy(), critic.numpy()
    gap2 = (on_p.mean() - on_q.mean()) ** 2 - on_p.var(ddof=1) / 30 - on_q.var(ddof=1) / 10
    found = chi_square_bound(critic[AT_P], critic)
    assert found.value == pytest.approx(gap2 / on_q.var(ddof=1), rel=1e-9)
    # What one sample does to gap^2 / variance, and what is left of gap^2 at gap = 0.
    value, variance = found.value, on_q.var(ddof=1)
    gap = on_p.mean() - on_q.mean()

    def from_p(x):
        return 2 * gap / variance * (x - on_p.mean())

    def from_q(x):
        y = x - on_q.mean()
        return -2 * gap / variance * y - value / variance * (y**2 - variance)

    def error(values, influence):
        terms = influence(values)
        tails = (unseen(values, influence), unseen(-values, lambda x: influence(-x)))
        plain = float(terms.std()) / math.sqrt(len(terms)) * (1 + 2 * skew(terms.numpy()) ** 2 / len(terms))
        return math.hypot(plain, *(t.amount for t in tails))

    square = 2 * ((on_p.var(ddof=1) / 30 + on_q.var(ddof=1) / 10) / variance) ** 2
    expected = math.sqrt(error(critic[AT_P], from_p) ** 2 + error(critic, from_q) ** 2 + square)
    assert found.stderr == pytest.approx(expected, rel=1e-6)
    moved = chi_square_bound(5 - 1e9 * critic[AT_P], 5 - 1e9 * critic)
    assert (moved.value, moved.stderr) == (pytest.approx(found.value), pytest.approx(found.stderr))
    assert chi_square_bound(torch.ones(5), torch.ones(5)).value == 0.0
    # With many copies the correction is gone, and T = r gives Pearson's chi-square itself.
    r = torch.exp(LOG_R)
    pearson = monte_carlo("pearson", LOG_P, LOG_Q, method="plain").value
    assert chi_square_bound(r[AT_P].repeat(10_000), r.repeat(10_000)).value == pytest.approx(
        pearson, rel=1e-4
    )


def test_the_best_critic_of_the_chi_square_bound_is_the_ratio():
    """(E_p T - E_q T)^2 / Var_q T is Pearson's chi squared at T = r, and less elsewhere (Hammersley)."""
    exact = monte_carlo("pearson", LOG_P, LOG_Q, method="plain").value

    def value(critic):
        # Each atom 2000 times: what is taken off for so many samples is 1e-3 of the value.
        return chi_square_bound(critic[AT_P].repeat(2000), critic.repeat(2000)).value

    assert value(LOG_R.exp()) == pytest.approx(exact, rel=1e-3)
    assert value(3 - 2 * LOG_R.exp()) == pytest.approx(exact, rel=1e-3)  # any affine map of it
    for seed in range(5):
        assert value(LOG_R.exp() + 0.3 * draw(10, seed=seed).squeeze(1)) < exact


def test_the_gradient_of_the_terms_is_zero_at_the_best_critic():
    from distmatch.divergences.estimators.bounds import f_gan_terms

    for name in ("js", "kl", "hellinger", "reverse_kl"):
        critic = LOG_R.clone().requires_grad_()
        on_p, on_q = f_gan_terms(divergence(name), critic[AT_P], critic)
        (gradient,) = torch.autograd.grad(on_p.mean() + on_q.mean(), critic)
        assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-12)


# --- what cannot work says so ----------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [donsker_varadhan_bound, nwj_bound, lambda p, q: f_gan_bound("kl", p, q)])
def test_kl_above_log_n_is_not_a_confident_number(bound):
    """p = N(8, 1), q = N(0, 1): KL is 32, log n is 6.9, and even the exact critic cannot show it."""
    x_p, x_q = 8 + draw(1000).squeeze(1), draw(1000, seed=1).squeeze(1)
    found = bound(8 * x_p - 32, 8 * x_q - 32)
    assert not found.reliable
    assert "log 1000" in found.warning
    near = bound(1 + 0.5 * (x_p - 8) - 0.125, 1 + 0.5 * (x_q) - 0.125)  # the critic of N(0.5, 1)
    assert near.reliable


def test_the_ceiling_of_a_kl_is_the_log_of_the_samples_it_rests_on():
    """KL(p || q) rests on samples of q that look like p, KL(q || p) on samples of p that look like q."""
    level, nothing = (
        torch.full((50,), 4.0),
        torch.full((1000,), -20.0),
    )  # the bound is 5: log 50 < 5 < log 1000
    assert f_gan_bound("kl", level, nothing).warning is None
    assert "above log 50" in f_gan_bound("kl", level.repeat(20), nothing[:50]).warning
    assert f_gan_bound("reverse_kl", -nothing, -level).warning is None
    assert "above log 50" in f_gan_bound("reverse_kl", -nothing[:50], -level.repeat(20)).warning


def test_a_mean_of_exponentials_that_rests_on_three_samples_says_so():
    on_q = torch.zeros(1000)
    on_q[:3] = 12.0
    assert "about 3 of 1000" in donsker_varadhan_bound(torch.zeros(1000), on_q).warning
    assert donsker_varadhan_bound(torch.zeros(1000), torch.zeros(1000)).reliable


def test_bounds_are_labeled():
    found = f_gan_bound("js", LOG_R[AT_P], LOG_R)
    assert isinstance(found, LowerBound)
    assert str(found).startswith(">= ")


def test_critics_that_overflow_give_a_bound_that_says_nothing():
    found = f_gan_bound("pearson", torch.zeros(5), torch.full((5,), 1e4))
    assert not found.reliable
    assert not math.isnan(found.value)
    constant = chi_square_bound(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
    assert constant.value == math.inf
    assert "overlap" in constant.warning
