"""Heavy ball and its generalization (Wizadwongsa et al. 2024): more stability at few steps.

They enlarge the range of step sizes that do not blow up; they do not lower the error of small steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from distmatch.base.checks import check_count, check_number
from distmatch.diffusion.solvers.multistep import AB
from distmatch.diffusion.solvers.onestep import combined
from distmatch.diffusion.solvers.run import Run, Solver, Stepper


def ghvb_weights(order: int, beta: float) -> tuple[float, ...]:
    """Weights of the last ``order`` velocities, the latest first; they sum to 1, at beta = 1 they are AB's.

    Args:
        order: 1 to 5.
        beta: In (0, 1].
    """
    b = beta
    rows: tuple[tuple[tuple[float, ...], float], ...] = (
        ((1.0,), 1.0),
        ((2 + b, -(2 - b)), 2 * b),
        ((18 + 5 * b, -(24 - 8 * b), 6 - b), 12 * b),
        ((46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)), 24 * b),
        (
            (
                1650 + 251 * b,
                -(3420 - 646 * b),
                2880 - 264 * b,
                -(1380 - 106 * b),
                270 - 19 * b,
            ),
            720 * b,
        ),
    )
    numerators, denominator = rows[order - 1]
    return tuple(n / denominator for n in numerators)


@dataclass(frozen=True)
class HeavyBall(Solver):
    """HB: v <- (1 - beta) v + beta AB_r(slopes); y += delta v. Order 1 for every beta below 1.

    Attributes:
        beta: In (0, 1]; 1 is Adams-Bashforth with weights for even steps.
        order: The r of the Adams-Bashforth mean, 1 to 4.
    """

    beta: float = 0.8
    order: int = 1

    def __post_init__(self) -> None:
        check_number("the beta of heavy ball", self.beta, "(0, 1]")
        check_count("the order under heavy ball", self.order, 1, len(AB))

    def stepper(self, run: Run) -> Stepper:
        """One call a step."""
        history: deque[Tensor] = deque(maxlen=self.order)
        velocity: Tensor | None = None

        def step(k: int, y: Tensor) -> Tensor:
            nonlocal velocity
            now, after = run.levels[k], run.levels[k + 1]
            slope = run.eps(y, now)
            history.appendleft(slope)
            weights = AB[len(history) - 1]
            if len(weights) > 1:
                slope = combined(weights[0] * slope, weights[1:], list(history)[1:])
            velocity = slope if velocity is None else (1 - self.beta) * velocity + self.beta * slope
            return y.add(velocity, alpha=after - now)

        return step


@dataclass(frozen=True)
class GHVB(Solver):
    """GHVB: v <- (1 - beta) v + beta eps; y += delta M_r(velocities).

    The weights M_r are for even steps: on other grids the method converges, but not at order r.

    Attributes:
        order: The order q of its authors, in (0, 5]: r = ceil(q) velocities, beta = frac(q), or 1 when q
            is whole.
    """

    order: float = 1.8

    def __post_init__(self) -> None:
        check_number("the order of GHVB", self.order, "(0, 5]")

    @property
    def velocities(self) -> int:
        """The number r of velocities."""
        return math.ceil(self.order)

    @property
    def beta(self) -> float:
        """The weight of the latest slope."""
        return self.order % 1 or 1.0

    def stepper(self, run: Run) -> _GHVBStepper:
        """One call a step."""
        return _GHVBStepper(self, run)


class _GHVBStepper:
    """Keeps the velocities, the latest first, in ``history``."""

    def __init__(self, solver: GHVB, run: Run) -> None:
        self.run, self.beta = run, solver.beta
        self.weights = [ghvb_weights(r, self.beta) for r in range(1, solver.velocities + 1)]
        self.history: deque[Tensor] = deque(maxlen=solver.velocities)

    def __call__(self, k: int, y: Tensor) -> Tensor:
        """Step ``k``."""
        now, after = self.run.levels[k], self.run.levels[k + 1]
        slope = self.run.eps(y, now)
        old = self.history[0] if self.history else slope
        self.history.appendleft((1 - self.beta) * old + self.beta * slope)
        weights = self.weights[len(self.history) - 1]
        return combined(y, [(after - now) * w for w in weights], self.history)
