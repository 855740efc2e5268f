"""The metric table: ratios with errors, verdicts, and how numbers are written."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distmatch.base.estimate import Estimate
from distmatch.report.run import ModelMetrics
from distmatch.report.table import compare, digits, error_digits, headline, ratio_of, table

NAN = math.nan


def test_error_of_the_ratio_agrees_with_simulation() -> None:
    student, teacher = Estimate(0.33, 0.009, 100), Estimate(0.37, 0.012, 200)
    ratio = ratio_of(student, teacher)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.33 / 0.37)
    rng = np.random.default_rng(0)
    draws = rng.normal(0.33, 0.009, 200_000) / rng.normal(0.37, 0.012, 200_000)
    # 200,000 draws give the spread to 0.2%; the second-order term left out is (0.012 / 0.37)^2, 0.1%
    assert ratio.stderr == pytest.approx(draws.std(), rel=0.01)


@pytest.mark.parametrize(
    "teacher", [Estimate(0.0, 0.0, 9), Estimate(-1, 0.1, 9), Estimate(0.1, 0.06, 9), None]
)
def test_no_ratio_to_something_that_may_be_zero(teacher: Estimate | None) -> None:
    assert ratio_of(Estimate(1.0, 0.1, 9), teacher) is None


@pytest.mark.parametrize(
    ("student", "teacher", "better", "verdict"),
    [
        (1.0, 1.27, "down", "within error"),  # 0.27 / hypot(0.1, 0.1) = 1.91
        (1.0, 1.30, "down", "better"),  # 2.12
        (1.3, 1.0, "down", "worse"),
        (1.3, 1.0, "up", "better"),
        (1.0, 1.3, "up", "worse"),
        (1.0, 1.3, "", "differs"),
        (NAN, 1.3, "up", "error not known"),
    ],
)
def test_verdict(student: float, teacher: float, better: str, verdict: str) -> None:
    floor = Estimate(2.0, 0.1, 9)
    found, sigmas = compare(Estimate(student, 0.1, 9), Estimate(teacher, 0.1, 9), floor, better)
    assert found == verdict
    if not math.isnan(student):
        assert sigmas == pytest.approx(abs(student - teacher) / math.hypot(0.1, 0.1))


@pytest.mark.parametrize(
    ("student", "teacher", "verdict", "sigmas"),
    [
        # Distances 0.1 and 0.3 on two sides: 0.2 / sqrt(0.1^2 + 0.1^2 + (2 * 0.05)^2)
        (2.1, 1.7, "within error", 0.2 / math.sqrt(0.03)),
        (1.2, 2.1, "worse", 0.7 / math.sqrt(0.03)),
        (2.1, 1.2, "better", 0.7 / math.sqrt(0.03)),
        # On one side the error of the floor cancels.
        (1.9, 1.5, "better", 0.4 / math.sqrt(0.02)),
    ],
)
def test_where_real_data_are_best_the_distances_to_them_are_compared(
    student: float, teacher: float, verdict: str, sigmas: float
) -> None:
    floor = Estimate(2.0, 0.05, 9)
    found = compare(Estimate(student, 0.1, 9), Estimate(teacher, 0.1, 9), floor, "floor")
    assert found == (verdict, pytest.approx(sigmas))


def test_as_far_beyond_the_floor_as_the_teacher_is_below_is_no_better() -> None:
    student, teacher, floor = Estimate(1.066, 0.02, 9), Estimate(0.939, 0.02, 9), Estimate(1.006, 0.01, 9)
    found, sigmas = compare(student, teacher, floor, "floor")
    assert found == "within error"
    assert sigmas < 0.3


def test_without_errors_nothing_is_claimed() -> None:
    assert compare(Estimate(1, NAN, 9), Estimate(2, 0.1, 9), None, "up")[0] == "error not known"
    assert compare(Estimate(8, 0, 9), Estimate(8, 0, 9), None, "up")[0] == "within error"
    assert compare(Estimate(7, 0, 9), Estimate(8, 0, 9), None, "up") == ("worse", math.inf)
    assert compare(None, Estimate(8, 0, 9), None, "up")[0] == ""


@pytest.mark.parametrize(
    ("value", "stderr", "text", "error"),
    [
        (0.33041, 0.0183, "0.330", "0.018"),
        (11.4217, 0.11, "11.42", "0.11"),
        (0.000121, 0.000213, "0.00012", "0.00021"),
        (12345.6, 321.0, "12346", "321"),
        (1.23e-9, 1e-10, "1.23e-09", "1.0e-10"),
        (0.37123, NAN, "0.3712", ""),
        (25, 0.0, "25", "0"),
        (NAN, NAN, "not finite", ""),
    ],
)
def test_numbers_are_written_to_the_second_digit_of_their_error(
    value: float, stderr: float, text: str, error: str
) -> None:
    assert (digits(value, stderr), error_digits(stderr)) == (text, error)


def block(seconds: float, **values: Estimate) -> ModelMetrics:
    return ModelMetrics(nfe=1, seconds_per_1000=seconds, estimates=values)


def test_headline_follows_the_numbers() -> None:
    metrics = {
        "reference": block(NAN, fd=Estimate(0.05, 0.004, 9)),
        "teacher": block(0.5, fd=Estimate(0.4, 0.021, 9), recall=Estimate(0.9, 0.01, 9)),
        "student": block(0.02, fd=Estimate(0.3, 0.02, 9), recall=Estimate(0.89, 0.01, 9)),
    }
    sentence, tiles = headline(metrics, table(metrics))
    assert "25 times as fast" in sentence
    assert "Fréchet distance is 0.750 ± 0.064 times the teacher’s: better by 3.4 σ." in sentence
    assert "Recall is 0.989 ± 0.016 times the teacher’s: the difference is within the errors." in sentence
    assert [t.number for t in tiles] == ["25×", "0.75×", "0.989×"]
    assert "real data 0.0500 ± 0.0040" in tiles[1].note
    for absent, word in (("student", "No student"), ("teacher", "No teacher")):
        part = {k: v for k, v in metrics.items() if k != absent}
        sentence, tiles = headline(part, table(part))
        assert word in sentence
        assert "Real data reach 0.0500 ± 0.0040" in sentence
        assert tiles == []
    assert headline({}, [])[0] == "No model has been evaluated in this folder yet."


def test_known_metrics_come_first_and_unknown_ones_are_kept() -> None:
    metrics = {
        "student": block(1, novelty=Estimate(1, 0.1, 9), recall=Estimate(1, 0.1, 9), fd=Estimate(1, 0.1, 9))
    }
    assert [row.metric.key for row in table(metrics)] == ["fd", "recall", "novelty"]
