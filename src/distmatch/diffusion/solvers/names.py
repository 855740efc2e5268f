"""Solvers by name, with options after colons: ``"heun"``, ``"ddim:0.5"``, ``"rhork:kutta3"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion.solvers.adaptive import RK45
from distmatch.diffusion.solvers.momentum import GHVB, HeavyBall
from distmatch.diffusion.solvers.multistep import IPNDM, Adams, DPMpp
from distmatch.diffusion.solvers.onestep import DDIM, Heun, RhoRK
from distmatch.diffusion.solvers.run import Solver
from distmatch.diffusion.solvers.stochastic import (
    DPMppSDE,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
)

Options = tuple[tuple[str, Callable[[str], Any]], ...]

SOLVERS: Mapping[str, tuple[Callable[..., Solver], Options]] = {
    "euler": (partial(RhoRK, "euler"), ()),
    "heun": (Heun, (("s_churn", float),)),
    "ddim": (DDIM, (("eta", float),)),
    "dpmpp-1": (partial(DPMpp, 1), ()),
    "dpmpp-2m": (partial(DPMpp, 2), ()),
    "dpmpp-sde": (partial(DPMppSDE, 1), ()),
    "dpmpp-2m-sde": (partial(DPMppSDE, 2), ()),
    "tab": (partial(Adams, variable="t"), (("degree", int),)),
    "rhoab": (partial(Adams, variable="rho"), (("degree", int),)),
    "rhork": (RhoRK, (("tableau", str),)),
    "ipndm": (IPNDM, (("order", int),)),
    "hb": (HeavyBall, (("beta", float), ("order", int))),
    "hb-2m": (partial(DPMpp, 2), (("beta", float),)),
    "ghvb": (GHVB, (("order", float),)),
    "euler-maruyama": (EulerMaruyama, (("ratio", float),)),
    "reverse-diffusion": (ReverseDiffusion, ()),
    "pc": (PredictorCorrector, (("snr", float), ("corrections", int))),
    "rk45": (RK45, (("rtol", float), ("atol", float))),
}
"""Each name's class and the options that may follow it, in their order."""


def find_solver(solver: str | Solver) -> Solver:
    """The solver of a name, or the solver itself.

    Args:
        solver: A solver, or a name of :data:`SOLVERS` with options after colons.

    Raises:
        UserError: The name is unknown, or its options are not those it takes.
    """
    if isinstance(solver, Solver):
        return solver
    name, *given = str(solver).split(":")
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    build, options = SOLVERS[name]
    form = ":".join([name, *(f"[{option}]" for option, _ in options)])
    if len(given) > len(options):
        raise UserError(f"too many options for the solver {name}", got=solver, expected=form)
    values = {}
    for (option, kind), text in zip(options, given, strict=False):
        try:
            values[option] = kind(text)
        except ValueError as error:
            raise UserError(
                f"the option {option} of the solver {name} is not a number", got=solver, expected=form
            ) from error
    return build(**values)
