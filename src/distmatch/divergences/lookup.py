"""Names of divergences."""

from __future__ import annotations

from collections.abc import Callable

from distmatch.base.errors import UserError, unknown_name
from distmatch.divergences.alpha import alpha
from distmatch.divergences.core import Divergence
from distmatch.divergences.renyi import Renyi
from distmatch.divergences.skewed import gjs, skew_kl, skew_reverse_kl
from distmatch.divergences.table import TABLE

NAMES: tuple[str, ...] = tuple(TABLE)
"""The canonical names of single divergences; members of :data:`FAMILIES` are accepted as well."""

FAMILIES: dict[str, Callable[[float], Divergence]] = {
    "alpha": alpha,
    "gjs": gjs,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
"""Families with one number, written ``alpha:0.5``."""

ALIASES = {
    "rkl": "reverse_kl",
    "fkl": "kl",
    "forward_kl": "kl",
    "sh": "hellinger",
    "jf": "jeffreys",
    "sf": "softened_reverse_kl",
    "skl": "skew_kl",
    "srkl": "skew_reverse_kl",
    "skew_rkl": "skew_reverse_kl",
}
"""Short forms of the literature."""

_KNOWN = [*NAMES, *ALIASES, *(f"{family}:0.5" for family in FAMILIES)]


def _number(family: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"the number behind {family}: is not a finite number",
            got=repr(text),
            expected=f"for example {family}:0.5",
            fix=f"write {family}:A with a number A",
        ) from error


def _parts(which: str) -> tuple[str, str | None]:
    family, colon, order = which.strip().lower().partition(":")
    name = family.strip().replace("-", "_").replace(" ", "_")
    return ALIASES.get(name, name), order.strip() if colon else None


def divergence(which: str | Divergence) -> Divergence:
    """The divergence of that name; a :class:`Divergence` is returned unchanged.

    Args:
        which: One of :data:`NAMES` or :data:`ALIASES` (upper case, ``-`` and spaces are fine), a member of
            one of the :data:`FAMILIES` such as ``alpha:0.5``, or a :class:`Divergence`.

    Raises:
        UserError: There is no such divergence, or the number of a family is missing or not allowed.
    """
    if isinstance(which, Divergence):
        return which
    if isinstance(which, str):
        name, order = _parts(which)
        if name in FAMILIES:
            return FAMILIES[name](_number(name, order or ""))
        if name in TABLE and order is None:
            return TABLE[name]
        if name == "renyi":
            raise UserError(
                "the Renyi divergence is not an f-divergence: it has no generator and no weight",
                got=repr(which),
                expected=f"one of {', '.join(_KNOWN)}",
                fix="use alpha:A of the same order; Renyi is a monotone function of it",
            )
    raise unknown_name("divergence", which, _KNOWN)


def measure(which: str | Divergence | Renyi) -> Divergence | Renyi:
    """Like :func:`divergence`, but also supports ``renyi:A``: whatever has a value, if not a gradient weight.

    Args:
        which: A name, or an object, which is returned unchanged.

    Raises:
        UserError: There is no such divergence, or its number is missing or not allowed.
    """
    if isinstance(which, Renyi):
        return which
    if isinstance(which, str):
        name, order = _parts(which)
        if name == "renyi":
            return Renyi(_number(name, order or ""))
    return divergence(which)
