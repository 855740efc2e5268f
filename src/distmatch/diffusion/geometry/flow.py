"""The probability-flow ODE in scaled form, with a fixed Runge-Kutta grid or SciPy's adaptive steps.

With c(sigma)^2 = sigma^2 + sigma_data^2, m the mean of the data and z = (y - m) / c, the flow
dy/dsigma = (y - D) / sigma becomes

    dz / dlog sigma = sigma_data^2 / c^2 z - (D(m + c z) - m) / c,

which is zero for data N(m, sigma_data^2 I) and fades at both ends of the noise levels for any data: a grid
uniform in log sigma suits it. Any m gives the same flow; one far from the data would cost steps and digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser

State = tuple[Tensor, ...]
Slope = Callable[[float, State], State]

# Rows of the Butcher tableaus below the diagonal; the last row holds the weights.
_KUTTA4 = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_DORMAND_PRINCE5 = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_FIXED = {"rk4": _KUTTA4, "rk5": _DORMAND_PRINCE5}
_ADAPTIVE = {"rk45": "RK45", "dop853": "DOP853"}


@dataclass(frozen=True)
class FlowSolver:
    """How to integrate over log sigma.

    Attributes:
        name: ``"rk4"``, ``"rk5"`` (fixed steps), ``"rk45"`` or ``"dop853"`` (adaptive).
        steps: Fixed steps; 0 when adaptive.
        tolerance: Relative and absolute tolerance of a step; 0 when fixed.
    """

    name: str
    steps: int
    tolerance: float

    @classmethod
    def parse(cls, text: str) -> FlowSolver:
        """Reads ``"rk5:64"`` (64 steps), ``"dop853:1e-8"`` (tolerance) and the like.

        Raises:
            UserError: An unknown name, or an option that is not a number of that kind.
        """
        name, _, option = text.partition(":")
        if name in _FIXED:
            if option and (not option.isdecimal() or int(option) < 1):
                raise UserError("a fixed grid needs a number of steps", got=text, expected=f"{name}:64")
            return cls(name, int(option or 64), 0.0)
        if name not in _ADAPTIVE:
            raise unknown_name("solver of a likelihood", name, [*_FIXED, *_ADAPTIVE])
        try:
            tolerance = float(option or 1e-5)
        except ValueError:
            tolerance = math.nan
        if not 0 < tolerance < 1:
            raise UserError("a tolerance must lie between 0 and 1", got=text, expected=f"{name}:1e-6")
        return cls(name, 0, tolerance)

    def integrate(
        self, slope: Slope, state: State, start: float, stop: float, eps: float
    ) -> tuple[State, int]:
        """Integrates ``slope`` for ``state`` from log sigma ``start`` to ``stop``, up or down.

        A batch shares its adaptive steps. The solver controls the root mean square over all numbers of the
        batch, so the tolerance is divided by the root of the batch size: no sample's error can then hide
        among the others'.

        Args:
            slope: d state / d log sigma.
            state: Tensors (B, ...), float64.
            start: First log sigma.
            stop: Last log sigma.
            eps: Relative rounding error of the slope, below which no tolerance goes.

        Returns:
            The final state, and the number of evaluations of ``slope``.

        Raises:
            UserError: The adaptive solver gave up.
        """
        if self.steps:
            grid = np.linspace(start, stop, self.steps + 1)
            tableau = _FIXED[self.name]
            return _runge_kutta(slope, state, grid.tolist(), tableau), self.steps * len(tableau)
        batch, shapes = len(state[0]), [part.shape for part in state]

        def pack(parts: State) -> np.ndarray:
            return cast(np.ndarray, torch.cat([p.reshape(batch, -1) for p in parts], 1).cpu().numpy().ravel())

        def unpack(flat: np.ndarray) -> State:
            rows = torch.from_numpy(flat.copy()).reshape(batch, -1).to(state[0].device)
            parts = rows.split([math.prod(s[1:]) for s in shapes], dim=1)
            return tuple(p.reshape(s) for p, s in zip(parts, shapes, strict=True))

        tolerance = max(self.tolerance / math.sqrt(batch), 10 * eps)
        done = solve_ivp(
            lambda t, flat: pack(slope(t, unpack(flat))),
            (start, stop),
            pack(state),
            method=_ADAPTIVE[self.name],
            rtol=tolerance,
            atol=tolerance,
            t_eval=[stop],
        )
        if not done.success:
            raise UserError(
                "the adaptive solver could not follow the flow",
                got=done.message,
                fix="raise sigma, or use a fixed grid such as rk5:128 and compare two numbers of steps",
            )
        return unpack(done.y[:, -1]), int(done.nfev)


def _runge_kutta(
    slope: Slope, state: State, grid: Sequence[float], tableau: Sequence[Sequence[float]]
) -> State:
    """Explicit Runge-Kutta steps over ``grid``."""
    for now, after in pairwise(grid):
        step = after - now
        slopes = [slope(now, state)]
        for row in tableau[:-1]:
            ahead = tuple(_moved(part, step, row, [s[i] for s in slopes]) for i, part in enumerate(state))
            slopes.append(slope(now + step * math.fsum(row), ahead))
        state = tuple(_moved(part, step, tableau[-1], [s[i] for s in slopes]) for i, part in enumerate(state))
    return state


def _moved(part: Tensor, step: float, row: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(row, slopes, strict=True):
        if weight:
            part = part + (step * weight) * slope
    return part


@dataclass(frozen=True)
class ScaledFlow:
    """z = (y - center) / c(sigma) at log sigma = t, for a denoiser that is called in the dtype of a batch.

    Attributes:
        denoiser: The model.
        dtype: In which it is called.
        center: The mean of the data as the model sees it from the highest level, (B, *shape) float64.
    """

    denoiser: Denoiser
    dtype: torch.dtype
    center: Tensor

    @classmethod
    def of(cls, denoiser: Denoiser, y: Tensor, sigma: float, conditioning: ConditioningLike) -> ScaledFlow:
        """The flow of a batch ``y`` (B, *shape), whose highest level is ``sigma``."""
        level = torch.full((len(y),), sigma, dtype=y.dtype, device=y.device)
        mean = y
        with torch.no_grad():
            for _ in range(3):  # D(mean) = mean holds for the mean; each pass gains (sigma_data / sigma)^2
                mean = denoiser(mean, level, conditioning)
        return cls(denoiser, y.dtype, mean.double())

    def scaled(self, t: float, y: Tensor) -> Tensor:
        """The z of positions ``y``, (B, *shape) float64."""
        return (y.double() - self.center) / self.radius(t)

    def position(self, t: float, z: Tensor) -> Tensor:
        """The inverse of :meth:`scaled`, float64."""
        return self.center + self.radius(t) * z

    def radius(self, t: float) -> float:
        """The radius c = sqrt(sigma^2 + sigma_data^2)."""
        return math.hypot(math.exp(t), self.denoiser.sigma_data)

    def pull(self, t: float) -> float:
        """sigma_data^2 / c^2, the slope of z without the denoiser."""
        return (self.denoiser.sigma_data / self.radius(t)) ** 2

    def inputs(self, t: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the denoiser takes: y (B, *shape) and sigma (B,)."""
        y = self.position(t, z).to(self.dtype)
        return y, torch.full((len(z),), math.exp(t), dtype=self.dtype, device=z.device)

    def slope(self, t: float, z: Tensor, denoised: Tensor) -> Tensor:
        """The slope dz / dlog sigma, float64."""
        return self.pull(t) * z - (denoised.double() - self.center) / self.radius(t)
