"""The methods by name, and what a user's choice of one comes to. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from distmatch.base.errors import UserError, unknown_name
from distmatch.methods.config import DistillConfig
from distmatch.methods.entries import ENTRIES
from distmatch.methods.method import CRITIC_SETTINGS, RATIO_SETTINGS, Method

METHODS = {method.name: method for method in ENTRIES}


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


def own_divergence(method: Method) -> str | None:
    """The divergence that a method minimises where none is chosen; None for one that minimises none."""
    return method.default_divergence if method.divergences == "any" else method.divergences or None


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


def idle_settings(method: Method, config: DistillConfig, **groups: Any) -> list[tuple[Any, str]]:
    """The settings that a method does not read.

    Args:
        method: The method.
        config: The shared settings.
        groups: The settings of each family, by its name.

    Returns:
        Each with the group that it is in.
    """
    idle = list(method.ignores)
    if not method.critic:
        idle += CRITIC_SETTINGS
    if not (method.weighted or method.adversarial):
        idle += RATIO_SETTINGS
    found = [(config, name) for name in idle if name not in method.uses]
    special = {name for other in METHODS.values() for name in other.uses}
    for family, group in groups.items():
        for name in (f.name for f in dataclasses.fields(group)):
            if name not in method.uses and (family != method.family or name in special):
                found.append((group, name))
    return found


def check_settings(method: Method, config: DistillConfig, **groups: Any) -> None:
    """Refuses settings that the method does not read.

    Args:
        method: The method.
        config: The shared settings.
        groups: The settings of each family, by its name.

    Raises:
        UserError: One was changed that does nothing here.
    """
    for group, name in idle_settings(method, config, **groups):
        default = {f.name: f.default for f in dataclasses.fields(group)}[name]
        value = getattr(group, name)
        if value not in (default, method.defaults.get(name, default)):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing with --method {method.name}",
                got=value,
                fix="leave it out, or choose a method that reads it",
            )
