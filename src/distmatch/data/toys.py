"""Two-dimensional Gaussian mixtures on which everything is known exactly: the teacher, and samples of it.

All have mean zero, so that ``sigma_data`` (root mean variance of a coordinate, which the mixture carries) is
also the root mean square that preconditioning assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name
from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling
from distmatch.diffusion.mixture import GaussianMixture

DEFAULT_SAMPLES = 20_000


def _ring8() -> tuple[Tensor, Tensor, Tensor]:
    """Eight equal modes on the unit circle, standard deviation 0.08; ``sigma_data`` 0.712."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    means = torch.stack((angle.cos(), angle.sin()), 1)
    return torch.full((8,), 1 / 8, dtype=torch.float64), means, torch.full((8,), 0.08**2, dtype=torch.float64)


def _grid25() -> tuple[Tensor, Tensor, Tensor]:
    """A 5 x 5 grid of spacing 0.5 in [-1, 1]^2, standard deviation 0.03, weights uneven by a factor of 10.

    The thirteen geometric weights, 1 to 1/10, are scattered over the grid by stepping through it by fives;
    opposite modes share one, which keeps the mean at zero. ``sigma_data`` 0.730.
    """
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis)
    first = 10.0 ** (-((torch.arange(13, dtype=torch.float64) * 5) % 13) / 12)
    weights = torch.cat((first, first[:12].flip(0)))
    return weights / weights.sum(), means, torch.full((25,), 0.03**2, dtype=torch.float64)


def _skewed2() -> tuple[Tensor, Tensor, Tensor]:
    """A wide mode of weight 0.85 and a narrow one of 0.15, 1.2 apart on the diagonal; ``sigma_data`` 0.383.

    Standard deviations 0.25 and 0.1: the small mode is the one that a mode-seeking student gives up.
    """
    direction = torch.full((2,), math.sqrt(0.5), dtype=torch.float64)
    along = torch.tensor([-0.15 * 1.2, 0.85 * 1.2], dtype=torch.float64)
    variances = torch.tensor([0.25**2, 0.1**2], dtype=torch.float64)
    return torch.tensor([0.85, 0.15], dtype=torch.float64), along[:, None] * direction, variances


_TOYS: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "ring8": _ring8,
    "grid25": _grid25,
    "skewed2": _skewed2,
}
TOY_NAMES = tuple(_TOYS)


def toy(name: str) -> GaussianMixture:
    """The exact teacher ``ring8``, ``grid25`` or ``skewed2``: a mixture in the plane, unconditional.

    Raises:
        UserError: There is no toy of this name.
    """
    check_name("toy distribution", name, TOY_NAMES)
    return GaussianMixture(*_TOYS[name]())


def toy_dataset(name: str, n: int = DEFAULT_SAMPLES, seed: int = 0) -> Dataset:
    """Draws ``n`` samples of a toy; the labels are the modes of the samples.

    They are not rescaled, so that the exact teacher of the same name is the teacher of these data.

    Raises:
        UserError: There is no toy of this name, or ``n`` is below 2.
    """
    mixture = toy(name)
    check_count("the number of samples", n, 2)
    x, component = mixture.sample_with_components(n, seed=seed)
    return Dataset(
        raw=x,
        labels=component,
        class_names=tuple(f"mode {k}" for k in range(len(mixture.weights))),
        name=name,
        scaling=Scaling.identity(x.shape[1]),
    )
