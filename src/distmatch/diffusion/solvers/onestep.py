"""Solvers without a memory: Runge-Kutta in rho (Euler among them), DDIM, Heun with churn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.solvers.run import Run, Solver, Stepper


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i is at c_i with weights a_i on the stages before it.

    Attributes:
        c: Where the stages are, as shares of the step.
        a: Rows of weights, one for each stage after the first.
        b: Weights of the stages in the step.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUX: Mapping[str, Tableau] = {
    "euler": Tableau((0,), (), (1,)),
    "heun2": Tableau((0, 1), ((1,),), (1 / 2, 1 / 2)),
    "kutta3": Tableau((0, 1 / 2, 1), ((1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "ralston3": Tableau((0, 1 / 2, 3 / 4), ((1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "vdhouwen3": Tableau((0, 8 / 15, 2 / 3), ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4)),
    "ssprk3": Tableau((0, 1, 1 / 2), ((1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "rk4": Tableau((0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


_PURE = 1e4  # times sigma_data: levels above are pure noise; those of flows are there alone


@dataclass(frozen=True)
class RhoRK(Solver):
    """Explicit Runge-Kutta on dy/drho = eps, the rhoRK of DEIS (Zhang and Chen 2023).

    Attributes:
        tableau: One of :data:`TABLEAUX`; order 1 (euler), 2 (heun2), 3 (those ending in 3) or 4 (rk4).
    """

    tableau: str = "heun2"

    def __post_init__(self) -> None:
        check_name("Runge-Kutta tableau", self.tableau, TABLEAUX)

    def calls(self, levels: tuple[float, ...]) -> int:
        """One for each stage; the step to 0 is a single call."""
        return sum(1 if after == 0 else len(TABLEAUX[self.tableau].b) for after in levels[1:])

    def stepper(self, run: Run) -> Stepper:
        """Runge-Kutta stages over each step."""
        t = TABLEAUX[self.tableau]

        def step(k: int, y: Tensor) -> Tensor:
            now, after = run.levels[k], run.levels[k + 1]
            if len(t.b) > 1 and 0 < _PURE * run.sigma_data < max(now, after):
                return _in_flow_time(run, y, now, after, t)
            h = after - now
            slopes = [run.eps(y, now)]
            for c, row in zip(t.c[1:], t.a, strict=True):
                slopes.append(run.eps(combined(y, [h * w for w in row], slopes), now + c * h))
            return combined(y, [h * w for w in t.b], slopes)

        return step


def _in_flow_time(run: Run, y: Tensor, now: float, after: float, tableau: Tableau) -> Tensor:
    """A Runge-Kutta step in the time t = sigma / (sigma + sigma_data) of a flow, x = (1 - t) y.

    For steps from pure noise, or to it. In sigma they are almost infinitely long, and a difference d between
    two predictions of x0 changes the result by about d (now / after), which is 1e6 and more.
    """
    unit = run.sigma_data
    start, end = now / (now + unit), after / (after + unit)
    h, x = end - start, (1 - start) * y

    def slope(x: Tensor, t: float) -> Tensor:
        return (x - run.denoise(x / (1 - t), unit * t / (1 - t))) / t

    slopes = [slope(x, start)]
    for c, row in zip(tableau.c[1:], tableau.a, strict=True):
        slopes.append(slope(combined(x, [h * w for w in row], slopes), start + c * h))
    return combined(x, [h * w for w in tableau.b], slopes) / (1 - end)


def combined(y: Tensor, weights: Sequence[float], values: Iterable[Tensor]) -> Tensor:
    """The sum y + sum_j weights_j values_j, leaving out weights of 0."""
    for weight, value in zip(weights, values, strict=False):
        if weight != 0:
            y = y.add(value, alpha=weight)
    return y


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song et al. 2021): eta = 0 is Euler in rho, eta = 1 samples the posterior of DDPM.

    y' = D + sqrt(s'^2 - eta^2 q^2) eps + eta q z with q^2 = (s'/s)^2 (s^2 - s'^2).

    Attributes:
        eta: Share of the posterior's noise, 0 to 1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number("eta of DDIM", self.eta, "[0, 1]")

    @property
    def stochastic(self) -> bool:
        """Above eta 0."""
        return self.eta > 0

    def stepper(self, run: Run) -> Stepper:
        """One call, and one draw above eta 0."""

        def step(k: int, y: Tensor) -> Tensor:
            now, after = run.levels[k], run.levels[k + 1]
            clean = run.denoise(y, now)
            noise = self.eta * after * math.sqrt(1 - (after / now) ** 2) if self.eta > 0 else 0.0
            y = clean + (math.sqrt(after**2 - noise**2) / now) * (y - clean)
            return y.add(run.normal(k, 0), alpha=noise) if noise > 0 else y

        return step


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method with churn, algorithm 2 of EDM (Karras et al. 2022); without churn its algorithm 1.

    A step first adds noise, up to the level (1 + gamma) sigma with gamma = min(s_churn / steps, sqrt(2) - 1),
    where sigma is in [s_min, s_max].

    Attributes:
        s_churn: Churn of the whole run; 0 is the deterministic sampler.
        s_min: Levels below are not churned.
        s_max: Levels above are not churned.
        s_noise: Standard deviation of the added noise, in units of what the level needs; 1 is exact.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.s_churn >= 0 and 0 <= self.s_min < self.s_max and self.s_noise > 0):
            raise UserError(
                "the churn settings of Heun's method are not valid",
                got=self,
                expected="s_churn >= 0, 0 <= s_min < s_max, s_noise > 0 (1 if not tuned)",
            )

    @property
    def stochastic(self) -> bool:
        """With churn."""
        return self.s_churn > 0

    def calls(self, levels: tuple[float, ...]) -> int:
        """Two a step, and one for a step to 0."""
        return sum(1 if after == 0 else 2 for _, after in pairwise(levels))

    def last(self, run: Run, k: int, y: Tensor) -> Tensor:
        """Churns before the last step too."""
        return run.denoise(*self._churned(run, k, y))

    def _churned(self, run: Run, k: int, y: Tensor) -> tuple[Tensor, float]:
        """The state with noise added, and its level."""
        now, gamma = run.levels[k], min(self.s_churn / run.steps, math.sqrt(2) - 1)
        if not (gamma > 0 and self.s_min <= now <= self.s_max):
            return y, now
        raised = (1 + gamma) * now
        return y.add(run.normal(k, 0), alpha=self.s_noise * math.sqrt(raised**2 - now**2)), raised

    def stepper(self, run: Run) -> Stepper:
        """Churn, an Euler step, and its correction."""

        def step(k: int, y: Tensor) -> Tensor:
            y, now = self._churned(run, k, y)
            after = run.levels[k + 1]
            if 0 < _PURE * run.sigma_data < max(now, after):
                return _in_flow_time(run, y, now, after, TABLEAUX["heun2"])
            slope = run.eps(y, now)
            ahead = y.add(slope, alpha=after - now)
            return y.add(slope + run.eps(ahead, after), alpha=0.5 * (after - now))

        return step
