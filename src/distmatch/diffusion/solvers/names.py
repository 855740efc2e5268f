"""Solvers by name, with options after colons: ``"heun"``, ``"ddim:0.5"``, ``"rhork:kutta3"``."""

from __future__ import annotations

import re
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
from distmatch.diffusion.solvers.unipc import UniPC

Options = tuple[tuple[str, Callable[[str], Any]], ...]


def _deis(order: int = 2) -> Solver:
    return Adams(order - 1, "log-rho")


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
    "deis": (_deis, (("order", int),)),
    "unipc": (UniPC, (("order", int),)),
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

ALIASES: Mapping[str, str] = {
    "dpmpp": "dpmpp-2m",
    "dpmpp-multistep": "dpmpp-2m",
    "dpmpp2m": "dpmpp-2m",
    "dpmpp2m-sde": "dpmpp-2m-sde",
    "sde-dpmpp": "dpmpp-2m-sde",
    "euler-a": "ddim:1",
    "euler-ancestral": "ddim:1",
    "ddpm": "ddim:1",
    "uni-pc": "unipc",
    "unipc-bh2": "unipc",
    "dopri5": "rk45",
}
"""What papers, diffusers and k-diffusion call some of them, after :func:`canonical_name`."""


def canonical_name(name: str) -> str:
    """The name in :data:`SOLVERS` for a name used in the field, or the name in lower case.

    Spaces and underscores count as hyphens, and "DPM-Solver++" and "DPM++" as "dpmpp": ``"DPM++ 2M SDE"``,
    ``"dpmpp_2m_sde"`` and ``"sde-dpmsolver++"`` are one solver.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = re.sub(r"dpm-?(solver-?)?\+\+", "dpmpp", plain)
    return ALIASES.get(plain, plain)


def find_solver(solver: str | Solver) -> Solver:
    """The solver of a name, or the solver itself.

    Args:
        solver: A solver, or a name of :data:`SOLVERS` or :func:`canonical_name` with options after colons.

    Raises:
        UserError: The name is unknown, or its options are not those it takes.
    """
    if isinstance(solver, Solver):
        return solver
    asked, *options_given = str(solver).split(":")
    name, *fixed = canonical_name(asked).split(":")
    given = fixed + options_given
    if name not in SOLVERS:
        raise unknown_name("solver", asked, SOLVERS)
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
