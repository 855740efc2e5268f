"""Construction of a method from its name and settings."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from distmatch.base.checks import batch_of, check_count
from distmatch.base.errors import UserError, cause
from distmatch.base.memory import out_of_memory
from distmatch.base.stack import caller_level
from distmatch.diffusion.conditioning import LABEL, example_conditioning, spec_of
from distmatch.diffusion.denoiser import Denoiser, require_denoiser, require_input_gradient, require_score
from distmatch.diffusion.guidance import require_null_class
from distmatch.divergences import Divergence
from distmatch.divergences import divergence as divergence_of
from distmatch.interop import is_external
from distmatch.interop.feature_depths import DEPTHS, take_features
from distmatch.interop.lora import chosen_layers, full_rank, network_in, watched
from distmatch.interop.optional import PEFT
from distmatch.methods.context import GUIDANCE, Context, Distiller
from distmatch.methods.initialization import frozen, has_network
from distmatch.methods.method import Method
from distmatch.methods.settings import (
    DiscriminatorSettings,
    GammaSettings,
    GuidedSettings,
    NetworkSettings,
    RoleSettings,
    Settings,
)
from distmatch.methods.table import METHODS, resolve_method, unknown_setting
from distmatch.nets.blocks import recompute_blocks
from distmatch.nets.config import NetConfig


def build(
    teacher: Denoiser,
    method: str = "f-distill",
    *,
    total_steps: int,
    divergence: str | Divergence | None = None,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
    net: NetConfig | None = None,
    **settings: Any,
) -> Distiller:
    """A method for a loop of your own: ``init``, ``step`` with your batches, ``result``.

    It is what :func:`distmatch.distill` runs, without its data, files and log::

        method = dm.methods.build(teacher, "dmd2", total_steps=1000)
        state = method.init(seed=0)
        for step in range(1000):
            info = method.step(state, Batch(x, labels))
        student = method.result(state)

    ``state.state_dict()`` and ``state.load_state_dict()`` are for checkpoints: networks, optimizers, averages
    and random streams, so that a run continues to the bit. ``info`` is a dictionary of tensors to log.

    Args:
        teacher: Any :class:`~distmatch.diffusion.denoiser.Denoiser`. It is copied and does not change.
        method: As for :func:`distmatch.distill`.
        total_steps: Length of the run, which learning rates and warm-ups depend on.
        divergence: As for :func:`distmatch.distill`.
        device: Device of the networks; the batches must be there.
        precision: ``bf16`` runs networks under autocast.
        net: A fresh network for the student, smaller than the teacher's or of another kind; it is fitted to
            the teacher by ``init``, on samples of its argument ``draw``. None copies the teacher's network;
            where it has none, the shape decides.
        **settings: The method's own, as fields of its settings class; ``docs/methods.md`` lists the methods.

    Raises:
        UserError: An unknown method or setting, or parts that do not go together.
    """
    require_denoiser(teacher)
    wanted = divergence.name if isinstance(divergence, Divergence) else divergence
    chosen, name = resolve_method(method, wanted)
    known = chosen.options()
    for setting, value in settings.items():
        if setting not in known:
            raise unknown_setting(setting, chosen, known, value)
    try:
        values = chosen.settings(**settings)
    except TypeError as error:
        raise UserError("a setting has the wrong type", got=str(error)) from error
    check_count("total_steps", total_steps)
    device = torch.device(device)
    return build_method(
        Context(
            teacher=frozen(teacher, device, values if isinstance(values, RoleSettings) else None),
            method=chosen,
            divergence=divergence if isinstance(divergence, Divergence) else divergence_of(name),
            settings=values,
            total_steps=total_steps,
            device=device,
            bf16=precision == "bf16",
            net=net,
        )
    )


def build_method(context: Context[Settings]) -> Distiller:
    """The method of a set-up; everything that does not fit is refused here, before anything is trained.

    Raises:
        UserError: Teacher, method and settings do not go together.
    """
    _check_levels(context)
    _check_conditions(context)
    _refuse_idle(context.settings)
    _check_roles(context)
    _check_offload(context)
    _check_call(context.teacher, context.device)
    if context.method.family == "consistency":
        require_score(context.teacher, "a path of samples with Gaussian noise")
    if isinstance(context.settings, GuidedSettings):
        _check_guidance(context, context.settings)
    if isinstance(context.settings, DiscriminatorSettings):
        _choose_features(context.teacher, context.settings)
    if context.recomputes and isinstance(context.copied, nn.Module):
        recompute_blocks(network_in(context.copied))
    if context.method.teacher_gradient:
        require_input_gradient(context.teacher, context.method.name, context.device)
    built: Distiller = context.method.build(context)
    return built


def _check_levels(context: Context[Settings]) -> None:
    teacher = context.teacher
    low, high, data = teacher.sigma_min, teacher.sigma_max, teacher.sigma_data
    if not low < context.first_sigma <= high:
        raise UserError(
            "the student must start at a noise level of the teacher",
            got=f"--student-sigma {context.settings.student_sigma:g}, in units of sigma_data = {data:.4g}",
            expected=f"above {low / data:.4g} and up to {high / data:.4g}, or 0 for that",
        )
    _ = context.sigmas  # refuses further steps that do not fit


def _check_guidance(context: Context[Settings], own: GuidedSettings) -> None:
    if own.guidance != 1:
        if not own.negative_prompt:
            require_null_class(context.teacher)
        context.guided()  # refuses a negative prompt that is not taken
    if own.guidance_range and GUIDANCE not in spec_of(context.teacher):
        raise UserError(
            "--guidance-range is for networks that receive their guidance scale",
            got=f"a network that receives {', '.join(spec_of(context.teacher)) or 'no condition'}",
            expected=f"a field {GUIDANCE} of its conditioning, as Flux has",
            fix="use --guidance, which trains a student at one scale",
        )


def _choose_features(teacher: Denoiser, own: DiscriminatorSettings) -> None:
    """What a discriminator sees of the teacher's network, which is a copy of this run."""
    if any(not 0 < depth <= 1 for depth in own.ratio_depths):
        raise UserError("--ratio-depths are shares of the blocks, in (0, 1]", got=own.ratio_depths)
    traced = getattr(teacher, "pipeline", None) is not None and own.ratio_features != "own"
    if depths := own.ratio_depths or (DEPTHS if traced else ()):
        take_features(teacher, depths)


