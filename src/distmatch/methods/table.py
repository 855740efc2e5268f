"""The methods by name, and what a user's choice of one comes to. Imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.stack import caller_level
from distmatch.methods.consistency import methods as consistency
from distmatch.methods.kernel import methods as kernel
from distmatch.methods.matching import methods as matching
from distmatch.methods.method import Method
from distmatch.methods.transport import methods as transport

METHODS: dict[str, Method] = {
    method.name: method
    for method in (*matching.METHODS, *consistency.METHODS, *kernel.METHODS, *transport.METHODS)
}
"""All methods. A method of your own is one more entry, for as long as your program runs."""
RENAMED = {
    "calls": "num_steps",
    "critic_steps": "fake_score_steps",
    "lr_critic": "lr_fake_score",
    "lr_ratio": "lr_discriminator",
    "noise_law": "noise_distribution",
    "critic_law": "fake_score_distribution",
    "level_law": "level_distribution",
}
"""Settings that had another name before release 0.2, which config files and command lines still take."""


def current_name(setting: str) -> str:
    """The present name of a setting; one of before 0.2 gives a warning."""
    if setting not in RENAMED:
        return setting
    old, new = (f"--{name.replace('_', '-')}" for name in (setting, RENAMED[setting]))
    warnings.warn(f"{old} is now called {new}", stacklevel=caller_level())
    return RENAMED[setting]


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: There is none.
    """
    key = name.strip().lower().replace("_", "-")
    if key not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[key]


def own_divergence(method: Method) -> str | None:
    """The divergence that a method minimizes where none is chosen; None for one that minimizes none."""
    return method.default_divergence if method.divergences == "any" else method.divergences or None


def resolve_method(name: str, divergence: str | None) -> tuple[Method, str]:
    """The method and the divergence's name that a user's choice comes to.

    Args:
        name: Method name.
        divergence: Divergence name, or None for the method's own.

    Raises:
        UserError: Unknown method, or a divergence that the method does not have.
    """
    method = find_method(name)
    own = method.divergences
    if own != "any":
        aliases = {"reverse_kl": ("reverse_kl", "rkl"), "kl": ("kl", "fkl")}.get(own, (own,))
        if divergence is not None and divergence not in aliases:
            raise UserError(
                f"{method.name} minimizes {own.replace('_kl', ' KL')}"
                if own
                else f"{method.name} minimizes no f-divergence",
                got=f"--divergence {divergence}",
                fix="use --method f-distill for any other divergence"
                if own
                else "omit --divergence, or use --method f-distill",
            )
        divergence = own or None
    return method, divergence or method.default_divergence


def readers(setting: str) -> list[str]:
    """The methods that read a setting."""
    return [method.name for method in METHODS.values() if setting in method.options()]


def first_default(setting: str) -> Any:
    """The default of a setting where it is first stated, which methods may replace by their own."""
    for method in METHODS.values():
        for kind in reversed(method.settings.__mro__):
            if setting in vars(kind).get("__annotations__", {}):
                return vars(kind)[setting]
    raise KeyError(setting)


def unknown_setting(setting: str, method: Method | None, known: Iterable[str], got: Any = None) -> UserError:
    """Why a setting cannot be given: other methods read it, or none does.

    Args:
        setting: Its name.
        method: The method that it was given for; None if it was given for no single one.
        known: What could have been given.
        got: The value, where it is known.
    """
    if setting in RENAMED:
        return UserError(
            f"there is no setting {setting}", got=got, fix=f"it is now called {RENAMED[setting]}"
        )
    others = readers(setting)
    if method is None or not others:
        return unknown_name("setting", setting, [*sorted(known), "method", "divergence"], RENAMED)
    return UserError(
        f"--{setting.replace('_', '-')} does nothing with --method {method.name}",
        got=got,
        fix=f"omit it, or choose a method that reads it: {', '.join(others)}",
    )
