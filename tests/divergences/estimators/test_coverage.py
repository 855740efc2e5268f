"""Error bars are honest: the short form of benchmarks/coverage_of_intervals.py.

p = N(0.7, 1), q = N(0, 1), 200 repetitions with a fixed seed. A 95 % interval that is right covers between
90 and 99 % of them: the binomial standard deviation of 200 trials is 1.5 %.
"""

import math

import pytest
import torch

from distmatch.divergences import divergence, divergence_1d
from distmatch.divergences.estimators import (
    chi_square_bound,
    donsker_varadhan_bound,
    f_gan_bound,
    kl_estimate,
    kl_neighbors,
    monte_carlo,
    monte_carlo_two_sided,
    renyi_monte_carlo,
)

SHIFT = 0.7
TAIL = 1.96


def log_normal(x, mean=0.0):
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def exact(name):
    measure = divergence(name)
    return float(divergence_1d(measure, lambda x: log_normal(x, SHIFT), log_normal, -14, 15, n=100))


def covered(estimate, truth, repetitions=200, n=400):
    """The share of intervals of reliable results that hold the truth; most results must be reliable."""
    claimed = hit = 0
    stream = torch.Generator().manual_seed(1)  # one stream for all: its repetitions are independent
    for _ in range(repetitions):
        x_p, x_q = torch.randn(2, n, generator=stream, dtype=torch.float64)
        found = estimate(x_p + SHIFT, x_q)
        if found.reliable:
            claimed += 1
            hit += abs(found.value - truth) <= TAIL * found.stderr
    assert claimed > 0.8 * repetitions
    return hit / claimed


def at(x):
    return log_normal(x, SHIFT), log_normal(x)


def critic(x):
    """Not the best one: 0.8 log p/q."""
    return 0.8 * (SHIFT * x - 0.5 * SHIFT**2)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["kl", "js", "neyman"])
@pytest.mark.parametrize("method", ["plain", "control_variate", "self_normalized"])
def test_monte_carlo(name, method):
    share = covered(lambda _, x_q: monte_carlo(name, *at(x_q), method=method), exact(name))
    assert 0.90 <= share <= 0.99


@pytest.mark.statistical
def test_monte_carlo_two_sided():
    share = covered(lambda x_p, x_q: monte_carlo_two_sided("tv", at(x_q), at(x_p)), exact("tv"))
    assert 0.90 <= share <= 0.99


@pytest.mark.statistical
@pytest.mark.parametrize("method", ["plain", "control_variate", "self_normalized"])
def test_renyi(method):
    share = covered(lambda _, x_q: renyi_monte_carlo(0.5, *at(x_q), method=method), 0.25 * SHIFT**2)
    assert 0.90 <= share <= 0.99


@pytest.mark.statistical
@pytest.mark.parametrize("term", ["k1", "k3"])
def test_kl_terms(term):
    assert 0.90 <= covered(lambda _, x_q: kl_estimate(*at(x_q), term), 0.5 * SHIFT**2) <= 0.99


# E_q[e^(a x)] = e^(a^2 / 2), and E_p of it e^(a^2 / 2 + a shift): the bounds of `critic` in closed form.
A = 0.8 * SHIFT
B = 0.4 * SHIFT**2
DV = A * SHIFT - B - (0.5 * A * A - B)
NWJ = A * SHIFT - B - (math.exp(0.5 * A * A - B) - 1)
VARIANCE = math.exp(2 * A * A - 2 * B) - math.exp(A * A - 2 * B)
CHI_SQUARE = math.exp(A * A - 2 * B) * (math.exp(A * SHIFT) - 1) ** 2 / VARIANCE


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("bound", "truth"),
    [
        (donsker_varadhan_bound, DV),
        (lambda p, q: f_gan_bound("kl", p, q), NWJ),
        (lambda p, q: chi_square_bound(p.exp(), q.exp()), CHI_SQUARE),
        (lambda p, q: f_gan_bound("tv", p, q), math.erf(0.5 * SHIFT / math.sqrt(2))),
    ],
    ids=["donsker_varadhan", "nwj", "chi_square", "tv"],
)
def test_bounds_cover_what_the_critic_can_show(bound, truth):
    assert 0.90 <= covered(lambda x_p, x_q: bound(critic(x_p), critic(x_q)), truth) <= 0.99


@pytest.mark.slow
@pytest.mark.statistical
def test_nearest_neighbors():
    share = covered(lambda x_p, x_q: kl_neighbors(x_p, x_q), 0.5 * SHIFT**2, repetitions=100)
    assert 0.90 <= share <= 1.0  # 100 repetitions: all of them may cover
