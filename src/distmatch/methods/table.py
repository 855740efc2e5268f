"""The methods by name: what each needs, what it can do, where it comes from. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distmatch.base.errors import UserError, unknown_name
from distmatch.methods.config import DistillConfig

Need = Literal["no", "optional", "needed"]

CRITIC_SETTINGS = (
    *("critic_steps", "order", "warmup_steps", "lr_critic"),
    *("noise_low", "noise_high", "noise_rho", "scaling"),
)
"""Settings of DistillConfig that only methods with a fake score read."""
RATIO_SETTINGS = (
    *("lr_ratio", "gan_weight", "r1", "ratio_features", "joint_weight"),
    *("ratio_bins", "ratio_memory", "ratio_min_count", "ratio_clip"),
)
"""Settings of DistillConfig that only methods with a discriminator read."""

_LEVEL_SETTINGS = ("level_law", "level_mean", "level_std")
_PAIR_SETTINGS = ("huber", "teacher_solver", "solver_steps")
_TANGENT_SETTINGS = ("tangent", "tangent_warmup", "tangent_bound")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named method.

    Attributes:
        name: What the user types.
        family: ``matching``, ``consistency``, ``kernel`` or ``transport``: the code that carries it out.
        summary: One line for help texts.
        citation: Authors, year and arXiv number.
        limits: What it cannot do, in a sentence.
        data: Whether it needs real data.
        critic: Whether a fake score is trained beside the student.
        weighted: Whether a density ratio weights its gradient.
        adversarial: Whether an adversarial term is part of it.
        teacher_gradient: Whether gradients flow through the teacher's input: more memory and time.
        forward_mode: Whether it needs forward-mode derivatives of the student.
        divergences: ``any``; a name; or '' for a method that minimises no f-divergence.
        default_divergence: Of those with ``any``.
        uses: Further settings of other groups that it reads, beyond those of its family and its flags; and
            those of its family that only methods read which name them here.
        ignores: Further settings that all methods share and that it does not read.
        defaults: Its own default values of settings, by field name.
    """

    name: str
    family: Literal["matching", "consistency", "kernel", "transport"]
    summary: str
    citation: str
    limits: str = ""
    data: Need = "needed"
    critic: bool = True
    weighted: bool = False
    adversarial: bool = False
    teacher_gradient: bool = False
    forward_mode: bool = False
    divergences: str = ""
    default_divergence: str = "js"
    uses: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """What it needs, for tables."""
        names = ("data", "critic", "weighted", "adversarial", "teacher_gradient", "forward_mode")
        return {name: getattr(self, name) for name in names}


