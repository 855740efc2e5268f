"""Replacement: after each step the known part is overwritten with its noised truth (Song et al. 2021).

It is a heuristic. The known part influences the free part only through the model's prediction at the
overwritten state, which at high noise is weak: for correlated data the samples have the wrong mean and
covariance. :mod:`distmatch.diffusion.control.inverse` corrects the score instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.diffusion.control.linear import LinearMap
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers.grids import checked_levels


class Replacement:
    """The ``on_step`` of a solve that keeps measurements at their noised values, with fresh noise each step.

    y becomes y + A^T (value + sigma z - A y). With a mask that is (1 - m) y + m (x + sigma z); with the grey
    of a picture it is colorization.

    Args:
        operator: What is known; its rows must be orthonormal.
        value: The known value, (*out_shape) or (B, *out_shape).
        grid: The grid of the solve.
        noise: The noise of the samples; replacement draws from a separate random stream.

    Raises:
        UserError: Rows that are not orthonormal, or a value that does not fit.
    """

    def __init__(
        self, operator: LinearMap, value: Tensor, grid: Tensor | Sequence[float], noise: SampleNoise
    ) -> None:
        operator.check_value(value)
        if not operator.orthonormal:
            raise UserError(
                "only measurements with orthonormal rows can be replaced",
                fix="use LinearPosterior, which takes any linear measurement",
            )
        self._operator, self._value = operator, value
        self._levels = checked_levels(grid, stochastic=True)
        seed = stream_seed(noise.seed, "replacement")
        self._noise = SampleNoise(seed, noise.indices, operator.out_shape, noise.device, noise.first_step)

    def start(self, y: Tensor) -> Tensor:
        """The start ``y`` (B, *shape) of the solve with its known part replaced."""
        return self._replaced(y, self._levels[0], self._noise.normal(0, 1))

    def __call__(self, k: int, state: Tensor) -> Tensor:
        """The state after step k with its known part replaced."""
        return self._replaced(state, self._levels[k + 1], self._noise.normal(k))

    def _replaced(self, state: Tensor, level: float, z: Tensor) -> Tensor:
        known = self._value.to(state) + level * z.to(state)
        return state + self._operator.transpose(known - self._operator.apply(state))
