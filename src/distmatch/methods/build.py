"""From a choice to the method that carries it out."""

from __future__ import annotations

from distmatch.methods.consistency.build import build_consistency
from distmatch.methods.matching.backtrack import Backtracking
from distmatch.methods.matching.fisher_objectives import SIM, SiD, UniInstruct
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.pairs import PairRegression
from distmatch.methods.matching.score import ScoreDifference
from distmatch.methods.matching.view import Objective
from distmatch.methods.setup import Distiller, Setup


def build_method(setup: Setup) -> Distiller:
    """The method of a set-up; everything that does not fit is refused here, before anything is trained.

    Raises:
        UserError: Teacher, method and settings do not go together.
    """
    if setup.method.family == "consistency":
        return build_consistency(setup)
    return _matching(setup)


def _matching(setup: Setup) -> Distiller:
    terms = (PairRegression(setup),) if setup.method.name == "dmd" else ()
    base = Matching(setup, _objective(setup), terms)
    return Backtracking(base) if setup.matching.backtrack else base


def _objective(setup: Setup) -> Objective:
    own, scaling = setup.matching, setup.config.scaling
    match setup.method.name:
        case "sid" | "sida":
            return SiD(own.sid_alpha, scaling)
        case "sim":
            return SIM(own.sim_distance, own.sim_c, scaling)
        case "uni-instruct":
            return UniInstruct(setup.divergence, own.ratio_gradient, own.ratio_warmup, scaling)
        case _:
            return ScoreDifference(setup.divergence if setup.method.weighted else None, scaling)
