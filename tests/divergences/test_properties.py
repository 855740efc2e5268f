"""What must hold for every divergence and every pair of discrete distributions, zeros included.

hypothesis draws the distributions and the members of the families; derandomized, so every run is the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distmatch.divergences import FAMILIES, NAMES, divergence, divergence_discrete, mixture

LOG2 = math.log(2.0)
EPS = 1e-12  # sums of five terms of size one
exact = settings(max_examples=120, deadline=None, derandomize=True)

_shares = st.floats(0.01, 0.99)
_members = st.one_of(
    st.sampled_from(NAMES).map(divergence),
    st.floats(-3, 3).map(FAMILIES["alpha"]),
    _shares.map(FAMILIES["gjs"]),
    _shares.map(FAMILIES["skew_kl"]),
    _shares.map(FAMILIES["skew_reverse_kl"]),
    st.tuples(_shares, st.sampled_from(NAMES), st.sampled_from(NAMES)).map(
        lambda m: mixture([divergence(m[1]), divergence(m[2])], [m[0], 1 - m[0]])
    ),
)


def _normalized(x):
    return torch.from_numpy(x / x.sum(-1, keepdims=True))


# Masses from 1e-4 to 1, and often exactly zero.
_masses = st.one_of(st.just(0.0), st.floats(1e-4, 1.0))
_pairs = arrays(np.float64, (2, 5), elements=_masses).filter(lambda x: (x.sum(-1) > 0).all()).map(_normalized)
_positive = arrays(np.float64, (2, 5), elements=st.floats(1e-3, 1.0)).map(_normalized)
_channels = (
    arrays(np.float64, (5, 4), elements=_masses).filter(lambda x: (x.sum(-1) > 0).all()).map(_normalized)
)


@exact
@given(_members, st.floats(-6, 6), st.floats(-8, 8))
def test_algebra_of_every_member(d, log_r, t):
    x = torch.tensor(log_r, dtype=torch.float64)
    r = x.exp()
    slope = d.df(x)
    size = (1 + d.f(x) + (r * slope).abs()).item()
    # h = r^2 f''
    torch.testing.assert_close(d.weight(x), r**2 * d.d2f(x))
    # Fenchel equality (at the kink of total variation any slope of the kink would do).
    assert (d.f(x) + d.conjugate(slope) - r * slope).abs() < 1e-9 * size
    # Fenchel-Young at any t: f(r) + f*(t) >= r t
    assert d.f(x) + d.conjugate(torch.tensor(t, dtype=torch.float64)) - r * t > -1e-9 * size * (1 + abs(t))
    # The dual is r f(1/r) and its weight r h(1/r); twice is once.
    dual = d.dual()
    torch.testing.assert_close(dual.f(x), r * d.f(-x))
    torch.testing.assert_close(dual.weight(x), r * d.weight(-x))
    torch.testing.assert_close(dual.dual().f(x), d.f(x))
    assert dual.upper_bound == d.upper_bound or math.isclose(dual.upper_bound, d.upper_bound)
    assert dual.at_zero == d.conjugate_domain[1] or math.isclose(dual.at_zero, d.conjugate_domain[1])
    # Shifts touch neither the value nor the weight.
    shifted = d.shifted(0.7)
    torch.testing.assert_close(shifted.f(x), d.f(x) + 0.7 * (r - 1))
    torch.testing.assert_close(shifted.conjugate(shifted.df(x)), r * shifted.df(x) - shifted.f(x))
    torch.testing.assert_close(shifted.dual().f(x), r * shifted.f(-x))


@exact
@given(_members, _pairs)
def test_values_swap_and_stay_in_their_range(d, pair):
    p, q = pair
    value = divergence_discrete(d, p, q)
    assert value >= 0
    assert value <= d.upper_bound + EPS
    torch.testing.assert_close(value, divergence_discrete(d.dual(), q, p))
    torch.testing.assert_close(value, divergence_discrete(d.shifted(-1.3), p, q), rtol=1e-9, atol=1e-12)
    assert divergence_discrete(d, p, p) == 0
    if ((p > 0) != (q > 0)).any():
        lost, stray = p[q == 0].sum() > 0, q[p == 0].sum() > 0
        infinite = (lost and math.isinf(d.conjugate_domain[1])) or (stray and math.isinf(d.at_zero))
        assert bool(value.isinf()) == bool(infinite)


@exact
@given(st.one_of(_members, st.floats(0.1, 4).map(lambda a: f"renyi:{a!r}")), _pairs, _channels)
def test_no_channel_increases_a_divergence(which, pair, channel):
    p, q = pair
    before = divergence_discrete(which, p, q).item()
    after = divergence_discrete(which, p @ channel, q @ channel).item()
    assert after <= before * (1 + 1e-9) + EPS


@exact
@given(_members, _positive)
def test_the_best_critic_attains_the_variational_bound(d, pair):
    p, q = pair
    critic = d.df(p.log() - q.log())
    bound = (p * critic).sum() - (q * d.conjugate(critic)).sum()
    value = divergence_discrete(d, p, q)
    # Terms p f'(r) reach 1e9 for alpha = 3 and cancel.
    assert abs(bound - value) < 1e-9 * (1 + (p * critic.abs()).sum())
    worse = (p * (0.8 * critic)).sum() - (q * d.conjugate(0.8 * critic)).sum()
    assert worse <= value * (1 + 1e-9) + 1e-9


@exact
@given(_pairs)
def test_the_inequalities_between_divergences(pair):
    p, q = pair
    d = {name: divergence_discrete(name, p, q).item() for name in NAMES}
    kl, js, tv, h2, lc, chi2 = (d[n] for n in ("kl", "js", "tv", "hellinger", "le_cam", "pearson"))
    root = 1e-7  # a square root turns rounding of 1e-14 into 1e-7
    bhattacharyya = -2 * math.log1p(-h2 / 2) if h2 < 2 else math.inf
    assert tv <= math.sqrt(kl / 2) + root  # Pinsker
    assert tv <= math.sqrt(-math.expm1(-kl)) + root  # Bretagnolle-Huber
    assert h2 / 2 <= tv + EPS
    assert tv <= math.sqrt(h2 * (1 - h2 / 4)) + root
    assert h2 <= bhattacharyya + EPS
    assert bhattacharyya <= kl + 1e-9  # the log loses digits for nearly disjoint supports
    assert kl <= math.log1p(chi2) + EPS
    assert math.log1p(chi2) <= chi2 + EPS
    assert tv**2 / 2 <= js + EPS
    assert js <= LOG2 * tv + EPS
    assert lc / 4 <= js + EPS
    assert js <= LOG2 / 2 * lc + EPS
    assert h2 <= lc + EPS
    assert lc <= 2 * h2 + EPS
    assert 2 * tv**2 <= lc + EPS
    assert lc <= 2 * tv + EPS
    assert 4 * tv**2 <= chi2 + EPS
    assert js <= LOG2 * h2 + EPS
    assert math.isclose(lc, 2 * divergence_discrete("pearson", p, (p + q) / 2).item(), abs_tol=EPS)


@exact
@given(_pairs, _shares)
def test_inequalities_of_the_mixed_families(pair, a):
    p, q = pair
    kl = divergence_discrete("kl", p, q).item()
    skew = divergence_discrete(f"skew_kl:{a!r}", p, q).item()
    assert skew <= (1 - a) * kl + EPS  # KL is convex in its second argument
    entropy = -a * math.log(a) - (1 - a) * math.log1p(-a)
    gjs = divergence_discrete(f"gjs:{a!r}", p, q).item()
    assert gjs <= entropy * divergence_discrete("tv", p, q).item() + EPS
    # It is a times skew KL and 1 - a times a skew reverse KL, by definition.
    other = divergence_discrete(f"skew_reverse_kl:{1 - a!r}", p, q).item()
    assert math.isclose(gjs, a * skew + (1 - a) * other, rel_tol=1e-9, abs_tol=EPS)


@exact
@given(_pairs, st.floats(0.05, 3), st.floats(0.05, 3))
def test_renyi_increases_with_its_order(pair, one, other):
    p, q = pair
    low, high = sorted((one, other))
    value = [divergence_discrete(f"renyi:{a!r}", p, q).item() for a in (low, high)]
    assert value[0] <= value[1] * (1 + 1e-9) + 1e-9
    if low <= 1 <= high:
        kl = divergence_discrete("kl", p, q).item()
        assert value[0] <= kl * (1 + 1e-9) + 1e-9
        assert kl <= value[1] * (1 + 1e-9) + 1e-9
