"""From a choice to the method that carries it out."""

from __future__ import annotations

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import require_input_gradient
from distmatch.methods.config import DistillConfig
from distmatch.methods.consistency.build import build_consistency
from distmatch.methods.consistency.direct import Direct, guided_teacher
from distmatch.methods.kernel.imm import InductiveMatching
from distmatch.methods.kernel.mmd import ChainMMD
from distmatch.methods.matching.backtrack import Backtracking
from distmatch.methods.matching.fisher import SIM, SiD, UniInstruct
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.moments import MomentMatching
from distmatch.methods.matching.pairs import PairRegression
from distmatch.methods.matching.score import ScoreDifference
from distmatch.methods.matching.scores import MatchingObjective
from distmatch.methods.setup import Distiller, Setup
from distmatch.methods.transport.dpm_ot import Transport


def build_method(setup: Setup) -> Distiller:
    """The method of a set-up; everything that does not fit is refused here, before anything is trained.

    Raises:
        UserError: Teacher, method and settings do not go together.
    """
    _check_levels(setup)
    if setup.method.critic:
        _refuse_idle_laws(setup.config)
    if setup.method.teacher_gradient:
        require_input_gradient(setup.teacher, setup.method.name, setup.device)
    match setup.method.family:
        case "consistency":
            return build_consistency(setup)
        case "kernel":
            return Direct(setup, ChainMMD(setup) if setup.method.name == "mmd" else InductiveMatching(setup))
        case "transport":
            return Transport(setup)
        case _:
            return _matching(setup)


def _check_levels(setup: Setup) -> None:
    teacher, cfg = setup.teacher, setup.config
    low, high, data = teacher.sigma_min, teacher.sigma_max, teacher.sigma_data
    if not low < setup.first_level <= high:
        raise UserError(
            "the student must start at a noise level that the teacher knows",
            got=f"--student-sigma {cfg.student_sigma:g}, in units of sigma_data = {data:.4g}",
            expected=f"above {low / data:.4g} and up to {high / data:.4g}, or 0 for that",
        )
    first, last = setup.compared_levels
    if setup.method.critic and not first < last:
        raise UserError(
            "student and teacher are compared between two noise levels",
            got=f"--noise-low {first / data:.4g} and --noise-high {last / data:.4g}, in units of sigma_data",
            expected="the first one below the second",
        )


def _refuse_idle_laws(config: DistillConfig) -> None:
    """Refuses settings of a law of noise levels that is not in use."""
    idle, reason = ["noise_rho"], "--noise-law log-normal"
    if config.noise_law == "karras":
        idle, reason = ["noise_mean", "noise_std"], "--noise-law karras and --critic-law same"
        if config.critic_law != "same":
            return
    for name in idle:
        if (value := getattr(config, name)) != getattr(DistillConfig, name):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing with {reason}",
                got=value,
                fix="leave it out, or choose another law",
            )


def _matching(setup: Setup) -> Distiller:
    terms = (PairRegression(setup),) if setup.method.name == "dmd" else ()
    moments = setup.method.name == "moment-matching"
    base = Matching(
        setup,
        _objective(setup),
        terms,
        chain="posterior" if moments else "renoise",
        scaled_adversary=setup.method.name == "sida",
    )
    if moments and setup.matching.backtrack:
        raise UserError(
            "moment-matching draws its fake score to the teacher and cannot follow recorded ones",
            got=f"--backtrack {setup.matching.backtrack}",
            fix="leave it out, or take diff-instruct",
        )
    return Backtracking(base) if setup.matching.backtrack else base


def _objective(setup: Setup) -> MatchingObjective:
    own, scaling = setup.matching, setup.config.scaling
    match setup.method.name:
        case "sid" | "sida":
            return SiD(own.sid_alpha, scaling)
        case "sim":
            return SIM(own.sim_distance, own.sim_c, scaling)
        case "uni-instruct":
            return UniInstruct(setup.divergence, own.ratio_gradient, own.ratio_warmup, scaling)
        case "moment-matching":
            return MomentMatching(guided_teacher(setup), scaling)
        case _:
            return ScoreDifference(setup.divergence if setup.method.weighted else None, scaling)
