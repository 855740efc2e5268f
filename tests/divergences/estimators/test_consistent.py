"""Bounds made consistent: what they imply is never above the truth, and what cannot be is withheld."""

from __future__ import annotations

import math

import pytest
import torch

from distmatch.base.estimate import Estimate
from distmatch.divergences import NAMES, divergence_discrete
from distmatch.divergences.estimators import LowerBound, consistent
from distmatch.divergences.estimators.consistent import least_at
from distmatch.metrics import Measured, compare_samples
from distmatch.metrics.distances import impossible

EVERY = (*NAMES, "alpha:0.5", "gjs:0.3", "skew_kl:0.1")


def bound(value, stderr=0.01, warning=None, n=300):
    return LowerBound(value, stderr, n, warning)


def pairs(count, points=4):
    """Random discrete laws, from nearly equal to nearly disjoint."""
    draws = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 6, count, dtype=torch.float64)[:, None]
    p, q = (
        (spread * torch.randn(count, points, generator=draws, dtype=torch.float64)).softmax(1)
        for _ in range(2)
    )
    return p, q


def test_least_values_in_closed_form():
    for tv in (0.0, 0.1, 0.5, 0.8, 0.99):
        share = (1 - tv) / 2
        entropy = -sum(x * math.log(x) for x in (share, 1 - share))
        assert least_at("js", tv) == pytest.approx(math.log(2) - entropy, abs=1e-9)
        assert least_at("hellinger", tv) == pytest.approx(2 - 2 * math.sqrt(1 - tv**2), abs=1e-9)
        assert least_at("tv", tv) == pytest.approx(tv, abs=1e-12)
        # Pearson's chi-square: 4 V^2 up to V = 1/2, then V / (1 - V) (Harremoes and Vajda 2011)
        assert least_at("pearson", tv) == pytest.approx(4 * tv**2 if tv <= 0.5 else tv / (1 - tv), abs=1e-4)
        assert least_at("kl", tv) >= 2 * tv**2 + 4 / 9 * tv**4 - 1e-9  # Pinsker, with its next term


@pytest.mark.slow
def test_what_is_implied_is_never_above_the_truth():
    p, q = pairs(60)
    truths = {name: divergence_discrete(name, p, q) for name in EVERY}
    for i in range(len(p)):
        exact = {name: bound(float(values[i]), 0.0, n=10**9) for name, values in truths.items()}
        found = consistent(exact)
        for name, value in exact.items():
            assert found.bounds[name].value == pytest.approx(value.value, rel=1e-4, abs=1e-9)


def test_a_bound_of_one_raises_the_others():
    found = consistent({"tv": bound(0.0), "js": bound(0.565), "kl": bound(0.3), "pearson": bound(0.1, 0.05)})
    assert found.bounds["tv"].value == pytest.approx(0.565 / math.log(2))  # above 0.8
    assert found.bounds["tv"].stderr == pytest.approx(0.01 / math.log(2), rel=0.01)
    assert found.bounds["js"] == bound(0.565)
    assert found.bounds["kl"].value == pytest.approx(least_at("kl", 0.565 / math.log(2)))
    assert found.bounds["pearson"].value >= math.expm1(found.bounds["kl"].value) - 1e-9
    assert found.implied == {"tv": "js", "kl": "js", "pearson": "js"}
    order = consistent(
        {"hellinger": bound(1.0), "kl": bound(0.1), "reverse_kl": bound(2.0), "jeffreys": bound(0)}
    )
    assert order.bounds["kl"].value == pytest.approx(2 * math.log(2))
    assert order.bounds["reverse_kl"].value == 2.0
    assert order.bounds["jeffreys"].value == pytest.approx(2 * math.log(2) + 2)


def test_an_implied_bound_keeps_the_warning_of_its_source():
    found = consistent({"tv": bound(0.0), "js": bound(0.5, warning="few samples")})
    assert found.bounds["tv"].warning == "few samples"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("softened_reverse_kl", bound(8.2, 9e6)),
        ("js", bound(0.9, 0.01)),
        ("js", bound(0.1, 5.0)),
        ("kl", bound(-3.0, 0.1)),
        ("kl", bound(math.inf, math.nan)),
        ("kl", bound(-math.inf, math.nan, "the critic is so inaccurate that the bound overflows")),
    ],
)
def test_what_cannot_be_is_withheld_unless_another_implies_a_bound(name, given):
    alone = consistent({name: given})
    assert not alone.bounds
    assert alone.withheld.keys() == {name}
    helped = consistent({name: given, "le_cam": bound(1.0), "tv": bound(0.2)})
    assert helped.bounds[name].value == pytest.approx(least_at(name, 0.5), rel=1e-6)
    assert not helped.withheld


def test_noise_about_zero_and_about_the_largest_value_stays():
    found = consistent({"js": bound(-0.001, 0.002), "tv": bound(-0.01, 0.02), "kl": bound(-0.002, 0.003)})
    assert [b.value for b in found.bounds.values()] == [-0.001, -0.01, -0.002]
    top = consistent({"js": bound(0.70, 0.01), "tv": bound(1.0, 0.01)})
    assert top.bounds["js"].value == pytest.approx(math.log(2) * 299 / 300)
    assert top.bounds["tv"].value == pytest.approx(299 / 300)
    assert top.bounds["tv"].stderr == pytest.approx(math.hypot(0.01, 1 / 300))


def test_a_comparison_is_consistent_and_has_the_right_units():
    draws = torch.Generator().manual_seed(0)
    p, q = torch.randn(240, 16, generator=draws), 3 + torch.randn(240, 16, generator=draws)
    names = "tv,js,hellinger,kl,pearson,softened_reverse_kl,le_cam,renyi:2,cauchy_schwarz"
    found = compare_samples(p, q, names)
    values = {name: row.estimate.value for name, row in found.measured.items()}
    assert values["tv"] >= values["js"] / math.log(2) - 1e-9
    assert values["tv"] >= values["hellinger"] / 2 - 1e-9
    assert values["kl"] >= least_at("kl", values["tv"]) - 1e-6
    assert values.get("cauchy_schwarz", 0) >= 0
    units = {name: row.meaning for name, row in found.measured.items()}
    assert {name for name, meaning in units.items() if meaning == "lower bound"} == {
        *("tv", "hellinger", "pearson", "le_cam")
    }
    for row in found.measured.values():
        assert row.estimate.stderr < 10 * max(1, abs(row.estimate.value))


def test_a_distance_that_no_two_laws_have_is_withheld():
    def row(value, stderr, warning=None):
        return Measured(Estimate(value, stderr, 300, warning), "kernel densities", "nats")

    apart = "the two sets hardly overlap at this bandwidth, so a few pairs dominate: use a larger one"
    assert apart in str(impossible("cauchy_schwarz", row(-3.99, 0.5, apart)))
    assert impossible("cauchy_schwarz", row(-0.01, 0.02)) is None  # noise about zero
    assert impossible("mmd", row(-0.5, 0.01)) is None  # a U-statistic, and says so
    assert "inf" in str(impossible("frechet", row(math.inf, math.nan)))
