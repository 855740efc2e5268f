"""Exact values of discrete distributions and of densities in the plane, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import multinomial
from torch.distributions import Categorical, kl_divergence

from distmatch.base.errors import UserError
from distmatch.divergences import NAMES, Renyi, divergence, divergence_1d, divergence_2d, divergence_discrete

LOG2 = math.log(2.0)


def simplices(seed, n=50, k=7):
    noise = torch.randn(2, n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * noise, -1)


def test_agrees_with_scipy_and_torch_zeros_included():
    p, q = simplices(0)
    p[:, 0], q[:, 1] = 0, 0
    p[:, 2], q[:, 2] = 0, 0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    a, b = p.numpy(), q.numpy()
    one = dict(rtol=1e-11)
    assert divergence_discrete("kl", p, q).isinf().all()
    np.testing.assert_allclose(
        divergence_discrete("kl", q, (p + q) / 2), rel_entr(b, (a + b) / 2).sum(-1), **one
    )
    # SciPy's jensenshannon is the square root of the divergence.
    np.testing.assert_allclose(divergence_discrete("js", p, q), jensenshannon(a, b, axis=-1) ** 2, rtol=1e-9)
    np.testing.assert_allclose(divergence_discrete("tv", p, q), 0.5 * np.abs(a - b).sum(-1), **one)
    np.testing.assert_allclose(
        divergence_discrete("hellinger", p, q), ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(-1), **one
    )
    p, q = simplices(1)
    np.testing.assert_allclose(
        divergence_discrete("kl", p, q), kl_divergence(Categorical(p), Categorical(q)), rtol=1e-10
    )
    np.testing.assert_allclose(
        divergence_discrete("rkl", p, q), kl_divergence(Categorical(q), Categorical(p)), rtol=1e-10
    )


@pytest.mark.parametrize(
    ("name", "stray", "lost"),
    [
        # f(0) times the half of q where p = 0, and lim f(r)/r times the half of p where q = 0, plus the rest.
        ("kl", LOG2, math.inf),
        ("reverse_kl", math.inf, LOG2),
        ("jeffreys", math.inf, math.inf),
        ("hellinger", 2 - math.sqrt(2), 2 - math.sqrt(2)),
        ("pearson", 1.0, math.inf),
        ("neyman", math.inf, 1.0),
        ("tv", 0.5, 0.5),
        ("le_cam", 0.5 + 1 / 6, 0.5 + 1 / 6),
        ("renyi:0.5", LOG2, LOG2),
        ("renyi:2", LOG2, math.inf),
        ("alpha:2", 0.5, math.inf),
        # M = 0.7 p + 0.3 q: KL(p || M) = -log(0.7 + 0.15) for p = (1, 0), q = (1/2, 1/2).
        ("skew_kl:0.7", -math.log(0.85), 0.5 * (math.log(0.5 / 0.65) - math.log(0.7))),
    ],
)
def test_mass_where_the_other_has_none(name, stray, lost):
    whole = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    split = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert divergence_discrete(name, whole, split).item() == pytest.approx(stray)
    assert divergence_discrete(name, split, whole).item() == pytest.approx(lost)


@pytest.mark.parametrize("name", [*NAMES, "gjs:0.2", "skew_kl:0.1", "skew_reverse_kl:0.1", "alpha:0.3"])
def test_disjoint_distributions_reach_the_upper_bound(name):
    p, q = torch.tensor([0.3, 0.7, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.9, 0.1])
    value = divergence_discrete(name, p, q)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(divergence(name).upper_bound, rel=1e-6)
    assert divergence_discrete("renyi:0.5", p, q).item() == math.inf


@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "tv"), "gjs:0.3", "skew_kl:0.2", "renyi:0.4"])
def test_gradients_are_right_and_finite_at_zeros(name):
    logits = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: divergence_discrete(name, target, torch.softmax(z, 0)), logits)
    p = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    divergence_discrete("js", p, torch.tensor([0.5, 0.0, 0.5])).backward()
    assert p.grad.isfinite().all()


def test_renyi_keeps_its_digits_near_order_one_and_near_zero():
    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    q = p + torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    # Locally R_a = a / 2 times chi squared; the next order is 1e-5 smaller.
    chi2 = ((p - q) ** 2 / q).sum().item()
    for a in (0.3, 0.9999999, 1.0, 2.0):
        assert divergence_discrete(f"renyi:{a}", p, q).item() == pytest.approx(a * chi2 / 2, rel=1e-4)
    far = torch.tensor([1 - 1e-300, 1e-300], dtype=torch.float64)
    exact = -2 * math.log(2 * math.sqrt(1e-300))  # of (1, 1e-300) against (1e-300, 1)
    assert divergence_discrete("renyi:0.5", far, far.flip(0)).item() == pytest.approx(exact)
    a2 = divergence_discrete("alpha:0.4", p, q)
    slope = Renyi(0.4).slope(a2)
    step = Renyi(0.4).from_alpha(a2 + 1e-6) - Renyi(0.4).from_alpha(a2 - 1e-6)
    assert (step / 2e-6).item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "says"),
    [
        (torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), "floating-point"),
        ([0.5, 0.5], torch.tensor([0.5, 0.5]), "floating-point"),
        (torch.tensor([0.5, 0.6]), torch.tensor([0.5, 0.5]), "sum to 1"),
        (torch.tensor([0.5, 0.5]), torch.tensor([50.0, 50.0]), "sum to 1"),
        (torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.5]), "not a probability"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([0.5, 0.5]), "not a probability"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25, 0.25]), "differ"),
        (torch.empty(0), torch.empty(0), "no outcomes"),
        (torch.tensor(1.0), torch.tensor(1.0), "no outcomes"),
    ],
)
def test_what_is_no_distribution_is_a_user_error(p, q, says):
    with pytest.raises(UserError, match=says):
        divergence_discrete("js", p, q)


@pytest.mark.parametrize("n", [20, 40])
def test_divergences_of_counts_are_too_large_by_what_is_known(n):
    """The expectation over all outcomes of n draws from p: KL by (K - 1) / 2n, JS of two by (K - 1) / 4n."""
    p = np.array([0.3, 0.3, 0.4])
    counts = np.array([[i, j, n - i - j] for i in range(n + 1) for j in range(n + 1 - i)])
    chance = torch.from_numpy(multinomial(n, p).pmf(counts))
    likely = chance > 1e-9
    shares, chance = torch.from_numpy(counts / n)[likely], chance[likely]
    kl = (chance * divergence_discrete("kl", shares, torch.from_numpy(p))).sum().item()
    js = (chance[:, None] * chance * divergence_discrete("js", shares[:, None], shares)).sum().item()
    # The next order in 1 / n: sum(1 / p) - 1 over 12 n^2 for KL (Miller; Harris), of the same size for JS.
    assert kl == pytest.approx(1 / n + ((1 / p).sum() - 1) / (12 * n**2), rel=0.005 * 40 / n)
    assert js == pytest.approx(2 / 8 * 2 / n, rel=0.04 * 40 / n)


def test_one_outcome_batches_and_half_precision():
    one = torch.ones(1)
    assert divergence_discrete("kl", one, one).item() == 0
    p, q = simplices(2)
    assert divergence_discrete("js", p, q[0]).shape == (50,)
    assert divergence_discrete("js", p[None], q[:, None]).shape == (50, 50)
    half = torch.tensor([0.25, 0.75])
    value = divergence_discrete("kl", half.bfloat16(), torch.tensor([0.5, 0.5]))
    assert value.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)


def square(low, high):
    def log_density(x):
        inside = ((x >= low) & (x < high)).all(-1)
        return torch.where(inside, -2 * math.log(high - low), -math.inf)

    return log_density


def test_the_plane_counts_mass_where_the_other_density_vanishes():
    # Squares of side 1 and 2: three quarters of the large one lie where the small one is empty.
    p, q = square(0.0, 1.0), square(0.0, 2.0)
    for first, second, name, value in [
        (p, q, "kl", 2 * LOG2),
        (p, q, "reverse_kl", math.inf),
        (p, q, "neyman", math.inf),
        (q, p, "pearson", math.inf),
        (p, q, "tv", 0.75),
        (p, q, "renyi:2", 2 * LOG2),
        (square(0.0, 1.0), square(1.0, 2.0), "js", LOG2),
    ]:
        got = divergence_2d(name, first, second, (-1.0, -1.0), (3.0, 3.0), n=4).item()
        assert got == pytest.approx(value), name


def test_the_plane_factorizes_and_has_gradients():
    # Independent coordinates: KL adds, the Bhattacharyya coefficient multiplies. 262,144 points: two chunks.
    def normal(mean, scale):
        return torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(scale).double()).log_prob

    one, other = normal(0.2, 1.0), normal(-0.3, 1.2)

    def both(f, g):
        return lambda x: f(x[:, 0]) + g(x[:, 1])

    low, high = (-12.0, -12.0), (12.0, 12.0)
    kl = divergence_2d("kl", both(one, other), both(other, one), low, high, n=33).item()
    ends = (low[0], high[0])
    line = [divergence_1d("kl", f, g, *ends).item() for f, g in ((one, other), (other, one))]
    assert kl == pytest.approx(sum(line), rel=1e-10)
    h2 = divergence_2d("hellinger", both(one, one), both(other, other), low, high, n=12).item()
    coefficient = 1 - divergence_1d("hellinger", one, other, *ends).item() / 2
    assert 1 - h2 / 2 == pytest.approx(coefficient**2, rel=1e-10)
    shift = torch.tensor([0.3, -0.1], dtype=torch.float64, requires_grad=True)

    def moved(x):
        return both(one, one)(x - shift)

    divergence_2d("kl", both(one, one), moved, low, high, n=8).backward()
    torch.testing.assert_close(shift.grad, shift.detach(), rtol=1e-6, atol=1e-8)


def test_bad_densities_are_seen():
    def good(x):
        return torch.distributions.Normal(0.0, 1.0).log_prob(x)

    with pytest.warns(UserWarning, match="p has mass 0.5"):
        divergence_1d("js", good, lambda x: good(x) + LOG2, 0.0, 9.0)
    with pytest.raises(UserError, match="NaN"):
        divergence_1d("js", good, lambda x: x.log(), -9.0, 9.0)
    with pytest.raises(UserError, match="one log-density"):
        divergence_1d("js", good, lambda x: x[:, None], -9.0, 9.0)
    with pytest.raises(UserError, match="one log-density"):
        divergence_2d("js", good, good, (-9.0, -9.0), (9.0, 9.0), n=1)
    with pytest.raises(UserError, match="empty or not finite"):
        divergence_2d("js", good, good, (0.0, 0.0), (1.0, 0.0))
