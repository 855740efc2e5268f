"""From a choice to the method that carries it out."""

from __future__ import annotations

from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.score import ScoreDifference
from distmatch.methods.setup import Distiller, Setup


def build_method(setup: Setup) -> Distiller:
    """The method of a set-up; everything that does not fit is refused here, before anything is trained.

    Raises:
        UserError: Teacher, method and settings do not go together.
    """
    return _matching(setup)


def _matching(setup: Setup) -> Matching:
    divergence = setup.divergence if setup.method.weighted else None
    return Matching(setup, ScoreDifference(divergence, setup.config.scaling))