_ENTRIES = (
    Method(
        name="f-distill",
        family="matching",
        summary="any f-divergence: score difference weighted by h(r), plus an adversarial term",
        citation="Xu et al. 2025, arXiv 2502.15681",
        limits="the ratio is only as good as its discriminator; large weights need large batches",
        weighted=True,
        adversarial=True,
        divergences="any",
    ),
    Method(
        name="dmd2",
        family="matching",
        summary="reverse KL: unweighted score difference plus an adversarial term",
        citation="Yin et al. 2024, arXiv 2405.14867",
        limits="reverse KL drops modes; the adversarial term has to bring them back",
        adversarial=True,
        divergences="reverse_kl",
    ),
    Method(
        name="diff-instruct",
        family="matching",
        summary="reverse KL: unweighted score difference alone; needs no data",
        citation="Luo et al. 2023, arXiv 2305.18455",
        limits="reverse KL drops modes, and nothing brings them back",
        data="no",
        divergences="reverse_kl",
        defaults={"gan_weight": 0.0},
    ),
    Method(
        name="dmd",
        family="matching",
        summary="reverse KL plus regression on pairs of noise and teacher sample; needs no data",
        citation="Yin et al. 2023, arXiv 2311.18828",
        limits="pairs cost many teacher calls before the first step; compared by pixels, not by LPIPS",
        data="no",
        divergences="reverse_kl",
        uses=("pairs", "pair_steps", "pair_weight", "pair_loss", "pair_c"),
        defaults={"gan_weight": 0.0, "critic_steps": 1},
    ),
    Method(
        name="disback",
        family="matching",
        summary="dmd2 along recorded copies of the teacher, degraded towards the untrained student",
        citation="Zhang et al. 2024, arXiv 2408.15991",
        limits="keeps --backtrack minus 1 copies of the network in memory; the student waits at the start",
        adversarial=True,
        divergences="reverse_kl",
        defaults={"backtrack": 5},
    ),
    Method(
        name="sid",
        family="matching",
        summary="Fisher divergence by score identities; needs no data",
        citation="Zhou et al. 2024, arXiv 2404.04057",
        limits="differentiates the teacher by its input; its loss is negative and measures no progress",
        data="no",
        teacher_gradient=True,
        uses=("sid_alpha",),
        defaults={"gan_weight": 0.0},
    ),
    Method(
        name="sida",
        family="matching",
        summary="sid with an adversarial term on features of the fake score",
        citation="Zhou et al. 2024, arXiv 2410.14919",
        limits="differentiates the teacher by its input; the discriminator shares the fake score's network",
        adversarial=True,
        teacher_gradient=True,
        uses=("sid_alpha",),
        defaults={"ratio_features": "fake"},
    ),
    Method(
        name="sim",
        family="matching",
        summary="any distance between the scores, under samples held fixed; needs no data",
        citation="Luo et al. 2024, arXiv 2410.16794",
        limits="differentiates the teacher by its input; its loss measures no progress",
        data="no",
        teacher_gradient=True,
        uses=("sim_distance", "sim_c"),
        defaults={"gan_weight": 0.0},
    ),
    Method(
        name="uni-instruct",
        family="matching",
        summary="any f-divergence of clean samples, by its expansion over noise levels; adversarial term",
        citation="Wang et al. 2025, arXiv 2505.20755",
        limits="differentiates teacher and discriminator by their input; only as good as the ratio",
        weighted=True,
        adversarial=True,
        teacher_gradient=True,
        divergences="any",
        default_divergence="kl",
        uses=("ratio_gradient", "ratio_warmup"),
    ),
    Method(
        name="moment-matching",
        family="matching",
        summary="posterior means of student and teacher agree between the levels of its calls; needs no data",
        citation="Salimans et al. 2024, arXiv 2406.04103",
        limits="made for several calls: with one it is diff-instruct; one teacher call more in critic steps",
        data="no",
        defaults={"gan_weight": 0.0},
    ),
    Method(
        name="consistency",
        family="consistency",
        summary="pairs of levels on one path, ever closer, must lead to the same sample (CM, ECT)",
        citation="Song et al. 2023, arXiv 2303.01469; Geng et al. 2024, arXiv 2406.14548",
        limits="errors add up from pair to pair; samples are softer than the teacher's",
        critic=False,
        uses=("consistency_from", *_LEVEL_SETTINGS, "stages", *_PAIR_SETTINGS),
        defaults={"student_sigma": 0.0, "gan_weight": 0.0},
    ),
    Method(
        name="scm",
        family="consistency",
        summary="the limit of ever closer pairs: the derivative along the path, bounded, is brought to zero",
        citation="Lu and Song 2024, arXiv 2410.11081",
        limits="the value of its loss says nothing; the derivative costs two more passes of the student",
        critic=False,
        forward_mode=True,
        uses=("consistency_from", *_LEVEL_SETTINGS, *_TANGENT_SETTINGS),
        defaults={"student_sigma": 0.0, "gan_weight": 0.0, "level_mean": -0.3, "level_std": 1.4},
    ),
    Method(
        name="ctm",
        family="consistency",
        summary="jumps between any two levels agree with the teacher's path and shorter jumps",
        citation="Kim et al. 2024, arXiv 2310.02279",
        limits="needs a network of ours; compares samples by pixels, not by LPIPS",
        critic=False,
        adversarial=True,
        uses=(*_LEVEL_SETTINGS, *_PAIR_SETTINGS, "target_decay", "dsm_weight", "gan_after"),
        ignores=("joint_weight", "ratio_bins", "ratio_memory", "ratio_min_count", "ratio_clip"),
        defaults={"student_sigma": 0.0, "gan_weight": 0.0},
    ),
    Method(
        name="mean-flow",
        family="consistency",
        summary="the average velocity between any two levels, from the identity that it obeys",
        citation="Geng et al. 2025, arXiv 2505.13447",
        limits="needs a network of ours; noisy where the derivative is large, so small learning rates",
        critic=False,
        forward_mode=True,
        uses=(
            *("consistency_from", *_LEVEL_SETTINGS, "tangent"),
            *("to_mean", "to_std", "jump_share", "adaptive_power"),
        ),
        # Derivatives in its time grow with sigma, so that levels even in sigma^(1/7) drown it in noise.
        defaults={
            **{"student_sigma": 0.0, "gan_weight": 0.0},
            **{"level_law": "log-normal", "level_mean": -0.6, "level_std": 1.6},
        },
    ),
    Method(
        name="rcm",
        family="consistency",
        summary="scm, which covers, with a score difference, which sharpens",
        citation="Zheng et al. 2025, arXiv 2510.08431",
        limits="three networks and the derivative: the dearest step of the family",
        forward_mode=True,
        uses=(*_LEVEL_SETTINGS, *_TANGENT_SETTINGS, "dmd_weight"),
        defaults={"student_sigma": 0.0, "gan_weight": 0.0, "level_mean": 0.7, "level_std": 1.6},
    ),
    Method(
        name="mmd",
        family="kernel",
        summary="the whole chain of calls is fine-tuned by a kernel distance to real samples",
        citation="Aiello et al. 2023, arXiv 2301.07969",
        limits="flatters any metric on the features it trains on; noisy with small batches",
        critic=False,
        teacher_gradient=True,
        uses=(
            *("mmd_kernel", "mmd_features", "mmd_feature_sigma"),
            *("mmd_bandwidth", "mmd_spacing", "mmd_checkpoint"),
        ),
        ignores=("guidance",),
        defaults={"gan_weight": 0.0},
    ),
    Method(
        name="imm",
        family="kernel",
        summary="jumps from a level agree in law with jumps from just below it, by a kernel on particles",
        citation="Zhou et al. 2025, arXiv 2503.07565",
        limits="needs a network of ours; learns from the data alone, so it takes many steps",
        critic=False,
        uses=("imm_particles", "imm_halvings", "imm_offset"),
        ignores=("guidance",),
        defaults={"student_sigma": 0.0, "gan_weight": 0.0},
    ),
    Method(
        name="dpm-ot",
        family="transport",
        summary="an optimal map from noise to stored latents of the teacher, whose last calls follow",
        citation="Li et al. 2023, arXiv 2307.11308",
        limits="a finite bank: no more different layouts come out than latents are stored; several calls",
        data="no",
        critic=False,
        ignores=("guidance", "accumulate"),
        defaults={
            **{"gan_weight": 0.0, "calls": 5, "student_sigma": 1.0, "lr": 0.02},
            **{"beta2": 0.999, "lr_rampup": 0, "lr_decay": "cosine"},
        },
    ),
)
METHODS = {method.name: method for method in _ENTRIES}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: There is none.
    """
    key = name.strip().lower().replace("_", "-")
    if key not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[key]


def with_defaults(method: Method, *groups: Any) -> tuple[Any, ...]:
    """The groups of settings with the method's own defaults put into them."""
    result = []
    for group in groups:
        known = {f.name for f in dataclasses.fields(group)}
        result.append(dataclasses.replace(group, **{k: v for k, v in method.defaults.items() if k in known}))
    return tuple(result)


