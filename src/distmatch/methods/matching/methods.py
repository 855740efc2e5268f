"""The methods with a fake score. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distmatch.methods.matching import settings as own
from distmatch.methods.method import Method

if TYPE_CHECKING:
    from distmatch.methods.context import Context, Distiller
    from distmatch.methods.matching.scores import MatchingObjective


def _matching(
    context: Context[own.BacktrackSettings], objective: MatchingObjective, **options: Any
) -> Distiller:
    """The loop around an objective, along recorded copies of the teacher where they are wanted."""
    from distmatch.methods.matching.backtrack import Backtracking, backtrack_path
    from distmatch.methods.matching.loop import Matching

    base = Matching(context, objective, **options)
    return Backtracking(base, backtrack_path(context)) if context.settings.backtrack else base


def _f_distill(context: Context[own.FDistillSettings]) -> Distiller:
    from distmatch.methods.matching.score import ScoreDifference

    return _matching(context, ScoreDifference(context.divergence, context.settings.scaling))


def _score_difference(context: Context[own.BacktrackSettings]) -> Distiller:
    from distmatch.methods.matching.score import ScoreDifference

    return _matching(context, ScoreDifference(None, context.settings.scaling))


def _dmd(context: Context[own.DMDSettings]) -> Distiller:
    from distmatch.methods.matching.pairs import PairRegression
    from distmatch.methods.matching.score import ScoreDifference

    return _matching(
        context, ScoreDifference(None, context.settings.scaling), terms=(PairRegression(context),)
    )


def _sid(context: Context[own.SiDSettings]) -> Distiller:
    from distmatch.methods.matching.fisher import SiD

    scaled = isinstance(context.settings, own.SiDASettings)
    return _matching(
        context, SiD(context.settings.sid_alpha, context.settings.scaling), scaled_adversary=scaled
    )


def _sim(context: Context[own.SIMSettings]) -> Distiller:
    from distmatch.methods.matching.fisher import SIM

    chosen = context.settings
    return _matching(context, SIM(chosen.sim_distance, chosen.sim_c, chosen.scaling))


def _uni_instruct(context: Context[own.UniInstructSettings]) -> Distiller:
    from distmatch.methods.matching.fisher import UniInstruct

    chosen = context.settings
    objective = UniInstruct(context.divergence, chosen.ratio_gradient, chosen.ratio_warmup, chosen.scaling)
    return _matching(context, objective)


def _moment_matching(context: Context[own.MomentMatchingSettings]) -> Distiller:
    from distmatch.methods.matching.loop import Matching
    from distmatch.methods.matching.moments import MomentMatching

    objective = MomentMatching(context.guided(), context.settings.scaling)
    return Matching(context, objective, sampler="posterior")


METHODS = (
    Method(
        name="f-distill",
        family="matching",
        summary="any f-divergence: score difference weighted by h(r), plus an adversarial term",
        citation="Xu et al. 2025, arXiv 2502.15681",
        limits="the ratio is only as good as its discriminator; large weights need large batches",
        settings=own.FDistillSettings,
        build=_f_distill,
        divergences="any",
    ),
    Method(
        name="dmd2",
        family="matching",
        summary="reverse KL: unweighted score difference plus an adversarial term",
        citation="Yin et al. 2024, arXiv 2405.14867",
        limits="reverse KL drops modes; the adversarial term has to restore them",
        settings=own.DMD2Settings,
        build=_score_difference,
        divergences="reverse_kl",
    ),
    Method(
        name="diff-instruct",
        family="matching",
        summary="reverse KL: unweighted score difference alone; needs no data",
        citation="Luo et al. 2023, arXiv 2305.18455",
        limits="reverse KL drops modes, and no other term restores them",
        settings=own.DiffInstructSettings,
        build=_score_difference,
        data="no",
        divergences="reverse_kl",
    ),
    Method(
        name="dmd",
        family="matching",
        summary="reverse KL plus regression on pairs of noise and teacher sample; needs no data",
        citation="Yin et al. 2023, arXiv 2311.18828",
        limits="pairs need many teacher calls before the first step; compared by pixels, not by LPIPS",
        settings=own.DMDSettings,
        build=_dmd,
        data="no",
        divergences="reverse_kl",
    ),
    Method(
        name="disback",
        family="matching",
        summary="dmd2 along recorded copies of the teacher, degraded towards the untrained student",
        citation="Zhang et al. 2024, arXiv 2408.15991",
        limits="keeps --backtrack minus 1 copies of the network in memory; the student is fixed at the start",
        settings=own.DisBackSettings,
        build=_score_difference,
        divergences="reverse_kl",
    ),
    Method(
        name="sid",
        family="matching",
        summary="Fisher divergence by score identities; needs no data",
        citation="Zhou et al. 2024, arXiv 2404.04057",
        limits="differentiates the teacher with respect to its input; its loss is negative and does not "
        "measure progress",
        settings=own.SiDSettings,
        build=_sid,
        data="no",
        teacher_gradient=True,
    ),
    Method(
        name="sida",
        family="matching",
        summary="sid with an adversarial term on features of the fake score",
        citation="Zhou et al. 2024, arXiv 2410.14919",
        limits="differentiates the teacher with respect to its input; the discriminator shares the fake "
        "score's network",
        settings=own.SiDASettings,
        build=_sid,
        teacher_gradient=True,
    ),
    Method(
        name="sim",
        family="matching",
        summary="any distance between the scores, with the distribution of samples held fixed; needs no data",
        citation="Luo et al. 2024, arXiv 2410.16794",
        limits="differentiates the teacher with respect to its input; its loss does not measure progress",
        settings=own.SIMSettings,
        build=_sim,
        data="no",
        teacher_gradient=True,
    ),
    Method(
        name="uni-instruct",
        family="matching",
        summary="any f-divergence of clean samples, by its expansion over noise levels; adversarial term",
        citation="Wang et al. 2025, arXiv 2505.20755",
        limits="differentiates teacher and discriminator with respect to their input; only as good as "
        "the ratio",
        settings=own.UniInstructSettings,
        build=_uni_instruct,
        teacher_gradient=True,
        divergences="any",
        default_divergence="kl",
    ),
    Method(
        name="moment-matching",
        family="matching",
        summary="posterior means of student and teacher agree between the noise levels of its steps; "
        "needs no data",
        citation="Salimans et al. 2024, arXiv 2406.04103",
        limits="for few-step students: with one step it is diff-instruct; one more teacher call in fake "
        "score steps",
        settings=own.MomentMatchingSettings,
        build=_moment_matching,
        data="no",
    ),
)
