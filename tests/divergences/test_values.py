"""Values and gradients of D_f between distributions: duals, bounds, inequalities, Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch.distributions import Normal, kl_divergence

from distmatch.base.errors import UserError
from distmatch.divergences import NAMES, divergence, divergence_1d

SMOOTH = [n for n in NAMES if n != "tv"]
LOG2 = math.log(2.0)


def discrete(name, p, q):
    """D_f of two discrete distributions."""
    return (q * divergence(name).f(p.log() - q.log())).sum(-1)


def simplices(seed, n=200, k=6):
    noise = torch.randn(2, n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * noise, -1)


@pytest.mark.parametrize("name", [*NAMES, "alpha:0.3", "alpha:2.5", "alpha:-0.7"])
def test_dual_swaps_the_arguments_and_bounds_hold(name):
    p, q = simplices(0)
    d = divergence(name)
    forward, backward = discrete(d, p, q), discrete(d.dual(), q, p)
    torch.testing.assert_close(forward, backward)
    assert (forward >= 0).all()
    assert (forward <= d.upper_bound).all()
    assert d.dual().upper_bound == pytest.approx(d.upper_bound)


@pytest.mark.parametrize("name", [*NAMES, "alpha:0.3"])
def test_upper_bound_is_what_disjoint_distributions_reach(name):
    # Disjoint supports leave f(0) from the student's side and the dual's f(0) from the teacher's.
    d = divergence(name)
    x = torch.tensor([-60.0, 60.0], dtype=torch.float64)
    value = d.f(x)[0] + d.dual().f(-x)[1]
    if math.isfinite(d.upper_bound):
        assert value.item() == pytest.approx(d.upper_bound, rel=1e-6)
    else:
        assert value > 30


def test_agrees_with_scipy():
    p, q = simplices(1)
    a, b = p.numpy(), q.numpy()
    np.testing.assert_allclose(discrete("kl", p, q).numpy(), rel_entr(a, b).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(discrete("reverse_kl", p, q).numpy(), rel_entr(b, a).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(discrete("js", p, q).numpy(), jensenshannon(a, b, axis=-1) ** 2, rtol=1e-9)
    np.testing.assert_allclose(discrete("tv", p, q).numpy(), 0.5 * np.abs(a - b).sum(-1), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_merging_outcomes_never_increases_a_divergence(name):
    p, q = simplices(2)
    channel = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    channel = channel / channel.sum(-1, keepdim=True)
    assert (discrete(name, p @ channel, q @ channel) <= discrete(name, p, q) + 1e-12).all()


_logits = arrays(np.float64, (2, 5), elements=st.floats(-6, 6))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_logits)
def test_classical_inequalities(logits):
    p, q = torch.softmax(torch.from_numpy(logits), -1)
    d = {name: discrete(name, p, q).item() for name in NAMES}
    kl, js, tv, h2, lc = d["kl"], d["js"], d["tv"], d["hellinger"], d["le_cam"]
    eps = 1e-12
    assert tv <= math.sqrt(kl / 2) + 1e-7  # Pinsker; the root turns rounding 1e-14 into 1e-7
    assert tv <= math.sqrt(max(0.0, -math.expm1(-kl))) + 1e-7  # Bretagnolle-Huber
    assert h2 / 2 <= tv + eps
    assert tv <= math.sqrt(h2 * (1 - h2 / 4)) + 1e-7
    assert h2 <= -2 * math.log1p(-h2 / 2) + eps
    assert -2 * math.log1p(-h2 / 2) <= kl + eps
    assert kl <= math.log1p(d["pearson"]) + eps
    assert tv**2 / 2 <= js + eps
    assert js <= LOG2 * tv + eps
    assert lc / 4 <= js + eps
    assert js <= LOG2 / 2 * lc + eps
    assert h2 <= lc + eps <= 2 * h2 + 2 * eps
    assert 2 * tv**2 <= lc + eps <= 2 * tv + 2 * eps
    assert 4 * tv**2 <= d["pearson"] + eps
    assert js <= LOG2 * h2 + eps


def test_every_divergence_is_locally_half_its_curvature_times_chi_squared():
    p, q = simplices(4).sqrt()  # milder: |r - 1| stays below 1e-4 times a few tens
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    near = q + 1e-4 * (p - q)
    chi2 = discrete("pearson", near, q)
    for name in SMOOTH:
        curvature = divergence(name).d2f(torch.zeros(1, dtype=torch.float64))
        # The next term is of third order: |r - 1| times a constant of order one.
        torch.testing.assert_close(discrete(name, near, q), 0.5 * curvature * chi2, rtol=2e-2, atol=0)


def gaussian(mean, variance):
    return Normal(mean, variance**0.5 if isinstance(variance, float) else variance.sqrt()).log_prob


@pytest.mark.parametrize("shift", [0.3, 0.7, 1.0])
def test_mean_and_variance_of_the_weight_between_equal_variance_gaussians(shift):
    # q = N(0, 1), p = N(shift, 1): closed forms of E_q[h] in the scale of the master table.
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    x = torch.from_numpy(nodes)
    w = torch.from_numpy(weights / weights.sum())
    log_r = shift * x - shift**2 / 2
    d2 = shift**2
    h = {name: divergence(name).weight(log_r) for name in SMOOTH}
    mean = {name: (w * value).sum().item() for name, value in h.items()}
    spread = {name: ((w * h[name] ** 2).sum() / mean[name] ** 2 - 1).item() for name in SMOOTH}
    expected = {
        "reverse_kl": 1.0,
        "kl": 1.0,
        "jeffreys": 2.0,
        "hellinger": math.exp(-d2 / 8) / 2,
        "pearson": 2 * math.exp(d2),
        "neyman": 2 * math.exp(d2),
    }
    for name, value in expected.items():
        assert mean[name] == pytest.approx(value, rel=1e-9), name
    assert 2 * mean["js"] + mean["softened_reverse_kl"] == pytest.approx(1, rel=1e-12)
    assert spread["reverse_kl"] == pytest.approx(0, abs=1e-12)
    assert spread["kl"] == pytest.approx(math.expm1(d2), rel=1e-9)
    assert spread["hellinger"] == pytest.approx(math.expm1(d2 / 4), rel=1e-9)
    assert spread["jeffreys"] == pytest.approx(math.expm1(d2) / 4, rel=1e-9)
    if shift == 0.7:  # published to three digits
        assert [round(spread[n], 3) for n in ("js", "softened_reverse_kl")] == [0.123, 0.079]


# d/dm and d/ds of D_f(N(0, 1.3) || N(m, s^2)) at m = 0.4, s = 0.9, both noised with variance 0.25, in the
# scale of f-distill, and the factor to ours (its JS is twice ours, its squared Hellinger half of ours).
GOLDEN = {
    "reverse_kl": (0.258065, -0.268411, 1.0),
    "softened_reverse_kl": (0.115408, -0.106740, 1.0),
    "js": (0.142656, -0.161671, 0.5),
    "hellinger": (0.074789, -0.088103, 2.0),
    "kl": (0.377358, -0.520648, 1.0),
    "jeffreys": (0.635423, -0.789059, 1.0),
    "pearson": (2.095680, -4.8269, 1.0),
    "neyman": (0.447081, -0.386109, 1.0),
}
NOISE = 0.25
LOW, HIGH = -14.0, 14.0


def gradient_of_the_value(name, m, s):
    parameters = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    log_q = gaussian(parameters[0], parameters[1] ** 2 + NOISE)
    value = divergence_1d(divergence(name), gaussian(0.0, 1.3 + NOISE), log_q, LOW, HIGH)
    return torch.autograd.grad(value, parameters)[0].tolist()


def gradient_by_the_weight(name, m, s):
    """-E_q[h(r) (s_p - s_q) dx/dtheta] for x = m + s z + noise; E[z | x] = s (x - m) / (s^2 + noise)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    variance_q, variance_p = s * s + NOISE, 1.3 + NOISE
    x = m + math.sqrt(variance_q) * z
    log_r = gaussian(0.0, variance_p)(x) - gaussian(m, variance_q)(x)
    delta = -x / variance_p + (x - m) / variance_q
    push = w * divergence(name).weight(log_r) * delta
    return [-push.sum().item(), -(push * s * (x - m) / variance_q).sum().item()]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_of_the_value_is_the_weighted_score_difference(name):
    direct = gradient_of_the_value(name, 0.4, 0.9)
    # Gauss-Hermite meets r^2 in the Pearson weight: its integrand is wide, and 120 nodes give 1e-6.
    assert gradient_by_the_weight(name, 0.4, 0.9) == pytest.approx(direct, rel=1e-5)
    if name in GOLDEN:
        dm, ds, factor = GOLDEN[name]
        # Published with six decimals (Pearson's second with four): half a unit of the last place.
        decimals = [5e-7, 5.1e-5 if name == "pearson" else 5e-7]
        for ours, theirs, last in zip(direct, (dm, ds), decimals, strict=True):
            assert ours == pytest.approx(factor * theirs, abs=1.05 * factor * last)


