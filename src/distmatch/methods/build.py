"""From a choice to the method that carries it out."""

from __future__ import annotations

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import require_input_gradient, require_score
from distmatch.methods.consistency.settings import (
    ConsistencySettings,
    CTMSettings,
    FlowSettings,
    LevelSettings,
    RCMSettings,
)
from distmatch.methods.settings import GuidedSettings, NoiseLawSettings, Settings
from distmatch.methods.setup import Distiller, Setup


def build_method(setup: Setup[Settings]) -> Distiller:
    """The method of a set-up; everything that does not fit is refused here, before anything is trained.

    Raises:
        UserError: Teacher, method and settings do not go together.
    """
    _check_levels(setup)
    _refuse_idle(setup.settings)
    if setup.method.family == "consistency":
        require_score(setup.teacher, "a path of samples with Gaussian noise")
    if setup.method.teacher_gradient:
        require_input_gradient(setup.teacher, setup.method.name, setup.device)
    built: Distiller = setup.method.build(setup)
    return built


def _check_levels(setup: Setup[Settings]) -> None:
    teacher = setup.teacher
    low, high, data = teacher.sigma_min, teacher.sigma_max, teacher.sigma_data
    if not low < setup.first_level <= high:
        raise UserError(
            "the student must start at a noise level that the teacher knows",
            got=f"--student-sigma {setup.settings.student_sigma:g}, in units of sigma_data = {data:.4g}",
            expected=f"above {low / data:.4g} and up to {high / data:.4g}, or 0 for that",
        )


def _refuse_idle(own: Settings) -> None:
    """Refuses settings that other settings leave without effect."""
    idle: dict[str, tuple[str, ...]] = {}
    if isinstance(own, NoiseLawSettings):
        if own.noise_law != "karras":
            idle["--noise-law log-normal"] = ("noise_rho",)
        elif own.critic_law == "same":
            idle["--noise-law karras and --critic-law same"] = ("noise_mean", "noise_std")
    if isinstance(own, LevelSettings) and own.level_law == "karras":
        idle["--level-law karras"] = ("level_mean", "level_std")
    if isinstance(own, FlowSettings) and own.consistency_from == "data":
        if isinstance(own, GuidedSettings) and own.guidance != 1:
            raise UserError(
                "a student of the data's flow has no teacher to guide",
                got=f"--guidance {own.guidance}",
                fix="use --consistency-from teacher, or leave --guidance at 1",
            )
        if isinstance(own, ConsistencySettings):
            idle["--consistency-from data"] = ("teacher_solver", "solver_steps")
    if isinstance(own, CTMSettings) and own.gan_weight == 0:
        idle["--gan-weight 0"] = ("gan_after",)
    if isinstance(own, RCMSettings) and own.dmd_weight == 0:
        idle["--dmd-weight 0"] = ("dmd_after",)
    for reason, names in idle.items():
        for name in names:
            if (value := getattr(own, name)) != getattr(type(own), name):
                raise UserError(
                    f"--{name.replace('_', '-')} does nothing with {reason}",
                    got=value,
                    fix="leave it out, or change the other",
                )
