"""Whatever compares samples: right in float32 at any scale and offset, and bound to the laws it obeys.

hypothesis draws the scale (1e-3 to 1e4) and the offset (up to 1e4); derandomized, so every run is the same.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distmatch.discrepancies import (
    cauchy_schwarz,
    chunks,
    conditional_cauchy_schwarz,
    distance_covariance,
    energy_distance,
    gaussian,
    gaussian_sinkhorn,
    joint_distance_covariance,
    kernel_stein,
    max_sliced_wasserstein,
    median_bandwidth,
    mmd,
    mmd_loss,
    mmd_test,
    random_directions,
    silverman_bandwidth,
    sinkhorn_divergence,
    sliced_wasserstein,
    sliced_wasserstein_loss,
    wasserstein_1d,
)
from distmatch.divergences.estimators import kl_neighbors
from distmatch.metrics import frechet_distance, kernel_distance, prdc, vendi_score
from distmatch.ratio import fit_ratio

some = settings(max_examples=6, deadline=None, derandomize=True, database=None)
scales = st.floats(-3, 4).map(lambda e: 10.0**e)
offsets = st.one_of(st.just(0.0), st.floats(-3, 4).map(lambda e: 10.0**e))

_draw = torch.Generator().manual_seed(0)
N = 48
X = torch.randn(N, 3, generator=_draw, dtype=torch.float64)
Y = torch.randn(N - 8, 3, generator=_draw, dtype=torch.float64) * 1.3 + 0.8
PAIRED = X.roll(1, 1) + 0.5 * torch.randn(N, 3, generator=_draw, dtype=torch.float64)
DIRECTION = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
FIXED = random_directions(3, 20, generator=_draw)


def seeded():
    return torch.Generator().manual_seed(1)


def moments(x):
    return x.double().mean(0), x.double().T.cov()


def gaussian_score(x):
    """That of the round Gaussian fitted to the samples."""
    return -(x.double() - x.double().mean(0)) / x.double().var(0).mean()


def log_ratio(method):
    """The mean log-ratio at both samples of a fitted ratio."""

    def value(x, y):
        return fit_ratio(x, y, method, seed=0).log_ratio(torch.cat([x, y])).mean()

    return value


# name: (function of x and y, degree: the power of the unit that the value has)
TWO_SETS = {
    "energy": (lambda x, y: energy_distance(x, y).value, 1),
    "energy 1.5": (lambda x, y: energy_distance(x, y, exponent=1.5).value, 1.5),
    "mmd gaussian": (lambda x, y: mmd(x, y).value, 0),
    "mmd laplace": (lambda x, y: mmd(x, y, "laplace").value, 0),
    "mmd imq block": (lambda x, y: mmd(x, y, "imq", estimator="block", block=12).value, 0),
    "mmd quadratic": (lambda x, y: mmd(x, y, "rational_quadratic", estimator="biased").value, 0),
    "mmd linear": (lambda x, y: mmd(x, y, estimator="linear").value, 0),
    "mmd p-value": (lambda x, y: mmd_test(x, y, permutations=19, generator=seeded()).p_value, 0),
    "median bandwidth": (median_bandwidth, 1),
    "silverman": (silverman_bandwidth, 1),
    "cauchy-schwarz": (lambda x, y: cauchy_schwarz(x, y).value, 0),
    "sinkhorn": (lambda x, y: sinkhorn_divergence(x, y).value, 2),
    "sinkhorn plain": (lambda x, y: sinkhorn_divergence(x, y, debias=False).value, 2),
    "gaussian sinkhorn": (
        lambda x, y: gaussian_sinkhorn(*moments(x), *moments(y), 0.1 * float(x.double().var(0).sum())),
        2,
    ),
    "sliced": (lambda x, y: sliced_wasserstein(x, y, directions=FIXED).value, 1),
    "sliced p = 7": (lambda x, y: sliced_wasserstein(x, y, p=7, directions=FIXED).value, 1),
    "sliced loss": (lambda x, y: sliced_wasserstein_loss(x, y, directions=FIXED), 2),
    "max sliced": (lambda x, y: max_sliced_wasserstein(x, y, projections=5, generator=seeded()).value, 1),
    "wasserstein": (lambda x, y: wasserstein_1d(x[:, 0], y[:, 0]), 1),
    "wasserstein p = 30": (lambda x, y: wasserstein_1d(x[:, 0], y[:, 0], p=30), 1),
    "frechet": (frechet_distance, 2),
    "frechet wide": (lambda x, y: frechet_distance(x[:2], y[:3]), 2),
    "precision": (lambda x, y: prdc(x, y).precision, 0),
    "recall": (lambda x, y: prdc(x, y).recall, 0),
    "density": (lambda x, y: prdc(x, y).density, 0),
    "coverage": (lambda x, y: prdc(x, y).coverage, 0),
    "kl by neighbors": (lambda x, y: kl_neighbors(x, y).value, 0),
    "ratio by neighbors": (log_ratio("knn"), 0),
    "ratio by least squares": (log_ratio("ulsif"), 0),
}
PAIRED_SETS = {
    "distance covariance": (lambda x, y: distance_covariance(x, y).value, 2),
    "distance covariance on a line": (lambda x, y: distance_covariance(x[:, 0], y[:, 0]).value, 2),
    "joint": (lambda x, y: joint_distance_covariance([x, y]).value, 2),
    "stein": (
        lambda x, y: kernel_stein(x, -(x.double() - x.double().mean(0)) / x.double().var(0).mean()).value,
        -2,
    ),
    "conditional cauchy-schwarz": (
        lambda x, y: conditional_cauchy_schwarz(x[:24], y[:24], x[24:], y[24:] * 1.0).value,
        0,
    ),
}
CASES = {name: (*case, Y) for name, case in TWO_SETS.items()} | {
    name: (*case, PAIRED) for name, case in PAIRED_SETS.items()
}


@pytest.mark.parametrize("name", CASES)
@some
@given(scale=scales, offset=offsets)
@example(scale=1e-3, offset=1e4)
@example(scale=1e4, offset=1e4)
def test_float32_gives_what_float64_gives_for_the_same_numbers(name, scale, offset):
    function, degree, other = CASES[name]
    x, y = ((z * scale + offset * DIRECTION).float() for z in (X, other))
    if name.startswith("stein"):
        y = x
    narrow, wide = float(function(x, y)), float(function(x.double(), y.double()))
    assert math.isfinite(narrow)
    # What is left of entries of size one that cancel has their rounding, not its own.
    assert narrow == pytest.approx(wide, rel=1e-3, abs=1e-6 * scale**degree)


@pytest.mark.parametrize("name", CASES)
@some
@given(scale=scales, offset=offsets)
def test_a_change_of_unit_and_origin_changes_the_value_by_its_law(name, scale, offset):
    function, degree, other = CASES[name]
    before = float(function(X, other))
    after = float(function(*(z * scale + offset * DIRECTION for z in (X, other))))
    assert after == pytest.approx(before * scale**degree, rel=1e-5, abs=1e-7 * scale**degree)


IN_ORDER = {"mmd imq block", "mmd linear", "mmd p-value", "ratio by least squares", "kl by neighbors"}
IN_ORDER |= {"frechet wide", "conditional cauchy-schwarz", "ratio by neighbors"}
"""Those that take the samples in the order they come in, or draw from them by it."""


@pytest.mark.parametrize("name", sorted(set(CASES) - IN_ORDER))
def test_the_order_of_the_samples_and_the_size_of_chunks_change_nothing(name, monkeypatch):
    function, _, other = CASES[name]
    x, y = X.float() + 100, other.float() + 100
    before = float(function(x, y))
    order = torch.randperm(len(x), generator=_draw)
    paired = len(other) == len(x)
    shuffled = y[order] if paired else y[torch.randperm(len(y), generator=_draw)]
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 5 * N)
    assert float(function(x[order], shuffled)) == pytest.approx(before, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["vendi", "kid"])
@some
@given(scale=scales, offset=offsets)
def test_what_has_an_origin_is_the_same_in_float32(name, scale, offset):
    x, y = ((z * scale + offset * DIRECTION).float() for z in (X, Y))
    call = {"vendi": lambda x, y: vendi_score(x), "kid": kernel_distance}[name]
    assert call(x, y) == pytest.approx(call(x.double(), y.double()), rel=1e-3)
    if name == "vendi":  # cosines: no unit, but an origin
        assert call(x * 8, y) == pytest.approx(call(x, y), rel=1e-9)


def far_clusters(n=400):
    """Two clusters at +-1e4, and the same law shifted by a half; what is exact is by differences."""
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=draws) for _ in range(2))
    ends = torch.where(torch.arange(n) % 2 == 0, 1e4, -1e4)[:, None]
    return x + ends, y + ends + 0.5


def by_differences(x, y):
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def test_mmd_of_clusters_far_apart():
    x, y = far_clusters()
    k = [(-by_differences(a, b).square() / 2).exp() for a, b in ((x, x), (y, y), (x, y))]
    n = len(x)
    exact = float((k[0].sum() - n + k[1].sum() - n) / (n * (n - 1)) - 2 * k[2].mean())
    assert exact > 0.01
    assert mmd(x, y, gaussian(1.0)).value == pytest.approx(exact, rel=1e-4)
    assert float(mmd_loss(x, y, gaussian(1.0))) == pytest.approx(exact, rel=1e-4)


def test_the_gradient_of_mmd_of_clusters_far_apart():
    x, y = far_clusters(60)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        found.append(torch.autograd.grad(mmd_loss(leaf, y.to(dtype), gaussian(1.0)), leaf)[0].double())
    assert float(found[1].abs().max()) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gap", [1e6, 1e9])
def test_float64_takes_close_pairs_by_differences(gap):
    """Products of float64 would lose all digits of a distance of one at 1e9 from the origin."""
    x, y = far_clusters(40)
    ends = torch.where(torch.arange(40) % 2 == 0, gap, -gap)[:, None].double()
    x, y = x.double().frac() + ends, y.double().frac() + ends
    leaf = x.clone().requires_grad_()
    k = [(-by_differences(a, b).square() / 2).exp() for a, b in ((x, x), (y, y), (x, y))]
    exact = float((k[0].sum() - 40 + k[1].sum() - 40) / (40 * 39) - 2 * k[2].mean())
    assert mmd(x, y, gaussian(1.0)).value == pytest.approx(exact, rel=1e-6)
    loss = mmd_loss(leaf, y, gaussian(1.0))
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_distance_covariance_with_one_sample_far_out():
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 3, generator=draws) for _ in range(2))
    x[0] += 1e4
    y[0] += 1e4
    n, a, b = 400, by_differences(x, x), by_differences(y, y)
    u = [
        m - m.sum(0) / (n - 2) - m.sum(1, keepdim=True) / (n - 2) + m.sum() / ((n - 1) * (n - 2))
        for m in (a, b)
    ]
    exact = float((u[0] * u[1]).fill_diagonal_(0).sum() / (n * (n - 3)))
    assert distance_covariance(x, y).value == pytest.approx(exact, rel=1e-5)
    assert joint_distance_covariance([x, y]).value == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("epsilon", [None, 1.0, 0.1])
def test_sinkhorn_of_clusters_far_apart(epsilon):
    x, y = far_clusters(200)
    found = sinkhorn_divergence(x, y, epsilon=epsilon)
    # Each cluster on its own, about its own center: nothing crosses between them.
    ends = torch.where(torch.arange(200) % 2 == 0, 1e4, -1e4)[:, None].double()
    if epsilon is None:
        assert float(found.value) == pytest.approx(
            float(sinkhorn_divergence(x.double(), y.double()).value), rel=1e-4
        )
    else:
        near = [(x.double() - ends)[i::2] for i in (0, 1)], [(y.double() - ends)[i::2] for i in (0, 1)]
        parts = [float(sinkhorn_divergence(a, b, epsilon=epsilon).value) for a, b in zip(*near, strict=True)]
        assert float(found.value) == pytest.approx(sum(parts) / 2, rel=1e-3)
    assert found.converged


def test_stein_and_cauchy_schwarz_of_clusters_far_apart():
    x, y = far_clusters()
    score = -(x - torch.where(torch.arange(400) % 2 == 0, 1e4, -1e4)[:, None])
    narrow = kernel_stein(x, score, bandwidth=1.0).value
    assert narrow == pytest.approx(kernel_stein(x.double(), score.double(), bandwidth=1.0).value, abs=1e-6)
    k = [(-by_differences(a, b).square() / 4).exp() for a, b in ((x, x), (y, y), (x, y))]
    sums = [
        k[0].fill_diagonal_(0).sum() / (400 * 399),
        k[1].fill_diagonal_(0).sum() / (400 * 399),
        k[2].mean(),
    ]
    exact = float(sums[0].log() + sums[1].log() - 2 * sums[2].log())
    assert cauchy_schwarz(x, y, bandwidth=1.0).value == pytest.approx(exact, rel=1e-4)


def test_frechet_with_a_large_common_direction():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=draws).double() + 1e4 * torch.randn(400, 1, generator=draws).double()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 0.5) == pytest.approx(0.75, rel=1e-9)
    wide = torch.cat([x[:20], torch.randn(20, 37, generator=draws).double()], 1)
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(wide, wide + 0.5) == pytest.approx(10, rel=1e-9)


def test_wasserstein_of_a_high_order_does_not_overflow():
    x, y = torch.tensor([1.0, 2.0, 3.0, 54.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    exact = 0.25 ** (1 / 25) * 50
    assert float(wasserstein_1d(x, y, p=25)) == pytest.approx(exact, rel=1e-6)
    assert sliced_wasserstein(x, y, p=25).value == pytest.approx(exact, rel=1e-6)
    assert float(max_sliced_wasserstein(x[:, None], y[:, None], p=25).value) == pytest.approx(exact, rel=1e-6)
    assert float(wasserstein_1d(1e-3 * x, 1e-3 * y, p=25)) == pytest.approx(1e-3 * exact, rel=1e-6)
    shares = torch.full((4,), 0.25)
    assert float(wasserstein_1d(x, y, p=25, a=shares, b=shares)) == pytest.approx(exact, rel=1e-6)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(wasserstein_1d(leaf, y, p=25), leaf)
    assert slope.tolist() == pytest.approx([0, 0, 0, 0.25 ** (1 / 25)], rel=1e-5)
