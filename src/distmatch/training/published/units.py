"""From the units of papers and their code to those of the options. Imports no torch."""

from __future__ import annotations

import math

SIGMA_DATA = 0.5
"""The standard deviation of the data in EDM and everything that is built on it."""


def level(sigma: float) -> float:
    """A noise level of EDM in units of ``sigma_data``."""
    return rounded(sigma / SIGMA_DATA)


def log_level(mean: float) -> float:
    """The mean of log sigma in EDM as that of log(sigma / sigma_data)."""
    return rounded(mean - math.log(SIGMA_DATA))


def karras_level(share: float) -> float:
    """The level at a share of EDM's grid (0.002 to 80, rho 7), counted from the data, in ``sigma_data``."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return level((low + share * (high - low)) ** 7)


def ddpm_level(step: int) -> float:
    """The level at a step of DDPM's 1000, with variances from 1e-4 to 0.02, in ``sigma_data``."""
    kept = math.prod(1 - (1e-4 + k / 999 * (0.02 - 1e-4)) for k in range(step + 1))
    return level(math.sqrt(1 / kept - 1))


def half_life(decay: float, every: int = 1) -> float:
    """The half-life in student updates of a moving average with this decay.

    Args:
        decay: For each iteration.
        every: Iterations for each student update.
    """
    return rounded(math.log(0.5) / math.log(decay) / every)


def updates(images: float, batch: int) -> float:
    """A number of images in batches, as a half-life."""
    return rounded(images / batch)


def steps(images: float, batch: int) -> int:
    """A number of images in batches, as steps."""
    return round(images / batch)


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")
