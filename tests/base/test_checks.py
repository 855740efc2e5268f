"""Numbers, counts, shapes and values are checked at their bounds, and every message names the argument."""

import math

import pytest
import torch

from distmatch.base.checks import (
    check_batch,
    check_count,
    check_equal,
    check_finite,
    check_name,
    check_number,
    check_one_each,
    check_rising,
)
from distmatch.base.errors import UserError
from distmatch.base.samples import checked, checked_pair

INTERVALS = {"(0, 1]": (1, 0.5), "[0, inf)": (0, 1e300), "(-inf, inf)": (-1.0,), "[0, inf]": (math.inf,)}
OUTSIDE = {
    "(0, 1]": (0, 1.001, math.nan, "a", None),
    "[0, inf)": (-1e-9, math.inf),
    "(-inf, inf)": (-math.inf,),
    "[0, inf]": (math.nan,),
}


@pytest.mark.parametrize("interval", INTERVALS)
def test_numbers_at_the_ends_of_an_interval(interval):
    for value in INTERVALS[interval]:
        check_number("eta", value, interval)
    for value in OUTSIDE[interval]:
        with pytest.raises(UserError, match=r"^eta must"):
            check_number("eta", value, interval)


def test_counts_are_whole_and_in_range():
    for value in (1, 4, 2.0):
        check_count("k", value, 1, 4)
    for value in (0, 5, 1.5, math.nan, math.inf, "2", None):
        with pytest.raises(UserError, match=r"^k must be a whole number from 1 to 4"):
            check_count("k", value, 1, 4)
    with pytest.raises(UserError, match=r"positive whole number.*Got: 0"):
        check_count("k", 0)


def test_levels_rise_and_names_are_known():
    check_rising(low=0.1, high=1.0)
    for low, high in ((0.0, 1.0), (1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(UserError, match="0 < low < high"):
            check_rising(low=low, high=high)
    check_equal("sizes", (1, 2), (1, 2))
    with pytest.raises(UserError, match=r"sizes differ. Got: 1 and 2"):
        check_equal("sizes", 1, 2)
    check_name("grid", "log", ("log", "time"))
    with pytest.raises(UserError, match="did you mean log"):
        check_name("grid", "lot", ("log", "time"))


def test_batches_have_the_shape_and_finite_values():
    x = torch.zeros(3, 2)
    check_batch("x", x, (2,))
    check_finite("x", torch.empty(2, 2, device="meta"))
    check_one_each("label", x[:, 0], 3)
    for bad in (torch.zeros(3, 1), torch.zeros(3, 2, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(UserError, match=r"Expected: \(B, 2\), floating point"):
            check_batch("x", bad, (2,))
    x[1, 1] = math.nan
    with pytest.raises(UserError, match="NaN or infinity in 1 of 3 samples"):
        check_finite("x", x)
    with pytest.raises(UserError, match="one label per sample"):
        check_one_each("label", x, 3)


def test_samples_become_matrices_of_one_precision():
    x, y = checked_pair(torch.arange(4.0).half(), torch.arange(3.0)[:, None].double())
    assert x.dtype == y.dtype == torch.float64
    assert (x.shape, y.shape) == ((4, 1), (3, 1))
    with pytest.raises(UserError, match="all equal"):
        checked(torch.ones(3, 2), "x", vary=True)
    with pytest.raises(UserError, match="must be paired"):
        checked_pair(torch.arange(4.0), torch.arange(3.0), paired=True)
    with pytest.raises(UserError, match="different shapes"):
        checked_pair(torch.rand(4, 2, 2), torch.rand(4, 4))
