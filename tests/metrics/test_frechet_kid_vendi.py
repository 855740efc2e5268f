"""Frechet, kernel and Vendi values against closed forms, other formulas, and their finite-sample theory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch

from distmatch.base.errors import UserError
from distmatch.metrics import frechet_distance, kernel_distance, vendi_score
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.kid import kid_replicates
from distmatch.metrics.resampling import group_bounds, jackknife_stderr
from distmatch.metrics.vendi import vendi_replicates


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without_each_group(x, groups):
    edges = group_bounds(len(x), groups)
    return [torch.cat([x[:a], x[b:]]) for a, b in pairwise(edges)]


def test_frechet_of_samples_with_exact_moments_is_the_gaussian_closed_form():
    # Whitened samples have exactly the moments we give them; commuting covariances have a closed form.
    x = normal(400, 3, 0)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    s, t = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    expected = 5.0 + float((s - t).square().sum())
    assert frechet_distance(x * s, x * t + shift) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(50, 6), (20, 20)])
def test_frechet_equals_the_matrix_square_root_form(n, d):
    a, b = normal(n, d, 1) @ normal(d, d, 2), normal(n + 7, d, 3) @ normal(d, d, 4) + 0.3
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(first + second - 2 * root)
    # at n = d one covariance is singular: the root of a rounding error 1e-16 is 1e-8
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_works_with_more_dimensions_than_samples_and_both_forms_agree():
    a, b = normal(30, 5, 5), normal(40, 5, 6) * 1.5 + 1
    basis = torch.linalg.qr(normal(100, 5, 7))[0]
    assert frechet_distance(a @ basis.T, b @ basis.T) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    # float32 in, statistics in float64: the mean of far-off features does not swallow the distance
    far = (torch.cat([a, b]) + 100).float()
    assert frechet_distance(far[:30], far[30:]) == pytest.approx(frechet_distance(a, b), rel=1e-4)


def test_frechet_of_identical_sets_is_zero():
    a = normal(60, 8, 8)
    assert frechet_distance(a, a) < 1e-12
    assert frechet_distance(a[:5], a[:5]) < 1e-6


@pytest.mark.statistical
def test_frechet_bias_is_the_predicted_52_over_n():
    # E FD = (2 d + d (d + 1) / 2) / N to first order in 1/N, for two samples of N(0, I_8).
    n, repeats = 1000, 100
    pairs = [(normal(n, 8, 2 * i), normal(n, 8, 2 * i + 1)) for i in range(repeats)]
    values = torch.tensor([frechet_distance(a, b) for a, b in pairs])
    spread = float(values.std()) / math.sqrt(repeats)
    assert abs(float(values.mean()) - 52 / n) < 4 * spread
    assert spread < 0.03 * 52 / n  # so that the four sigma mean something


def brute_kid(a, b):
    k = lambda x, y: (float(x @ y) / len(x) + 1) ** 3  # noqa: E731
    within = [
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    return sum(within) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_equals_the_double_sum():
    a, b = normal(13, 4, 0), normal(9, 4, 1) * 1.3 + 0.4
    assert kernel_distance(a, b) == pytest.approx(brute_kid(a, b), rel=1e-10)


def test_kid_in_several_chunks_of_rows_equals_the_sum_in_one(monkeypatch):
    a, b = normal(100, 4, 0), normal(90, 4, 1)
    whole = kernel_distance(a, b)
    monkeypatch.setattr("distmatch.metrics.kid._ROWS", 17)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-10)


@pytest.mark.statistical
def test_kid_is_unbiased_at_equal_distributions():
    pairs = [(normal(40, 5, 2 * i), normal(40, 5, 2 * i + 1)) for i in range(300)]
    values = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(300)
    assert (values < 0).any()  # an estimate that never goes below zero would be biased


def test_vendi_of_identical_and_of_orthogonal_samples():
    assert vendi_score(torch.ones(20, 7)) == pytest.approx(1, abs=1e-9)
    assert vendi_score(3 * torch.eye(12)) == pytest.approx(12, rel=1e-9)
    # two directions with shares 1/4 and 3/4: exp of the entropy
    x = torch.eye(2)[torch.tensor([0, 1, 1, 1])]
    assert vendi_score(x) == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_vendi_does_not_change_with_duplication_or_length():
    x = normal(30, 6, 0)
    assert vendi_score(torch.cat([x, x])) == pytest.approx(vendi_score(x), rel=1e-9)
    assert vendi_score(x * (1 + torch.arange(30)[:, None])) == pytest.approx(vendi_score(x), rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 6), (10, 40)])
def test_vendi_primal_equals_dual(shape):
    x = normal(*shape, 1)
    unit = x / x.norm(dim=1, keepdim=True)
    lam = np.linalg.eigvalsh((unit @ unit.T / len(x)).numpy())
    lam = lam[lam > 1e-14]
    assert vendi_score(x) == pytest.approx(math.exp(-(lam * np.log(lam)).sum()), rel=1e-9)


def test_a_zero_feature_vector_counts_as_a_direction_of_its_own():
    assert vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("d", [5, 60])
def test_replicates_are_the_values_with_a_group_left_out(d):
    a, b = normal(53, d, 0), normal(47, d, 1) * 1.2 + 0.1
    pairs = list(zip(without_each_group(a, 10), without_each_group(b, 10), strict=True))
    for replicates, metric in ((frechet_replicates, frechet_distance), (kid_replicates, kernel_distance)):
        expected = torch.tensor([metric(a, b)] + [metric(x, y) for x, y in pairs], dtype=torch.float64)
        torch.testing.assert_close(replicates(a, b, 10), expected, rtol=1e-8, atol=1e-10)
    expected = torch.tensor([vendi_score(a)] + [vendi_score(x) for x, _ in pairs], dtype=torch.float64)
    torch.testing.assert_close(vendi_replicates(a, 10), expected, rtol=1e-8, atol=0)


def test_jackknife_of_a_mean_is_the_textbook_standard_error():
    x = normal(200, 1, 0)[:, 0]
    one_each = torch.cat([x.mean()[None], (x.sum() - x) / 199])
    assert float(jackknife_stderr(one_each)) == pytest.approx(float(x.std()) / math.sqrt(200), rel=1e-9)
    assert math.isnan(float(jackknife_stderr(x[:1])))


@pytest.mark.statistical
def test_jackknife_matches_the_spread_over_repetitions():
    # Ten groups leave 9 degrees of freedom; the root mean square over 80 repetitions is then good to 3 %, and
    # the actual spread to 8 %. The bound of 25 % is three sigma of their ratio.
    repeats, errors, values = 80, [], []
    for i in range(repeats):
        a, b = normal(200, 4, 2 * i), normal(200, 4, 2 * i + 1) * 1.3 + 0.5
        rows = torch.stack(
            [frechet_replicates(a, b, 10), kid_replicates(a, b, 10), vendi_replicates(b, 10)], dim=1
        )
        values.append(rows[0])
        errors.append(jackknife_stderr(rows))
    ratio = torch.stack(errors).square().mean(0).sqrt() / torch.stack(values).std(0)
    assert ((ratio > 0.75) & (ratio < 1.25)).all(), ratio


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_sets_that_have_no_distance_are_refused(distance):
    good = normal(20, 3, 0)
    broken = good.clone()
    broken[4, 1] = torch.nan
    for bad, said in ((good[:1], "too few"), (broken, "not finite"), (good[:, :2], "dimension")):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(UserError, match=said):
                distance(*pair)


def test_a_score_of_no_samples_is_refused():
    assert vendi_score(normal(1, 3, 0)) == pytest.approx(1)
    for bad, said in ((normal(0, 3, 0), "too few"), (torch.full((4, 2), torch.inf), "not finite")):
        with pytest.raises(UserError, match=said):
            vendi_score(bad)