def test_quadrature_matches_closed_forms_of_gaussians():
    p, q = Normal(torch.tensor(0.3).double(), 1.2), Normal(torch.tensor(-0.5).double(), 1.5)
    bhattacharyya = math.sqrt(2 * 1.2 * 1.5 / (1.2**2 + 1.5**2)) * math.exp(
        -(0.8**2) / (4 * (1.2**2 + 1.5**2))
    )
    expected = {
        "kl": kl_divergence(p, q).item(),
        "reverse_kl": kl_divergence(q, p).item(),
        "hellinger": 2 * (1 - bhattacharyya),
    }
    for name, value in expected.items():
        ours = divergence_1d(divergence(name), p.log_prob, q.log_prob, -20, 20)
        assert ours.dtype == torch.float64
        # Normal(., 1.2) holds its scale in float32: 1e-7.
        assert ours.item() == pytest.approx(value, rel=3e-7)
    one, other = gaussian(torch.tensor(0.0).double(), 1.0), gaussian(torch.tensor(1.0).double(), 1.0)
    tv = divergence_1d(
        divergence("tv"), one, other, -20, 21, n=82
    ).item()  # the kink, x = 0.5, is a panel edge
    assert tv == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-9)


def uniform(low, high):
    return lambda x: torch.where((x >= low) & (x < high), -math.log(high - low), -math.inf)


