"""Published settings by name, and when the defaults are not meant for a network. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distmatch.base.errors import UserError, unknown_name
from distmatch.methods.method import Method
from distmatch.training.published import dmd2, fastgen, others, sid
from distmatch.training.published.preset import Preset

PRESETS = {preset.name: preset for preset in (*fastgen.PRESETS, *dmd2.PRESETS, *sid.PRESETS, *others.PRESETS)}
"""All of them but ``laptop``, by name."""
LAPTOP = "laptop"
"""The preset of the defaults: of fields, and of each method."""
LAPTOP_PARAMETERS = 20_000_000
"""Networks of fewer parameters that were trained here are what the defaults are for. The largest that `train`
builds by itself, for images of 128 x 128, has 14 million; EDM's smallest, for CIFAR-10, 56 million."""
_MILLIONS = LAPTOP_PARAMETERS // 1_000_000

_LIKE = {"dmd": "dmd2", "sim": "sid", "moment-matching": "diff-instruct", "imm": "consistency"}
"""Methods without a preset, and the one with a preset whose networks learn most alike."""


def find_preset(name: str, method: str | None = None) -> Preset | None:
    """The preset of a name; None for ``laptop``.

    Args:
        name: Its name.
        method: The method that it has to be of; None takes any.

    Raises:
        UserError: There is none, or it is of another method.
    """
    if name == LAPTOP:
        return None
    if name not in PRESETS:
        raise unknown_name("preset", name, [LAPTOP, *PRESETS])
    preset = PRESETS[name]
    if method is not None and method != preset.method:
        own = " or ".join(f"--preset {other.name}" for other in of_method(method))
        raise UserError(
            f"{name} has settings of {preset.method}",
            got=f"--method {method}",
            expected=f"--method {preset.method}, or no --method",
            fix=f"omit --method, or choose {own or f'--preset {LAPTOP}'}",
        )
    return preset


def of_method(method: str) -> list[Preset]:
    """The presets of a method."""
    return [preset for preset in PRESETS.values() if preset.method == method]


def describe(name: str) -> str:
    """What a preset is, in a line."""
    preset = find_preset(name)
    if preset is None:
        return f"{LAPTOP}, the defaults, for networks of fewer than {_MILLIONS} million parameters"
    return f"{name}, {preset.title}"


def closest(presets: list[Preset], shape: tuple[int, ...]) -> list[Preset]:
    """Presets by how near their samples are in size to samples of this shape."""
    size = math.log(math.prod(shape))
    return sorted(presets, key=lambda preset: abs(math.log(math.prod(preset.shape)) - size))


def paper_warning(
    preset: Preset, options: Mapping[str, Any], usual: Mapping[str, Any], *, parameters: int
) -> str | None:
    """A warning before published settings are used for a small network that was trained here.

    Args:
        preset: The preset.
        options: Learning rates of the run that do something, and its steps, by field name.
        usual: Those of the preset ``laptop``.
        parameters: Of the student.

    Returns:
        The warning; None where none of these is the preset's alone, or the network is of a published size.
    """
    own = {name: setting.value for name, setting in preset.settings.items()}
    kept = {
        name: value for name, value in options.items() if name in own and value == own[name] != usual[name]
    }
    if not kept or parameters >= LAPTOP_PARAMETERS:
        return None
    return (
        f"--preset {preset.name} is in force, {_flags(kept)}: published for {preset.title}. This network, of "
        f"{parameters:,} parameters, was trained here; --preset {LAPTOP} has "
        f"{_flags({name: usual[name] for name in kept})}"
    )


def _flags(values: Mapping[str, Any]) -> str:
    """Options as they are typed."""
    return ", ".join(
        f"--{name.replace('_', '-')} {value if isinstance(value, int) else f'{value:g}'}"
        for name, value in values.items()
    )


def laptop_warning(
    method: Method,
    rates: Mapping[str, Any],
    usual: Mapping[str, Any],
    *,
    parameters: int,
    elsewhere: bool,
    shape: tuple[int, ...],
    text: bool = False,
) -> str | None:
    """A warning before a network is trained with defaults that were not chosen for it.

    Args:
        method: The method.
        rates: The learning rates of the run that do something, by field name.
        usual: Those of the preset ``laptop``.
        parameters: Of the student.
        elsewhere: Whether the teacher was not trained here.
        shape: Shape of one sample.
        text: Whether it takes prompts; presets of models that take none are not named then.

    Returns:
        The warning; None where the defaults are for such a network, or all learning rates are others.
    """
    kept = {name: value for name, value in rates.items() if value == usual[name]}
    if not kept or not (elsewhere or parameters >= LAPTOP_PARAMETERS):
        return None

    def published(name: str) -> list[Preset]:
        return closest([preset for preset in of_method(name) if preset.text or not text], shape)

    if found := published(method.name):
        advice = "published for this method: " + ", ".join(f"--preset {preset.name}" for preset in found)
    else:
        advice = f"none is published for {method.name}{' on prompts' if text else ''} (docs/presets.md)"
        if near := published(_LIKE.get(method.name, "")):
            advice += f"; {near[0].name} has --lr {near[0].settings['lr'].value:g}"
    return (
        f"--preset {LAPTOP} is in force, {_flags(kept)}: for networks of fewer than {_MILLIONS} million "
        f"parameters that were trained here. This one has {parameters:,}"
        f"{' and comes from elsewhere' if elsewhere else ''}, and such rates can spoil it; {advice}"
    )
