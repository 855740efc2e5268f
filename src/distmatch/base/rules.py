"""The allowed values of settings, declared in the types of their fields and checked in one place."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from distmatch.base.errors import UserError


@dataclass(frozen=True)
class Rule:
    """A condition on a value, as metadata of its type.

    Attributes:
        words: What the value must be: ``must be positive``.
        holds: Whether a value is so.
    """

    words: str
    holds: Callable[[Any], bool]


def between(low: int, high: int) -> Rule:
    """From ``low`` to ``high``, both included."""
    return Rule(f"must be from {low} to {high}", lambda value: low <= value <= high)


Positive = Annotated[float, Rule("must be positive", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Rule("must not be negative", lambda value: 0 <= value < math.inf)]
Finite = Annotated[float, Rule("must be finite", math.isfinite)]
Share = Annotated[float, Rule("must be in [0, 1]", lambda value: 0 <= value <= 1)]
Decay = Annotated[float, Rule("must be in [0, 1)", lambda value: 0 <= value < 1)]
Count = Annotated[int, Rule("must be at least 1", lambda value: value >= 1)]
CountOrNone = Annotated[int, Rule("must not be negative", lambda value: value >= 0)]
"""A count in which 0 means none, or has a special meaning."""


def check_rules(settings: Any) -> None:
    """Checks the values of a dataclass against the types of its fields: rules for numbers, and literals.

    Raises:
        UserError: One breaks its rule.
    """
    kind: type = type(settings)
    for name in _rules(kind):
        check_rule(kind, name, getattr(settings, name))


def check_rule(kind: type, name: str, value: Any) -> None:
    """Checks a value against the rule of the field that it is for, if there is one.

    Fields are called as they are on the command line, but those of a class with ``flags = False``.

    Raises:
        UserError: It breaks it.
    """
    rule = _rules(kind).get(name)
    if rule is not None and not _holds(rule, value):
        flag = f"--{name.replace('_', '-')}" if getattr(kind, "flags", True) else name
        default = getattr(kind, name, None)
        named = "" if default == "" else f" for the default, {default}"
        fix = None if default is None else f"omit it{named}"
        raise UserError(f"{flag} {rule.words}", got=value, fix=fix)


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except TypeError:  # a value of another type, which Python programs can give
        return False


@cache
def _rules(kind: type) -> dict[str, Rule]:
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for name, hint in hints.items():
        if typing.get_origin(hint) is Literal:
            words = ", ".join(map(str, typing.get_args(hint)))
            found[name] = Rule(f"must be one of {words}", typing.get_args(hint).__contains__)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Rule):
                found[name] = mark
    return found
