"""UniPC (Zhao et al. 2023): a multistep predictor whose steps are corrected with the next call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.solvers.onestep import combined
from distmatch.diffusion.solvers.run import Run, Solver, Stepper


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC on the data prediction, with B(h) = e^h - 1 (bh2 of its authors, and the default of diffusers).

    With l = -log(sigma), h = l' - l and e = 1 - s'/s, a step from y is

        y' = (s'/s) y + e (D + sum_i w_i (D_i - D) / r_i),   r_i = (l_i - l) / h,

    D_i being earlier predictions. The predictor's weights fit the ``order - 1`` last of them. The next call,
    at y', is one more (r = 1), and the corrector takes the step again with it: order ``order + 1`` for one
    call a step. The call is not repeated at the corrected state, as in the paper's algorithm 1.

    A state that was changed between two steps is not corrected.

    Attributes:
        order: Predictions in the predictor, 1 to 3.
        corrector: Whether steps are corrected; without it this is the predictor alone, and with ``order`` 2
            DPM-Solver++ 2M.
    """

    order: int = 2
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError("the order of UniPC must be 1, 2 or 3", got=self.order)

    def stepper(self, run: Run) -> Stepper:
        """One call a step: the correction takes the call of the next step."""
        past: _Past | None = None
        predicted: Tensor | None = None

        def step(k: int, y: Tensor) -> Tensor:
            nonlocal past, predicted
            now, after = run.levels[k], run.levels[k + 1]
            clean = run.denoise(y, now)
            if past is not None and self.corrector and y is predicted:
                y = past.step(now, clean)
            # Before a step to 0, which is of order 1, the order falls by one a step, as in diffusers.
            order = min(self.order, run.steps - k) if run.levels[-1] == 0 else self.order
            known = (clean, *(past.clean if past else ()))[:order]
            past = _Past(y, now, known, (now, *(past.levels if past else ()))[: len(known)])
            predicted = past.step(after)
            return predicted

        return step


@dataclass(frozen=True)
class _Past:
    """What a step started from: its state, its level, and predictions with their levels, the latest first."""

    y: Tensor
    level: float
    clean: tuple[Tensor, ...]
    levels: tuple[float, ...]

    @cached_property
    def ways(self) -> list[Tensor]:
        """Differences of the earlier predictions to the latest."""
        return [before - self.clean[0] for before in self.clean[1:]]

    def step(self, after: float, new: Tensor | None = None) -> Tensor:
        """The state at level ``after``, with the prediction ``new`` there where it is known."""
        h = math.log(self.level / after)
        ratios = [math.log(self.level / level) / h for level in self.levels[1:]]
        ways = self.ways
        if new is not None:
            ratios, ways = [*ratios, 1.0], [*ways, new - self.clean[0]]
        share = -math.expm1(-h)
        y = self.clean[0] + (after / self.level) * (self.y - self.clean[0])
        weights = [share * w / r for w, r in zip(bh2_weights(ratios, h), ratios, strict=True)]
        return combined(y, weights, ways)


def bh2_weights(ratios: Sequence[float], h: float) -> tuple[float, ...]:
    """The weights w_i of (D_i - D) / r_i: exact for predictions that are polynomials in l.

    They solve ``sum_i w_i r_i^(k-1) = k! phi_(k+1)(-h) (-h) / expm1(-h)``, k = 1, ..., phi_k the functions of
    exponential integrators (eq. 5 and theorem 3.1 of the paper). One weight is 1/2 whatever h is, which is of
    the same order, as its authors take it.
    """
    if len(ratios) < 2:
        return (0.5,) * len(ratios)
    z, rights = -h, []
    phi = math.expm1(z) / z
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / z  # phi_(k+1)
        rights.append(math.factorial(k) * phi * z / math.expm1(z))
    powers = np.array([[r**k for r in ratios] for k in range(len(ratios))])
    return tuple(np.linalg.solve(powers, np.array(rights)).tolist())
