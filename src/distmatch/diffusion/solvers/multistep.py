"""Solvers that remember earlier calls: Adams-Bashforth in t, rho or log rho (DEIS), iPNDM, DPM-Solver++."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.paths import NoisePath
from distmatch.diffusion.solvers.onestep import combined
from distmatch.diffusion.solvers.run import Run, Solver, Stepper, remembered

AB = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth weights for even steps, the latest slope first."""


class LinearMultistep:
    """y' = y + sum_j w_kj eps_{k-j}.

    Attributes:
        history: Earlier slopes, the latest first. A row of weights that is shorter leaves the rest out.
    """

    def __init__(self, run: Run, weights: Sequence[tuple[float, ...]]) -> None:
        self.run, self.weights = run, weights
        self.history: deque[Tensor] = deque(maxlen=max(map(len, weights)))

    def __call__(self, k: int, y: Tensor) -> Tensor:
        """Step ``k``."""
        self.history.appendleft(self.run.eps(y, self.run.levels[k]))
        return combined(y, self.weights[k], self.history)


@dataclass(frozen=True)
class Adams(Solver):
    """Variable-step Adams-Bashforth: tAB, rhoAB and log-rho-AB of DEIS (Zhang and Chen 2023).

    The slopes eps are taken for a polynomial through the last ``degree + 1`` of them, in the path's time t
    (tAB), in rho (rhoAB) or in log rho (the DEIS of diffusers), which is integrated exactly. The degree ramps
    up over the first steps; that one Euler step at the start keeps the asymptotic order at 2 for every degree
    from 1 on.

    Attributes:
        degree: Degree of the polynomial; 0 is Euler.
        variable: What it is a polynomial in.
    """

    degree: int = 2
    variable: Literal["t", "rho", "log-rho"] = "rho"

    def __post_init__(self) -> None:
        check_count("the degree of an Adams-Bashforth solver", self.degree, 0, 5)
        check_name("variable of an Adams-Bashforth solver", self.variable, ("t", "rho", "log-rho"))

    @property
    def least_steps(self) -> int:
        """One more than the degree."""
        return self.degree + 1

    @property
    def needs_path(self) -> bool:
        """For tAB."""
        return self.variable == "t"

    def stepper(self, run: Run) -> LinearMultistep:
        """One call a step."""
        path = run.path if self.variable == "t" else None
        if self.variable == "t" and path is None:
            raise UserError(
                "tAB fits a polynomial in a path's time",
                got="no path",
                fix='pass path="vp" (or the teacher\'s own path), or use "rhoab", which needs no path',
            )
        log = self.variable == "log-rho"
        return LinearMultistep(run, adams_weights(path, run.levels, self.degree, run.restarts, log=log))


@lru_cache(maxsize=64)
def adams_weights(
    path: NoisePath | None,
    levels: tuple[float, ...],
    degree: int,
    restarts: frozenset[int] = frozenset(),
    *,
    log: bool = False,
) -> tuple[tuple[float, ...], ...]:
    """The weights C_kj = integral of L_kj(t(rho)) d rho over step k, L being the Lagrange basis on the nodes.

    Integrated by 32-point Gauss-Legendre in log rho, where t is smooth on every path. (In t it would not
    be: on the VP path rho ~ sqrt(t) at the data end.)

    Args:
        path: The path whose time the polynomials are in; None for rho.
        levels: The grid.
        degree: Degree of the polynomials, less over the first steps.
        restarts: Steps from which on the slopes before are of another model: the degree ramps up again.
        log: Without a path, take the polynomials in log rho.

    Returns:
        For each step with a positive end, its weights, the latest slope first.

    Raises:
        UserError: The path has no distinct times for the levels.
    """
    rho = np.array([v for v in levels if v > 0])

    def time(r: np.ndarray) -> np.ndarray:
        if path is None:
            return np.log(r) if log else r
        return path.t_of_rho(torch.from_numpy(r)).numpy()

    t = time(rho)
    if not (np.isfinite(t).all() and (np.diff(t) != 0).all()):
        raise UserError(
            "the grid exceeds the path, which has no time for each noise level",
            got=f"levels {rho.min():g} to {rho.max():g}",
            expected="levels between the path's rho_min and rho_max",
            fix='choose the grid inside that range, or use "rhoab", which needs no path',
        )
    nodes, weights = np.polynomial.legendre.leggauss(32)
    low, high = np.log(rho[:-1, None]), np.log(rho[1:, None])
    inner = np.exp((low + high) / 2 + (high - low) / 2 * nodes)  # (steps, 32)
    measure = (high - low) / 2 * weights * inner
    within = time(inner.reshape(-1)).reshape(inner.shape)
    table = []
    for k, earlier in enumerate(remembered(len(rho) - 1, degree, restarts)):
        near = t[k - earlier : k + 1][::-1]
        row = []
        for j, node in enumerate(near):
            others = np.delete(near, j)
            basis = ((within[k, :, None] - others) / (node - others)).prod(-1)
            row.append(float(basis @ measure[k]))
        # The basis sums to 1: what is left of rounding goes where it keeps constant slopes exact.
        row[0] += rho[k + 1] - rho[k] - math.fsum(row)
        table.append(tuple(float(w) for w in row))
    return tuple(table) or ((0.0,),)


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM: the DDIM step on the Adams-Bashforth mean of the last slopes, with the weights for even steps.

    Attributes:
        order: Slopes in the mean, 1 to 4.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_count("the order of iPNDM", self.order, 1, len(AB))

    def stepper(self, run: Run) -> LinearMultistep:
        """One call a step."""
        rows = [
            tuple((run.levels[k + 1] - run.levels[k]) * w for w in AB[earlier])
            for k, earlier in enumerate(remembered(run.steps, self.order - 1, run.restarts))
        ]
        return LinearMultistep(run, rows)


@dataclass(frozen=True)
class DPMpp(Solver):
    """DPM-Solver++ (Lu et al. 2022) of order 1 or 2 (the multistep 2M), optionally with heavy ball.

    With h = log(s / s') and r = h_before / h: y' = (s'/s) y + (1 - s'/s) D~,
    D~ = (1 + 1/(2r)) D - D_before / (2r). Order 1 takes D itself.

    Attributes:
        order: 1 or 2.
        beta: Heavy ball (Wizadwongsa et al. 2024): D~ is replaced by v <- (1 - beta) v + beta D~; 1 is none.
        low_end: With fewer steps than this the last step is of order 1, which steadies short runs.
    """

    order: int = 2
    beta: float = 1.0
    low_end: int = 15

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UserError("DPM-Solver++ is available in orders 1 and 2", got=self.order)
        check_number("the beta of heavy ball", self.beta, "(0, 1]")

    def stepper(self, run: Run) -> Stepper:
        """One call a step."""
        before: Tensor | None = None
        velocity: Tensor | None = None

        def step(k: int, y: Tensor) -> Tensor:
            nonlocal before, velocity
            now, after = run.levels[k], run.levels[k + 1]
            target = clean = run.denoise(y, now)
            low = k == run.steps - 1 and run.steps < self.low_end
            if self.order == 2 and before is not None and not low:
                share = 0.5 * math.log(now / after) / math.log(run.levels[k - 1] / now)
                target = clean + share * (clean - before)
            before = clean
            if self.beta < 1:
                target = target if velocity is None else (1 - self.beta) * velocity + self.beta * target
                velocity = target
            return target + (after / now) * (y - target)

        return step
