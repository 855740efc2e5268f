"""An adaptive solver: Dormand-Prince 4(5) from SciPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.solvers.run import Run, Solver, Stepper


@dataclass(frozen=True)
class RK45(Solver):
    """dy/dsigma = eps by SciPy's RK45, with adaptive steps between the first and the last noise level.

    The state goes to the CPU in float64 for every call: this is for reference solutions, not for speed. All
    samples of a batch share their steps. SciPy controls the root mean square over the batch; tolerances are
    divided by the root of the batch size, so that each sample's own error stays below them. Samples agree
    between batches up to the tolerance, not to the bit.

    When the grid ends at 0, it integrates to the last positive level or the model's ``sigma_min``, whichever
    is smaller, and denoises from there.

    Attributes:
        rtol: Relative tolerance of a step. It is relative to the distance from the model's prediction at the
            start, so that it does not depend on the position of the data.
        atol: Absolute tolerance of a step, in units of the data's standard deviation ``sigma_data``.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        check_number("rtol", self.rtol, "[1e-13, 1)")
        check_number("atol", self.atol, "(0, inf)")

    def calls(self, levels: tuple[float, ...]) -> None:
        """They depend on the model; a solve reports them."""

    def integrate(self, run: Run, y: Tensor, visit: Stepper) -> Tensor:
        """Solves from the first noise level to the last, stopping in between only if states are requested."""
        positive = [level for level in run.levels if level > 0]
        stops = positive if run.watched else [positive[0], positive[-1]]
        center = run.denoise(y, positive[0])
        for k, (now, after) in enumerate(pairwise(stops)):
            y = self._between(run, y, now, after, center) if now != after else y
            y = visit(k if run.watched else run.steps - 1, y) if run.watched else y
        if run.levels[-1] == 0:
            now = positive[-1]
            floor = min(now, run.sigma_min) if run.sigma_min > 0 else now
            if floor < now:
                y = self._between(run, y, now, floor, center)
            y = run.denoise(y, floor)
            y = visit(run.steps - 1, y) if run.watched else y
        return y

    def _between(self, run: Run, y: Tensor, start: float, end: float, center: Tensor) -> Tensor:
        if len(y) == 0:
            return y

        def slope(level: float, flat: np.ndarray) -> np.ndarray:
            state = center + torch.from_numpy(flat).to(y).reshape(y.shape)
            return run.eps(state, level).double().cpu().numpy().reshape(-1)

        share = 1 / math.sqrt(len(y))
        # Below 100 epsilon SciPy raises the relative tolerance itself, with a warning.
        rtol = max(self.rtol * share, 100 * np.finfo(float).eps)
        # A single point has no spread; the level where the step ends is the finest thing to see then.
        atol = self.atol * share * (run.sigma_data or min(start, end))
        flat = (y - center).double().cpu().numpy().reshape(-1)
        done = solve_ivp(slope, (start, end), flat, "RK45", t_eval=[end], rtol=rtol, atol=atol)
        if not done.success:
            raise UserError(
                f"the adaptive solver failed between noise levels {start:g} and {end:g}",
                got=done.message,
                fix="raise the tolerance, or use a solver with fixed steps",
            )
        return center + torch.from_numpy(done.y[:, -1].copy()).to(y).reshape(y.shape)
