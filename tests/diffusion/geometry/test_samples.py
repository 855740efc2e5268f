"""Agreement of denoisers and tails of samples: closed forms, exact null laws. Seeds are fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.geometry.agreement import (
    agreement,
    generalization_gap,
    nearest_cosine,
    sample_cosine,
)
from distmatch.diffusion.geometry.jacobian import denoiser_jacobian
from distmatch.diffusion.geometry.summary import ratio_of
from distmatch.diffusion.geometry.tails import tail_check, tail_index
from distmatch.diffusion.mixture import GaussianMixture

TRUTH = GaussianMixture([1.0], [[0.0, 1.0, -1.0]], [[1.0, 0.5, 0.2]])


def fitted(x: Tensor) -> GaussianMixture:
    """A linear denoiser that learned mean and covariance from ``x``."""
    return GaussianMixture([1.0], x.mean(0)[None], torch.cov(x.T)[None])


def memorized(x: Tensor) -> GaussianMixture:
    return GaussianMixture(torch.full((len(x),), 1 / len(x)).double(), x, torch.zeros(len(x)))


# One denoiser.


class BiasFree(torch.nn.Module):
    """A noise-blind network of ReLUs without biases."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (6,), 0, 1.0, 0.01, 80.0

    def __init__(self) -> None:
        super().__init__()
        sizes = [(6, 32), (32, 32), (32, 6)]
        layers = [m for a, b in sizes for m in (torch.nn.Linear(a, b, bias=False), torch.nn.ReLU())]
        self.net = torch.nn.Sequential(*layers[:-1]).double()

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.net(x)


def test_a_network_without_biases_is_its_jacobian() -> None:
    # Homogeneous of degree one: D(c y) = c D(y), so D(y) = J(y) y; one bias breaks it.
    torch.manual_seed(0)
    model, y = BiasFree(), torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
    level = torch.ones(8).double()
    torch.testing.assert_close(model(3.0 * y, level), 3.0 * model(y, level), rtol=1e-12, atol=1e-12)
    out, jacobian = denoiser_jacobian(model, y, level)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", jacobian, y), out, rtol=1e-12, atol=1e-12)
    model.net[0] = torch.nn.Linear(6, 32).double()
    out, jacobian = denoiser_jacobian(model, y, level)
    assert float((torch.einsum("bij,bj->bi", jacobian, y) - out).detach().norm()) > 1e-2


# Two denoisers.


@pytest.mark.statistical
def test_disagreement_falls_as_one_over_the_data() -> None:
    held_out = TRUTH.sample(1000, seed=99).double()
    means = []
    for n in (100, 1600):
        values = []
        for seed in range(12):
            data = TRUTH.sample(2 * n, seed=seed).double()
            values.append(
                agreement(fitted(data[:n]), fitted(data[n:]), held_out, [0.7])[0].disagreement.value
            )
        means.append(float(np.mean(values)))
    # 12 repetitions of a chi-square-like figure with about 9 degrees of freedom: 14 % each.
    assert math.log(means[0] / means[1]) / math.log(16) == pytest.approx(1, abs=0.2)


@pytest.mark.statistical
def test_equal_models_agree_and_memorizing_ones_do_not() -> None:
    data = TRUTH.sample(60).double()
    held_out = TRUTH.sample(2000, seed=5).double()
    same = agreement(fitted(data), fitted(data), held_out, [0.1, 1.0, 10.0])
    assert [row.sigma for row in same] == [0.1, 1.0, 10.0]
    assert all(row.disagreement.value == 0 for row in same)
    learned = agreement(memorized(data[:30]), memorized(data[30:]), held_out, [0.1, 10.0], batch=100)
    assert learned[0].disagreement.value > 0.5 > 0.2 > learned[1].disagreement.value
    gap = generalization_gap(memorized(data), data, held_out, [0.1])[0]
    assert gap.value > 10 * gap.stderr > 0
    open_gap = generalization_gap(TRUTH, TRUTH.sample(2000).double(), held_out, [0.5])[0]
    assert abs(open_gap.value) < 4 * open_gap.stderr < 0.5


@pytest.mark.statistical
def test_errors_and_disagreement_are_their_closed_forms() -> None:
    held_out = TRUTH.sample(4000).double()
    shifted = GaussianMixture([1.0], [[0.3, 1.0, -1.0]], [[1.0, 0.5, 0.2]])
    (row,) = agreement(TRUTH, shifted, held_out, [0.8], batch=999)
    v = torch.tensor([1.0, 0.5, 0.2]).double()
    error = float((v * 0.64 / (v + 0.64)).mean())
    apart = (0.3 * 0.64 / 1.64) ** 2 / 3
    assert abs(row.error_a.value - error) < 4 * row.error_a.stderr
    assert abs(row.error_b.value - error - apart) < 4 * row.error_b.stderr
    assert row.disagreement.value == pytest.approx(apart / (error + apart / 2), rel=0.1)
    assert abs(row.disagreement.value - apart / (error + apart / 2)) < 4 * row.disagreement.stderr
    with pytest.raises(UserError, match="these data"):
        agreement(TRUTH, shifted, held_out[:, :2], [0.8])
    with pytest.raises(UserError, match="positive"):
        agreement(TRUTH, shifted, held_out, [0.0])


@pytest.mark.statistical
def test_ratios_have_honest_errors() -> None:
    g = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(300):
        below = 1 + torch.rand(200, generator=g).double()
        above = 0.4 * below + 0.1 * torch.randn(200, generator=g).double()
        estimate = ratio_of(above, below)
        scores.append((estimate.value - 0.4) / estimate.stderr)
    assert np.std(scores) == pytest.approx(1, abs=0.17)  # 300 draws: four of 4.1 %
    assert ratio_of(torch.zeros(3), torch.zeros(3)).value == 0
    assert ratio_of(torch.ones(3), torch.zeros(3)).value == math.inf


