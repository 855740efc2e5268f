"""What no sample shows: the Pareto fit against scipy, its forecasts against closed forms, the warnings."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from distmatch.divergences.estimators import (
    f_gan_bound,
    kl_estimate,
    kl_neighbors,
    monte_carlo,
    monte_carlo_two_sided,
    renyi_monte_carlo,
)
from distmatch.divergences.estimators.results import mean_error
from distmatch.divergences.estimators.tails import Unseen, both_tails, judged, pareto_tail, unseen


def levels(n: int) -> np.ndarray:
    """Shares above n evenly spread samples: a sample without its noise."""
    return (np.arange(n) + 0.5) / n


@pytest.mark.statistical
@pytest.mark.parametrize("index", [-0.3, 0.0, 0.2, 0.5, 0.9])
def test_the_index_and_scale_of_a_pareto_law_are_found(index):
    """Exact quantiles, 425 in the tail; the prior implied by the grid moves the index by a few hundredths."""
    x = torch.as_tensor(7.0 + 3.0 * scipy.stats.genpareto.isf(levels(20_000), index))
    tail = pareto_tail(x)
    assert tail.count == 425
    assert tail.index == pytest.approx(index, abs=0.04)
    # Excesses over u are again Pareto, with scale sigma + k u.
    assert tail.scale == pytest.approx(3.0 + index * (tail.threshold - 7.0), rel=0.06)
    share = 425 / 20_000
    beyond = 7.0 + 3.0 * scipy.stats.genpareto.isf(share * math.exp(-1.0) / 425, index)
    assert float(tail.beyond()[10]) == pytest.approx(beyond, rel=0.15)  # exceeded by e^-1 samples


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_close_to_maximum_likelihood(seed):
    x = np.sort(scipy.stats.t.rvs(4, size=4000, random_state=seed))
    tail = pareto_tail(torch.as_tensor(x))
    index, _, scale = scipy.stats.genpareto.fit(x[-tail.count :] - tail.threshold, floc=0.0)
    # The standard error of the index is (1 + k) / sqrt(190) = 0.09.
    assert tail.index == pytest.approx(index, abs=0.05)
    assert tail.scale == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("index", [0.25, 0.5, 0.75])
def test_what_lies_beyond_is_the_integral_of_the_tail(index):
    """Of a Pareto law, P(X > x) = x^(-1/k): E[X; X > n^k] = n^(k - 1) / (1 - k)."""
    n = 20_000
    x = torch.as_tensor(levels(n) ** -index)
    found = unseen(x, lambda v: v)
    # 0.04 off in the index is a factor of n^0.04 / (1 -+ 0.04 / (1 - k)).
    assert found.amount == pytest.approx(n ** (index - 1) / (1 - index), rel=0.4)
    assert found.index == pytest.approx(index, abs=0.04)
    assert unseen(x, lambda v: -(v**2)).index == pytest.approx(2 * index, abs=0.08)
    assert unseen(x, torch.log).index == 0.0
    assert unseen(x, torch.log).amount == pytest.approx(index * (math.log(n) + 1) / n, rel=0.05)


def test_both_ends_are_looked_at():
    log_r = torch.as_tensor(np.concatenate([np.linspace(-1, 1, 900), -0.4 * np.log(levels(100))]))
    up, down = both_tails(log_r, torch.exp)
    assert up.index > 0.2
    assert down.index == 0.0
    assert both_tails(-log_r, lambda x: torch.exp(-x)) == (down, up)
    held = both_tails(torch.tensor([-math.inf, *range(50)], dtype=torch.float64), torch.sigmoid)
    assert all(math.isfinite(t.amount) for t in held)


def test_samples_without_a_tail_leave_nothing_unseen():
    for x in (torch.ones(100), torch.cat([torch.zeros(97), torch.ones(3)]), torch.rand(4)):
        assert unseen(x.double(), lambda v: v) == Unseen(0.0, 0.0)
    ends = unseen(torch.as_tensor(levels(1000)), lambda v: v)  # uniform on [0, 1]
    assert ends.amount == pytest.approx(1.0 / 1000, rel=0.01)
    assert ends.index == 0.0


def test_the_error_joins_what_is_unseen_and_says_when_it_cannot_be_known():
    terms = torch.as_tensor(scipy.stats.norm.ppf(levels(1000)))
    error = mean_error(terms)
    assert judged(terms) == (error, None)
    known = judged(terms, Unseen(0.6 * error, 0.4), Unseen(0.6 * error, 0.0))
    assert known == (pytest.approx(error * math.sqrt(1 + 2 * 0.36)), None)
    assert "index 0.51" in judged(terms, Unseen(0.5 * error, 0.51))[1]
    assert judged(terms, Unseen(0.09 * error, 2.0))[1] is None  # a heavy tail that adds nothing
    assert "beyond the largest" in judged(terms, Unseen(0.8 * error, 0.0), Unseen(0.8 * error, 0.0))[1]


# --- in the estimators: p = N(shift, scale^2), q = N(0, 1) ----------------------------------------------


def log_densities(x: torch.Tensor, shift: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return -0.5 * ((x - shift) / scale) ** 2 - math.log(scale), -0.5 * x**2


def warned(estimate, shift: float, scale: float = 1.0, repetitions: int = 40, n: int = 1000) -> float:
    """The share of results with a warning; ``estimate`` takes both samples and the densities at both."""
    stream = torch.Generator().manual_seed(5)
    count = 0
    for _ in range(repetitions):
        z, x_q = torch.randn(2, n, generator=stream, dtype=torch.float64)
        x_p = shift + scale * z
        at_q, at_p = log_densities(x_q, shift, scale), log_densities(x_p, shift, scale)
        count += not estimate(x_p, x_q, at_q, at_p).reliable
    return count / repetitions


WIDE = 1.77  # KL(p || q) = 0.5, and p/q has no second moment under q
ONE_SIDED = {
    "kl": lambda _p, _q, at, _: monte_carlo("kl", *at),
    "kl plain": lambda _p, _q, at, _: monte_carlo("kl", *at, method="plain"),
    "kl self-normalized": lambda _p, _q, at, _: monte_carlo("kl", *at, method="self_normalized"),
    "js": lambda _p, _q, at, _: monte_carlo("js", *at),
    "pearson": lambda _p, _q, at, _: monte_carlo("pearson", *at),
    "renyi": lambda _p, _q, at, _: renyi_monte_carlo(2.0, *at),
    "k3": lambda _p, _q, at, _: kl_estimate(*at, "k3"),
}


@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_wider_p_is_noticed(name):
    """E_q[r^2] is infinite: k = 0.68, estimated to 0.16. The control variate of JS suffers least."""
    sure = ("pearson", "renyi", "kl plain")
    assert warned(ONE_SIDED[name], 0.0, WIDE) >= (0.95 if name in sure else 0.5 if name == "js" else 0.6)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_far_p_is_always_noticed(name):
    assert warned(ONE_SIDED[name], 5.0) == 1.0


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["kl", "kl plain", "kl self-normalized", "js", "k3"])
def test_a_near_p_is_hardly_ever_a_cause_for_warning(name):
    assert warned(ONE_SIDED[name], 0.5) <= 0.1


def test_two_sides_show_what_one_does_not():
    def pearson(_p, _q, at_q, at_p):
        return monte_carlo_two_sided("pearson", at_q, at_p)

    def kl(_p, _q, at_q, at_p):
        return monte_carlo_two_sided("kl", at_q, at_p)

    assert warned(pearson, 0.0, WIDE) == 1.0  # +inf
    assert warned(kl, 0.0, WIDE) == warned(kl, 5.0) == 0.0


def test_the_error_of_two_sides_is_that_of_both_with_what_is_unseen():
    """KL: r log r - r + 1 under q where r < 1, and log r - 1 + 1/r under p where r > 1."""
    z, x_q = torch.randn(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_q, at_p = log_densities(x_q, 1.0, 1.2), log_densities(1.0 + 1.2 * z, 1.0, 1.2)
    found = monte_carlo_two_sided("kl", at_q, at_p)
    inverse = torch.exp(at_q[1] - at_q[0]).clamp(min=1.0)
    ratio = torch.exp(at_p[0] - at_p[1]).clamp(min=1.0)

    def low(s):
        return -torch.log(s) / s - 1 / s + 1

    def high(r):
        return torch.log(r) - 1 + 1 / r

    parts = ((low(inverse), unseen(inverse, low)), (high(ratio), unseen(ratio, high)))
    expected = math.hypot(*(e for terms, tail in parts for e in (mean_error(terms), tail.amount)))
    assert found.stderr == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.statistical
def test_neighbors_notice_samples_of_p_beyond_those_of_q():
    def knn(x_p, x_q, *_):
        return kl_neighbors(x_p, x_q)

    assert warned(knn, 0.0, WIDE, repetitions=20) >= 0.9
    assert warned(knn, 0.7, repetitions=20) <= 0.15


def test_bounds_notice_heavy_tails_on_either_side():
    """log r = x under q and p both Laplace of width 0.7: e^x has Pareto index 0.7 at either end."""
    x = torch.as_tensor(scipy.stats.laplace.ppf(levels(1000), scale=0.7))
    assert "Pareto index" in f_gan_bound("kl", x, x).warning
    assert "Pareto index" in f_gan_bound("reverse_kl", x, x).warning
    assert f_gan_bound("js", x, x).reliable
