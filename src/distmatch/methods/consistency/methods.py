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
        summary="pairs of points on a trajectory, ever closer, must map to the same sample (CM, ECT)",
        citation="Song et al. 2023, arXiv 2303.01469; Geng et al. 2024, arXiv 2406.14548",
        limits="errors accumulate over the pairs; samples are softer than the teacher's",
        settings=own.ConsistencySettings,
        build=_consistency,
    ),
    Method(
        name="scm",
        family="consistency",
        summary="the limit of ever closer pairs: the derivative along the trajectory, normalized, is "
        "driven to zero",
        citation="Lu and Song 2024, arXiv 2410.11081",
        limits="the value of its loss is uninformative; unstable at noise levels where the teacher was "
        "hardly trained",
        settings=own.SCMSettings,
        build=_scm,
        forward_mode=True,
    ),
    Method(
        name="ctm",
        family="consistency",
        summary="jumps between any two noise levels agree with the teacher's trajectory and shorter jumps",
        citation="Kim et al. 2024, arXiv 2310.02279",
        limits="needs a built-in network; compares samples by pixels, not by LPIPS",
        settings=own.CTMSettings,
        build=_ctm,
    ),
    Method(
        name="mean-flow",
        family="consistency",
        summary="the average velocity between any two noise levels, from the MeanFlow identity",
        citation="Geng et al. 2025, arXiv 2505.13447",
        limits="needs a built-in network; noisy where the derivative is large, so needs small learning rates",
        settings=own.MeanFlowSettings,
        build=_mean_flow,
        forward_mode=True,
    ),
    Method(
        name="rcm",
        family="consistency",
        summary="the loss of scm for coverage plus a score difference for sharpness",
        citation="Zheng et al. 2025, arXiv 2510.08431",
        limits="three networks and the derivative: the most expensive step of the family",
        settings=own.RCMSettings,
        build=_rcm,
        forward_mode=True,
    ),
)
