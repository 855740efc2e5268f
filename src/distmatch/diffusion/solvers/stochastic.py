"""Solvers of the reverse SDE: DPM-Solver++, Euler-Maruyama, reverse diffusion, predictor-corrector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from distmatch.base.checks import check_count, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.solvers.run import Run, Solver, Stepper


class _Stochastic(Solver):
    @property
    def stochastic(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class DPMppSDE(_Stochastic):
    """SDE-DPM-Solver++ (Lu et al. 2022) of order 1 or 2M.

    With e = s'/s: y' = e^2 y + (1 - e^2) D~ + s' sqrt(1 - e^2) z. Order 1 has D~ = D and is DDIM with eta 1;
    2M has D~ = D + (D - D_before) / (2 r), r the ratio of this step's and the last one's log(s / s').

    Attributes:
        order: 1 or 2.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UserError("SDE-DPM-Solver++ is available in orders 1 and 2", got=self.order)

    def stepper(self, run: Run) -> Stepper:
        """One call and one draw a step."""
        before: list[Tensor] = []

        def step(k: int, y: Tensor) -> Tensor:
            now, after = run.levels[k], run.levels[k + 1]
            clean = run.denoise(y, now)
            target = clean
            if self.order == 2:
                if before:
                    share = 0.5 * math.log(now / after) / math.log(run.levels[k - 1] / now)
                    target = clean + share * (clean - before.pop())
                before.append(clean)
            kept = (after / now) ** 2
            return (target + kept * (y - target)).add(run.normal(k, 0), alpha=after * math.sqrt(1 - kept))

        return step


@dataclass(frozen=True)
class EulerMaruyama(_Stochastic):
    """Euler-Maruyama for the family dx = [f x - (g^2 + h^2) s / 2] dt + h dw, h = ratio(sigma) g.

    Every ratio has the same marginals: 0 is the probability-flow ODE, 1 the reverse SDE (Song et al.
    2021). In this frame a step is y' = y + (1 + ratio^2) (s' - s) eps + ratio sqrt(s^2 - s'^2) z.

    Attributes:
        ratio: h / g: a number, or a function of the noise level.
    """

    ratio: float | Callable[[float], float] = 1.0

    def __post_init__(self) -> None:
        check_number("the noise ratio h / g", 0 if callable(self.ratio) else self.ratio, "[0, inf)")

    @property
    def stochastic(self) -> bool:
        """Unless the ratio is the number 0."""
        return callable(self.ratio) or self.ratio > 0

    def stepper(self, run: Run) -> Stepper:
        """One call and one draw a step."""
        ratios = [self.ratio(s) if callable(self.ratio) else self.ratio for s in run.levels[:-1]]
        check_number("the smallest noise ratio h / g", min(ratios), "[0, inf)")
        check_number("the largest noise ratio h / g", max(ratios), "[0, inf)")

        def step(k: int, y: Tensor) -> Tensor:
            now, after, ratio = run.levels[k], run.levels[k + 1], ratios[k]
            y = y.add(run.eps(y, now), alpha=(1 + ratio**2) * (after - now))
            if ratio == 0:
                return y
            return y.add(run.normal(k, 0), alpha=ratio * math.sqrt(now**2 - after**2))

        return step


@dataclass(frozen=True)
class ReverseDiffusion(_Stochastic):
    """Reverse diffusion (Song et al. 2021): y' = y + (s^2 - s'^2) score + sqrt(s^2 - s'^2) z."""

    def stepper(self, run: Run) -> Stepper:
        """One call and one draw a step."""

        def step(k: int, y: Tensor) -> Tensor:
            now, after = run.levels[k], run.levels[k + 1]
            gap = now**2 - after**2
            return y.add(run.eps(y, now), alpha=-gap / now).add(run.normal(k, 0), alpha=math.sqrt(gap))

        return step


@dataclass(frozen=True)
class PredictorCorrector(_Stochastic):
    """Langevin steps at each level, then a predictor's step to the next (Song et al. 2021).

    A Langevin step is y += e s + sqrt(2 e) z. Song et al. take e = 2 (snr |z| / |s|)^2 with norms averaged
    over the batch; that is ``norm="batch"``, and a sample then depends on its batch. For many dimensions
    |z| / |s| is the noise level, and ``norm="level"`` takes it: e = 2 (snr sigma)^2.

    Attributes:
        snr: Length of a Langevin step against the noise level.
        corrections: Langevin steps at each level.
        norm: Where the length comes from.
        predictor: The solver that makes the step.
    """

    snr: float = 0.16
    corrections: int = 1
    norm: Literal["level", "batch"] = "level"
    predictor: Solver = field(default_factory=ReverseDiffusion)

    def __post_init__(self) -> None:
        check_number("snr", self.snr, "(0, inf)")
        check_count("corrections", self.corrections)
        check_name("norm of a corrector", self.norm, ("level", "batch"))

        if type(self.predictor).integrate is not Solver.integrate:
            raise UserError(
                "a predictor must go step by step", got=self.predictor, fix="use any solver but RK45"
            )

    @property
    def least_steps(self) -> int:
        """Those of the predictor."""
        return self.predictor.least_steps

    @property
    def needs_path(self) -> bool:
        """Where the predictor does."""
        return self.predictor.needs_path

    def calls(self, levels: tuple[float, ...]) -> int | None:
        """Those of the predictor, and one for each correction."""
        predictor = self.predictor.calls(levels)
        return None if predictor is None else predictor + self.corrections * (len(levels) - 1)

    def stepper(self, run: Run) -> Stepper:
        """Corrections and a prediction."""
        predict = self.predictor.stepper(run)
        return lambda k, y: predict(k, self._corrected(run, k, y))

    def last(self, run: Run, k: int, y: Tensor) -> Tensor:
        """Corrects before the last step too."""
        return self.predictor.last(run, k, self._corrected(run, k, y))

    def _corrected(self, run: Run, k: int, y: Tensor) -> Tensor:
        now = run.levels[k]
        for draw in range(1, self.corrections + 1):
            z, eps = run.normal(k, draw), run.eps(y, now)  # eps is -sigma times the score
            if self.norm == "level":
                y = y.add(eps, alpha=-2 * self.snr**2 * now).add(z, alpha=2 * self.snr * now)
            else:
                lengths = [v.flatten(1).norm(dim=1).mean() for v in (z, eps)]
                size = self.snr * now * lengths[0] / lengths[1]
                y = y - (2 * size**2 / now) * eps + 2 * size * z
        return y