@pytest.mark.statistical
def test_cosines_find_pairs_and_copies() -> None:
    x = TRUTH.sample(300).double()
    assert sample_cosine(x, x).value == pytest.approx(1)
    unrelated = sample_cosine(x, TRUTH.sample(300, seed=1).double())
    assert abs(unrelated.value) < 4 * unrelated.stderr
    assert float(nearest_cosine(x[:10], x, chunk=3).min()) == pytest.approx(1)
    assert float(nearest_cosine(TRUTH.sample(10, seed=1).double(), x[:20]).min()) < 0.999
    with pytest.raises(UserError, match="pairs"):
        sample_cosine(x, x[:5])


# Tails.


def normal(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.statistical
@pytest.mark.parametrize("radius", ["mahalanobis", "norm"])
def test_the_p_value_is_valid_when_nothing_is_wrong(radius: str) -> None:
    p, share = [], []
    for seed in range(150):
        data = normal(160, 3, seed) @ torch.diag(torch.tensor([1.0, 3.0, 0.1]).double())
        check = tail_check(data[:100], data[100:], radius=radius)  # type: ignore[arg-type]
        p.append(check.p_value)
        share.append(check.exceedances[2].p_value)
    # A valid p-value is below 0.1 at most one time in ten; Bonferroni makes it rarer. 150 draws: sd 2.4 %.
    assert np.mean(np.array(p) < 0.1) < 0.1 + 3 * 0.024
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(share) < level) < level + 4 * math.sqrt(level * (1 - level) / 150)
    assert np.mean(np.array(share) < 0.5) > 0.25  # and it is not empty


@pytest.mark.statistical
def test_the_null_law_is_beta_binomial() -> None:
    counts = []
    for seed in range(2000):
        u = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        counts.append(int((u[:30] > u[30:].topk(3).values[-1]).sum()))
    expected = stats.betabinom(30, 3, 18).pmf(np.arange(31)) * 2000
    observed = np.bincount(counts, minlength=31)
    keep = expected > 10
    chi = float(((observed - expected) ** 2 / expected)[keep].sum())
    assert stats.chi2(keep.sum() - 1).sf(chi) > 1e-3


def test_the_p_value_is_that_of_counting_orders() -> None:
    ours, theirs = normal(24, 1, 3) + 0.4, normal(20, 1, 4)
    n, m = len(theirs), len(ours)
    for row in tail_check(ours, theirs, radius="norm", shares=[0.9, 0.5, 0.1]).exceedances:
        k, count = round(row.real * n), round(row.generated * m)
        # In how many of the orders of n + m values do j of ours lie above the k-th largest of theirs.
        law = [
            math.comb(j + k - 1, j) * math.comb(n - k + m - j, m - j) / math.comb(n + m, m)
            for j in range(m + 1)
        ]
        assert sum(law) == pytest.approx(1)
        tail = min(sum(law[: count + 1]), sum(law[count:]))
        assert row.p_value == pytest.approx(min(1, 2 * tail), rel=1e-9)


@pytest.mark.statistical
def test_heavy_and_light_tails_are_found() -> None:
    real = normal(2000, 4, 0)
    g = np.random.default_rng(0)
    heavy = torch.from_numpy(g.standard_t(4, (2000, 4)) / math.sqrt(2))
    found = tail_check(heavy, real, radius="norm")
    assert found.p_value < 1e-6
    far = found.exceedances[-1]
    assert far.real == pytest.approx(0.01)
    assert far.log_ratio.value > 4 * far.log_ratio.stderr > 0
    assert found.index_generated.value > found.index_real.value
    assert found.index_p_value < 0.01
    shell = real.flip(0) / real.flip(0).norm(dim=1, keepdim=True) * 2
    light = tail_check(shell + 0.1 * normal(2000, 4, 3), real)
    assert light.p_value < 1e-6
    assert light.exceedances[-1].generated == 0
    assert light.exceedances[-1].log_ratio.value == -math.inf
    assert light.spread.value < -10 * light.spread.stderr < 0


def test_the_spread_is_the_ratio_of_standard_deviations() -> None:
    scores = []
    for seed in range(100):
        a, b = normal(300, 2, seed), normal(200, 2, seed + 1000)
        pair = tail_check(a, b, radius="norm").spread
        scores.append(pair.value / pair.stderr)
    assert abs(np.mean(scores)) < 0.4
    assert np.std(scores) == pytest.approx(1, abs=0.28)


@pytest.mark.statistical
@pytest.mark.parametrize("index", [1.0, 0.0, -0.3, -1.0])
def test_the_tail_index_and_its_error(index: float) -> None:
    g = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(300):
        x = 1 + stats.genpareto(index).rvs(20_000, random_state=g)
        estimate = tail_index(torch.from_numpy(x), 200)
        values.append(estimate.value)
        errors.append(estimate.stderr)
    # The bias at a share of 1 % is below two standard errors; 300 draws give the spread to 4 %.
    assert abs(np.mean(values) - index) < 0.15
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_tail_mistakes_are_explained() -> None:
    x = normal(50, 2, 0)
    for call, message in (
        (lambda: tail_check(x, x[:5]), "20 or more"),
        (lambda: tail_check(x, x, shares=[0.0]), "between 0 and 1"),
        (lambda: tail_check(x, x, radius="length"), "unknown radius"),  # type: ignore[arg-type]
        (lambda: tail_check(torch.ones(30, 2), torch.ones(30, 2)), "equal"),
        (lambda: tail_index(x[:, 0], 2), "5 or more"),
        (lambda: tail_index(-x[:, 0].abs(), 10), "positive"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert tail_index(torch.ones(30), 10).warning is not None