def test_quadrature_counts_mass_where_the_other_density_vanishes():
    # U(0, 1) against U(0, 2): half of q lies where p = 0. Panel edges fall on the jumps.
    p, q = uniform(0.0, 1.0), uniform(0.0, 2.0)
    for first, second, name, value in [
        (p, q, "kl", LOG2),
        (q, p, "reverse_kl", LOG2),
        (p, q, "reverse_kl", math.inf),
        (q, p, "kl", math.inf),
        (p, q, "tv", 0.5),
        (q, p, "tv", 0.5),
        (p, q, "hellinger", 2 - math.sqrt(2)),
        (uniform(0.0, 1.0), uniform(1.0, 2.0), "js", LOG2),
    ]:
        assert divergence_1d(divergence(name), first, second, -1, 3, n=8).item() == pytest.approx(value)


def test_quadrature_does_not_overflow_for_far_apart_gaussians():
    one, other = gaussian(torch.tensor(0.0).double(), 1.0), gaussian(torch.tensor(60.0).double(), 1.0)
    value = divergence_1d(divergence("kl"), one, other, -20, 80, n=200).item()
    assert value == pytest.approx(1800, rel=1e-9)  # 60^2 / 2, while q underflows where p lives


@pytest.mark.parametrize("bounds", [(1.0, 1.0, 8), (0.0, math.inf, 8), (0.0, 1.0, 0)])
def test_an_impossible_quadrature_is_a_user_error(bounds):
    low, high, n = bounds
    with pytest.raises(UserError):
        divergence_1d(divergence("js"), torch.zeros_like, torch.zeros_like, low, high, n)
