"""Errors of probes, and ratios of means over samples as estimates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate, mean_of


def probe_error(values: Tensor, count: int) -> Tensor:
    """The standard error (n,) of the mean of ``values`` (n, count) over probes: 0 for none, NaN for one."""
    if count == 0:
        return torch.zeros(len(values), dtype=values.dtype, device=values.device)
    if count == 1:
        return torch.full_like(values[:, 0], math.nan)
    return values.std(1) / math.sqrt(count)


def ratio_of(above: Tensor, below: Tensor) -> Estimate:
    """mean(above) / mean(below) of paired values (n,), with the delta method's standard error.

    0 / 0 counts as 0: a quantity that vanishes against a scale that does too.
    """
    base = float(below.mean())
    if base == 0:
        return Estimate(0.0 if float(above.abs().max()) == 0 else math.inf, math.nan, len(below))
    value = float(above.mean()) / base
    return Estimate(value, mean_of(above - value * below).stderr / abs(base), len(below))
