"""The methods that minimize one loss of one network along paths. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distmatch.methods.consistency import settings as own
from distmatch.methods.method import Method

if TYPE_CHECKING:
    from distmatch.methods.context import Context, Distiller


def _consistency(context: Context[own.ConsistencySettings]) -> Distiller:
    from distmatch.methods.consistency.cm import PairTerm
    from distmatch.methods.consistency.direct import Direct

    return Direct(context, PairTerm(context))


def _scm(context: Context[own.SCMSettings]) -> Distiller:
    from distmatch.methods.consistency.direct import Direct
    from distmatch.methods.consistency.scm import TangentTerm

    return Direct(context, TangentTerm(context))


def _ctm(context: Context[own.CTMSettings]) -> Distiller:
    from distmatch.methods.consistency.ctm import TrajectoryTerm
    from distmatch.methods.consistency.direct import Direct

    return Direct(context, TrajectoryTerm(context))


def _mean_flow(context: Context[own.MeanFlowSettings]) -> Distiller:
    from distmatch.methods.consistency.direct import Direct
    from distmatch.methods.consistency.mean_flow import AverageVelocityTerm

    return Direct(context, AverageVelocityTerm(context))


def _rcm(context: Context[own.RCMSettings]) -> Distiller:
    from distmatch.methods.consistency.rcm import build_rcm

    return build_rcm(context)


METHODS = (
    Method(
        name="consistency",
        family="consistency",
        summary="pairs of levels on one path, ever closer, must lead to the same sample (CM, ECT)",
        citation="Song et al. 2023, arXiv 2303.01469; Geng et al. 2024, arXiv 2406.14548",
        limits="errors add up from pair to pair; samples are softer than the teacher's",
        settings=own.ConsistencySettings,
        build=_consistency,
    ),
    Method(
        name="scm",
        family="consistency",
        summary="the limit of ever closer pairs: the derivative along the path, bounded, is brought to zero",
        citation="Lu and Song 2024, arXiv 2410.11081",
        limits="the value of its loss says nothing; unsteady at levels the teacher was hardly trained on",
        settings=own.SCMSettings,
        build=_scm,
        forward_mode=True,
    ),
    Method(
        name="ctm",
        family="consistency",
        summary="jumps between any two levels agree with the teacher's path and shorter jumps",
        citation="Kim et al. 2024, arXiv 2310.02279",
        limits="needs a network of ours; compares samples by pixels, not by LPIPS",
        settings=own.CTMSettings,
        build=_ctm,
    ),
    Method(
        name="mean-flow",
        family="consistency",
        summary="the average velocity between any two levels, from the identity that it obeys",
        citation="Geng et al. 2025, arXiv 2505.13447",
        limits="needs a network of ours; noisy where the derivative is large, so small learning rates",
        settings=own.MeanFlowSettings,
        build=_mean_flow,
        forward_mode=True,
    ),
    Method(
        name="rcm",
        family="consistency",
        summary="scm, which covers, with a score difference, which sharpens",
        citation="Zheng et al. 2025, arXiv 2510.08431",
        limits="three networks and the derivative: the dearest step of the family",
        settings=own.RCMSettings,
        build=_rcm,
        forward_mode=True,
    ),
)
