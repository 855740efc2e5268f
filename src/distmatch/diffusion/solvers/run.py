"""The interface of a solver and its input: one run down (or up) a grid of noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distmatch.diffusion.paths import NoisePath

Stepper = Callable[[int, Tensor], Tensor]
"""Takes the number k of the step and the state at level k; returns the state at level k + 1."""


@dataclass(frozen=True)
class Run:
    """One solve: the model and its noise levels. Levels are numbers, so that no step waits for a device.

    Attributes:
        levels: Noise levels from start to end, strictly monotone; only the last may be 0.
        denoise: ``(y, level) -> x0_hat`` in the dtype of the state.
        normal: ``(step, draw) -> z``, unit normal noise like the state.
        path: The path whose time some solvers need; None where none was given.
        sigma_min: Smallest noise level that the model is meant for.
        sigma_data: Standard deviation of the model's data, the unit of absolute tolerances.
        watched: Whether the intermediate states are requested.
        begin: Called with the index of each step before it starts; a guided model decides there whether it
            guides.
        restarts: Steps from which on the model is another one, as at the ends of a guidance interval. What a
            solver remembers from before would be slopes of the old one, so it starts anew.
    """

    levels: tuple[float, ...]
    denoise: Callable[[Tensor, float], Tensor]
    normal: Callable[[int, int], Tensor]
    path: NoisePath | None = None
    sigma_min: float = 0.0
    sigma_data: float = 1.0
    watched: bool = False
    begin: Callable[[int], None] = lambda k: None
    restarts: frozenset[int] = frozenset()

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.levels) - 1

    def eps(self, y: Tensor, level: float) -> Tensor:
        """The predicted noise (y - D) / level, which is dy/dsigma."""
        return (y - self.denoise(y, level)) / level


def remembered(steps: int, most: int, restarts: frozenset[int]) -> list[int]:
    """How many earlier steps each step looks back on: at most ``most``, and never past a restart."""
    counts: list[int] = []
    for k in range(steps):
        counts.append(0 if k == 0 or k in restarts else min(counts[-1] + 1, most))
    return counts


class Solver:
    """A way to step along a grid. Subclasses are frozen dataclasses of options.

    All of them take the last step to level 0, if there is one, as y = D(y, sigma): there every formula here
    either becomes that or divides by 0.
    """

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise, and so needs a score and a decreasing grid."""
        return False

    @property
    def least_steps(self) -> int:
        """The fewest steps in which it is more than a solver of lower order: as many as the order."""
        return math.ceil(getattr(self, "order", 1))

    @property
    def needs_path(self) -> bool:
        """Whether it works in the time of a path."""
        return False

    def calls(self, levels: tuple[float, ...]) -> int | None:
        """Network calls for a grid; None where they depend on the model."""
        return len(levels) - 1

    def stepper(self, run: Run) -> Stepper:
        """Computes the coefficients of the whole grid and returns the step between levels above 0.

        What the step remembers is forgotten where a multistep solver must begin anew: there it is made again.
        """
        raise NotImplementedError

    def last(self, run: Run, k: int, y: Tensor) -> Tensor:
        """The last step, to level 0."""
        return run.denoise(y, run.levels[k])

    def integrate(self, run: Run, y: Tensor, visit: Stepper) -> Tensor:
        """Goes down all levels; ``visit(k, y)`` sees the state after step k and may replace it."""
        step = self.stepper(run)
        for k in range(run.steps):
            run.begin(k)
            if k in run.restarts:
                step = self.stepper(run)
            y = visit(k, step(k, y) if run.levels[k + 1] > 0 else self.last(run, k, y))
        return y
