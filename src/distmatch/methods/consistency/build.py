"""From a choice to a method of the family."""

from __future__ import annotations

from dataclasses import fields

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import require_score
from distmatch.methods.consistency.cm import PairTerm
from distmatch.methods.consistency.ctm import TrajectoryTerm
from distmatch.methods.consistency.direct import Direct, Term
from distmatch.methods.consistency.mean_flow import AverageVelocityTerm
from distmatch.methods.consistency.rcm import build_rcm
from distmatch.methods.consistency.scm import TangentTerm
from distmatch.methods.setup import Distiller, Setup
from distmatch.methods.start import has_network
from distmatch.nets.jump import require_jump

_TERMS: dict[str, type[PairTerm] | type[TangentTerm] | type[TrajectoryTerm] | type[AverageVelocityTerm]] = {
    "consistency": PairTerm,
    "scm": TangentTerm,
    "ctm": TrajectoryTerm,
    "mean-flow": AverageVelocityTerm,
}


def build_consistency(setup: Setup) -> Distiller:
    """The method of a set-up; what does not fit is refused here, before anything is trained.

    Raises:
        UserError: Guidance of a teacher that is not followed, a teacher without a score, or a network without
            a second level for a method of jumps.
    """
    name = setup.method.name
    require_score(setup.teacher, "a path of samples with Gaussian noise")
    follows_data = setup.consistency.consistency_from == "data"
    if follows_data and setup.config.guidance != 1:
        raise UserError(
            "a student of the data's flow has no teacher to guide",
            got=f"--guidance {setup.config.guidance}",
            fix="use --consistency-from teacher, or leave --guidance at 1",
        )
    _refuse_idle(setup)
    if name == "rcm":
        return build_rcm(setup)
    term: Term = _TERMS[name](setup)
    if term.jumps and has_network(setup.teacher):
        require_jump(setup.teacher)
    return Direct(setup, term)


def _refuse_idle(setup: Setup) -> None:
    """Refuses settings that other settings leave without effect."""
    own, usual = setup.consistency, {f.name: f.default for f in fields(setup.consistency)}
    usual |= setup.method.defaults
    idle = {
        "level_law karras": ("level_mean", "level_std") if own.level_law == "karras" else (),
        "consistency_from data": ("teacher_solver", "solver_steps") if own.consistency_from == "data" else (),
        "gan_weight 0": ("gan_after",) if setup.config.gan_weight == 0 else (),
        "dmd_weight 0": ("dmd_after",) if own.dmd_weight == 0 else (),
    }
    for reason, names in idle.items():
        for name in names:
            if getattr(own, name) != usual[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} does nothing with --{reason.replace('_', '-')}",
                    got=getattr(own, name),
                    fix="leave it out, or change the other",
                )