def resolve_method(
    name: str, divergence: str | None, config: DistillConfig
) -> tuple[Method, str, DistillConfig]:
    """The method, the divergence's name and the config that a user's choice comes to.

    Args:
        name: Method name.
        divergence: Divergence name, or None for the method's own.
        config: The settings.

    Raises:
        UserError: Unknown method, or a divergence that the method does not have.
    """
    method = find_method(name)
    own = method.divergences
    if own != "any":
        aliases = {"reverse_kl": ("reverse_kl", "rkl"), "kl": ("kl", "fkl")}.get(own, (own,))
        if divergence is not None and divergence not in aliases:
            raise UserError(
                f"{method.name} minimises {own.replace('_kl', ' KL')}"
                if own
                else f"{method.name} minimises no f-divergence",
                got=f"--divergence {divergence}",
                fix="use --method f-distill for any other divergence"
                if own
                else "leave --divergence out, or use --method f-distill",
            )
        divergence = own or None
    if not (method.adversarial or method.weighted):
        config = dataclasses.replace(config, gan_weight=0.0)
    return method, divergence or method.default_divergence, config


def check_settings(method: Method, config: DistillConfig, **groups: Any) -> None:
    """Refuses settings that the method does not read.

    Args:
        method: The method.
        config: The shared settings.
        groups: The settings of each family, by its name.

    Raises:
        UserError: One was changed that does nothing here.
    """
    idle = list(method.ignores)
    if not method.critic:
        idle += CRITIC_SETTINGS
    if not (method.weighted or method.adversarial):
        idle += RATIO_SETTINGS
    suspects = [(config, name) for name in idle if name not in method.uses]
    special = {name for other in METHODS.values() for name in other.uses}
    for family, group in groups.items():
        for name in (f.name for f in dataclasses.fields(group)):
            if name not in method.uses and (family != method.family or name in special):
                suspects.append((group, name))
    for group, name in suspects:
        default = {f.name: f.default for f in dataclasses.fields(group)}[name]
        value = getattr(group, name)
        if value not in (default, method.defaults.get(name, default)):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing with --method {method.name}",
                got=value,
                fix="leave it out, or choose a method that reads it",
            )
