"""Whatever is handed in: a clear error or a finite number, for every two-sample discrepancy alike."""

import math

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.discrepancies import (
    cauchy_schwarz,
    cauchy_schwarz_loss,
    conditional_cauchy_schwarz,
    distance_covariance,
    distance_covariance_loss,
    energy_distance,
    energy_distance_loss,
    energy_test,
    joint_distance_covariance,
    kernel_stein,
    median_bandwidth,
    mmd,
    mmd_loss,
    mmd_test,
)

TWO_SAMPLES = [
    mmd,
    mmd_loss,
    mmd_test,
    energy_distance,
    energy_distance_loss,
    energy_test,
    cauchy_schwarz,
    cauchy_schwarz_loss,
    lambda x, y: conditional_cauchy_schwarz(x, x, y, y),
]
PAIRED = [
    distance_covariance,
    distance_covariance_loss,
    kernel_stein,
    lambda x, y: joint_distance_covariance([x, y]),
]
GOOD = torch.linspace(-1, 1, 12).reshape(6, 2)
BAD = {
    "not finite": torch.tensor([[0.0, math.nan]] + [[1.0, 1.0]] * 5),
    "must be a floating-point tensor": torch.ones(6, 2, dtype=torch.int64),
    "too few samples": torch.ones(1, 2),
    "no coordinates": torch.ones(6, 0),
    "floating-point tensor. Got: ndarray": np.ones((6, 2)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("function", TWO_SAMPLES + PAIRED)
def test_bad_samples_are_refused_on_either_side(function, message):
    for pair in ((GOOD, BAD[message]), (BAD[message], GOOD)):
        with pytest.raises(UserError, match=message):
            function(*pair)


@pytest.mark.parametrize("function", TWO_SAMPLES)
def test_dimensions_and_emptiness(function):
    with pytest.raises(UserError, match="dimension"):
        function(GOOD, GOOD[:, :1])
    for empty in (torch.ones(0, 2), torch.tensor(1.0)):
        with pytest.raises(UserError, match="too few samples"):
            function(GOOD, empty)


@pytest.mark.parametrize("function", TWO_SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_and_supports_apart_give_numbers(function, dtype):
    constant = torch.full((6, 2), 3.0, dtype=dtype)
    for x, y in ((constant, constant), (constant, constant + 1e4), (GOOD.to(dtype), constant * 1e4)):
        result = function(x, y)
        value = getattr(result, "value", getattr(result, "statistic", result))
        assert math.isfinite(float(value))


@pytest.mark.parametrize("function", [mmd, energy_distance, cauchy_schwarz])
def test_images_and_half_precision_are_taken(function):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 1, 3, 3, generator=g)
    flat = function(x.flatten(1), y.flatten(1))
    assert function(x, y) == flat
    assert function(x.bfloat16(), y.bfloat16()).value == pytest.approx(flat.value, abs=0.05)
    assert median_bandwidth(x) > 0


def test_mixed_precision_counts_in_the_wider_one():
    x, y = GOOD.double(), (GOOD + 0.5).double()
    assert mmd(x, y.float()).value == pytest.approx(mmd(x, y).value, rel=1e-6)
    assert mmd_loss(x, y.float()).dtype == torch.float64