def _check_conditions(context: Context[Settings]) -> None:
    others, external = set(spec_of(context.teacher)) - {LABEL}, is_external(context.teacher)
    if others:
        got = f"a teacher that takes {', '.join(sorted(others))}"
        refuse_conditions(context.method, context.settings, external=external, got=got)


def refuse_conditions(method: Method, settings: Settings, *, external: bool, got: str) -> None:
    """Refuses a method that cannot take prompts, or other conditions than labels, of such a network.

    Args:
        method: The method.
        settings: Its settings.
        external: Whether the teacher's network is of other code.
        got: The teacher, for the message.

    Raises:
        UserError: It does not.
    """
    reason = f"supports class labels only: {method.labels_only}" if method.labels_only else ""
    if isinstance(settings, GammaSettings) and external:
        reason = "jumps, and this network has no input for a second noise level"
    if reason:
        fits = [m for m in METHODS.values() if not (m.labels_only or issubclass(m.settings, GammaSettings))]
        without, with_data = (", ".join(m.name for m in fits if m.data == data) for data in ("no", "needed"))
        raise UserError(
            f"{method.name} {reason}",
            got=got,
            fix=f"with prompts alone use {without}; with images and captions also {with_data}",
        )


def _check_call(teacher: Denoiser, device: torch.device) -> None:
    """Refuses a network of the user that does not run on one of its samples; pipelines have been called."""
    called = not is_external(teacher) or getattr(teacher, "pipeline", None) is not None
    if called or device.type == "meta":
        return
    x = torch.zeros(1, *teacher.shape, device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            teacher(x, x.new_full((1,), teacher.sigma_data), example_conditioning(teacher, 1, device))
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if memory := out_of_memory(error):
            raise memory from error
        raise UserError(
            "the network of the teacher does not run on samples of its shape",
            got=cause(error),
            expected=f"a network that takes {batch_of(teacher.shape)}",
            fix="pass the shape and the conditioning that it was trained with to dm.as_denoiser",
        ) from error


def _check_roles(context: Context[Settings]) -> None:
    """Refuses adapters where there is nothing to adapt, and a base that does not run in its type."""
    own, teacher = context.settings, context.teacher
    if not isinstance(own, RoleSettings) or own.train == "full":
        return
    if context.copied is None or not isinstance(teacher, nn.Module):
        raise UserError(
            "--train lora adapts the network of the teacher, and this student has another",
            got="a fresh network for the student" if has_network(teacher) else "a teacher without a network",
            fix="use --train full, or leave --net out for a teacher with a network",
        )
    PEFT.load()
    layers = chosen_layers(network_in(teacher), own.lora_targets)
    x = torch.ones(2, *teacher.shape, device=context.device)
    conditioning = example_conditioning(teacher, 2, context.device)
    try:
        with context.autocast(), torch.no_grad(), watched(network_in(teacher), layers) as called:
            teacher(x, x.new_ones(2), conditioning)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"this network does not run with weights in {own.base_dtype}",
            got=cause(error),
            fix="choose another --base-dtype, or convert inputs to the type of the weights in the network",
        ) from error
    large = [name for name in layers if own.lora_rank > full_rank(network_in(teacher).get_submodule(name))]
    if 2 * len(large) > len(layers):
        warnings.warn(
            f"--lora-rank {own.lora_rank} is above the full rank of {len(large)} of {len(layers)} layers "
            f"({large[0]} among them): a smaller rank trains the same there, with less memory",
            stacklevel=caller_level(),
        )
    if idle := [name for name in layers if name not in called]:
        warnings.warn(
            f"{len(idle)} of {len(layers)} layers with adapters were not called in a trial pass "
            f"({idle[0]} among them). Adapters have no effect if the network uses the weights of a layer and "
            "does not call it",
            stacklevel=caller_level(),
        )


def _check_offload(context: Context[Settings]) -> None:
    own = context.settings
    if isinstance(own, NetworkSettings) and own.offload and context.device.type == "cpu":
        raise UserError(
            "--offload moves Adam's moments to the memory of the CPU, where this run has them already",
            got="--device cpu",
            expected="an accelerator",
            fix="omit it; --train lora has few moments",
        )


def idle_settings(own: Settings) -> dict[str, str]:
    """The settings that others leave without effect, each with those as the reason."""
    found: dict[str, str] = {}
    for kind in type(own).__mro__:
        idle: dict[str, str] = vars(kind)["idle"](own) if "idle" in vars(kind) else {}
        found = {**idle, **found}
    return found


def _refuse_idle(own: Settings) -> None:
    """Refuses settings that other settings leave without effect."""
    for name, reason in idle_settings(own).items():
        if (value := getattr(own, name)) != getattr(type(own), name):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing with {reason}",
                got=value,
                fix="omit it, or change the other",
            )
