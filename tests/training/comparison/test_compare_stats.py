"""Means over seeds, differences larger than their error, Pareto fronts: against hands, scipy, brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from distmatch.base.estimate import Estimate
from distmatch.metrics.blocks import replicate_stderr
from distmatch.metrics.evaluate import evaluate_replicates
from distmatch.training.comparison.stats import (
    Difference,
    Measured,
    difference,
    front_names,
    holm,
    pareto_front,
    seed_mean,
    verdict,
)


def run(value: float, stderr: float = 0.0, replicates: torch.Tensor | None = None) -> Measured:
    table = {} if replicates is None else {"fd": replicates}
    return Measured({"fd": Estimate(value, stderr, 100)}, table)


def runs(values: list[float], stderr: float = 0.0) -> dict[int, Measured]:
    return {seed: run(value, stderr) for seed, value in enumerate(values)}


def test_a_mean_over_seeds_by_hand() -> None:
    """Values 1, 2, 6: mean 3, variance 7, so the spread is sqrt(7/3); measurements of 0.3, 0.4, 0.5."""
    found = seed_mean("fd", [run(1.0, 0.3), run(2.0, 0.4), run(6.0, 0.5)])
    assert found.value == 3.0
    assert found.stderr == pytest.approx(math.sqrt(7 / 3 + (0.09 + 0.16 + 0.25) / 3))
    assert found.warning is None


def test_one_seed_says_that_it_knows_nothing_of_training() -> None:
    found = seed_mean("fd", [run(1.5, 0.3)])
    assert (found.value, found.stderr) == (1.5, pytest.approx(0.3))
    assert found.warning is not None
    alone = difference("fd", runs([1.0], 0.3), runs([2.0], 0.4))
    assert (alone.value, alone.stderr) == (-1.0, pytest.approx(0.5))
    assert math.isnan(alone.p)
    assert verdict("fd", alone, alone.p) == "not known"


def test_a_difference_without_an_error_of_measurement_is_the_paired_t_test() -> None:
    a, b = [1.2, 1.9, 3.3, 4.1], [1.0, 1.4, 2.9, 3.2]
    found = difference("fd", runs(a), runs(b))
    expected = stats.ttest_rel(a, b)
    assert found.value == pytest.approx(np.mean(np.subtract(a, b)))
    assert found.z == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)


def test_a_difference_without_a_spread_is_the_normal_test() -> None:
    found = difference("fd", runs([2.0, 3.0], 0.6), runs([1.0, 2.0], 0.8))
    assert (found.value, found.stderr) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.p == pytest.approx(2 * stats.norm.sf(1.0))


def test_only_seeds_that_both_have_are_paired() -> None:
    found = difference(
        "fd", {0: run(1.0), 2: run(3.0), 5: run(100.0)}, {0: run(0.0), 1: run(7.0), 2: run(1.0)}
    )
    assert (found.value, found.seeds) == (1.5, 2)
    assert difference("fd", {0: run(1.0)}, {1: run(1.0)}).seeds == 0


def test_what_both_have_in_common_cancels() -> None:
    """Replicates that differ by a constant: each has an error of measurement, the difference none."""
    gen = torch.Generator().manual_seed(0)
    table = torch.randn(2, 11, generator=gen)
    a = {s: run(1.0 + s, 9.0, table + 1) for s in range(2)}
    b = {s: run(0.5 + s, 9.0, table) for s in range(2)}
    found = difference("fd", a, b)
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(0.0, abs=1e-6)
    assert seed_mean("fd", list(a.values())).stderr > replicate_stderr("fd", table) > 0


@pytest.mark.slow
@pytest.mark.statistical
def test_the_paired_error_is_that_of_repeated_measurements() -> None:
    """Two Gaussian models on common noise, measured on 30 data sets: how much the difference varies."""
    gaps, errors = [], []
    for seed in range(30):
        gen = torch.Generator().manual_seed(seed)
        noise, real = (torch.randn(160, 3, generator=gen) for _ in range(2))
        both = [evaluate_replicates(noise * s, real, seed=seed) for s in (1.3, 1.35)]
        gaps.append(both[1].estimates["fd"].value - both[0].estimates["fd"].value)
        errors.append(replicate_stderr("fd", both[1].replicates["fd"] - both[0].replicates["fd"]))
        alone = both[0].estimates["fd"].stderr
        assert replicate_stderr("fd", both[0].replicates["fd"]) == pytest.approx(alone, rel=1e-6)
    # 30 repetitions give the spread to about 13%; the jackknife errors may be off by as much again.
    assert np.mean(errors) == pytest.approx(np.std(gaps, ddof=1), rel=0.35)
    assert np.mean(errors) < 0.4 * alone  # far below what independent samples would give


@pytest.mark.statistical
def test_no_difference_is_claimed_in_more_than_5_percent_of_cases() -> None:
    """Seeds that vary by 1, a measurement that errs by 0.3 in common, three seeds, no true difference.

    The share is known to half a percent; it is 4.4%, and with fewer degrees of caution (Welch and
    Satterthwaite) 7%.
    """
    gen = np.random.default_rng(0)
    false = 0
    for _ in range(2000):
        a, b = (gen.normal(0, 1, 3) + gen.normal(0, 0.3) for _ in range(2))
        found = difference("fd", runs(list(a), 0.3), runs(list(b), 0.3))
        false += verdict("fd", found, found.p) != "within error"
    assert 0.02 < false / 2000 < 0.058


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    with_gap = holm([0.02, math.nan, 0.01])
    assert with_gap[0] == pytest.approx(0.02)
    assert with_gap[2] == pytest.approx(0.02)
    assert math.isnan(with_gap[1])


@pytest.mark.parametrize(
    ("metric", "value", "stderr", "p", "said"),
    [
        ("fd", -3.0, 1.0, 0.01, "better"),
        ("fd", 3.0, 1.0, 0.01, "worse"),
        ("recall", 3.0, 1.0, 0.01, "better"),
        ("recall", -3.0, 1.0, 0.01, "worse"),
        ("vendi", 3.0, 1.0, 0.01, "differs"),
        ("fd", 3.0, 1.0, 0.06, "within error"),
        ("fd", 1.9, 1.0, 0.01, "within error"),
    ],
)
def test_verdicts(metric: str, value: float, stderr: float, p: float, said: str) -> None:
    assert verdict(metric, Difference(value, stderr, 3, p), p) == said


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_pareto_front_against_brute_force(dimensions: int) -> None:
    gen = np.random.default_rng(dimensions)
    for size in range(1, 12):
        points = gen.integers(0, 5, (size, dimensions)).astype(float)  # few values, so that there are ties
        points[gen.random(points.shape) < 0.05] = math.nan
        expected = []
        for p in points:
            beaten = any(
                all(q[k] >= p[k] for k in range(dimensions)) and tuple(q) != tuple(p) for q in points
            )
            expected.append(not beaten and not any(math.isnan(v) for v in p))
        assert pareto_front(points).tolist() == expected


def test_a_front_knows_which_direction_is_better() -> None:
    def means(fd: float, recall: float) -> dict[str, Estimate]:
        return {"fd": Estimate(fd, 0.1, 10), "recall": Estimate(recall, 0.1, 10)}

    all_means = {"good": means(1, 0.5), "wide": means(3, 0.9), "poor": means(4, 0.6), "none": {}}
    assert front_names(("fd", "recall"), all_means) == ["good", "wide"]
    assert front_names(("precision", "recall"), all_means) == []
