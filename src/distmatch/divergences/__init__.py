"""f-divergences as functions of log r = log p_teacher - log q_student, in nats with true constants."""

from __future__ import annotations

from distmatch.base.errors import UserError, unknown_name
from distmatch.divergences.alpha import alpha
from distmatch.divergences.core import Divergence
from distmatch.divergences.custom import custom
from distmatch.divergences.quadrature import divergence_1d
from distmatch.divergences.table import TABLE

__all__ = ["ALIASES", "NAMES", "Divergence", "alpha", "custom", "divergence", "divergence_1d"]

NAMES: tuple[str, ...] = tuple(TABLE)
"""The canonical names; ``alpha:A`` with a number A is accepted as well."""

ALIASES = {
    "rkl": "reverse_kl",
    "fkl": "kl",
    "forward_kl": "kl",
    "sh": "hellinger",
    "jf": "jeffreys",
    "sf": "softened_reverse_kl",
}
"""Short forms of the literature."""


def _alpha_from_text(order: str) -> Divergence:
    try:
        return alpha(float(order))
    except ValueError as error:
        raise UserError(
            "the order of an alpha divergence must be a finite number",
            got=repr(order),
            expected="for example alpha:0.5",
            fix="write alpha:A with a number A (0 is reverse KL, 1 is KL)",
        ) from error


def divergence(which: str | Divergence) -> Divergence:
    """The divergence of that name; a :class:`Divergence` is handed back as it is.

    Args:
        which: One of :data:`NAMES` or :data:`ALIASES` (upper case, ``-`` and spaces are fine), ``alpha:A``
            with a number A, or a :class:`Divergence`.

    Raises:
        UserError: There is no such divergence, or A is not a number.
    """
    if isinstance(which, Divergence):
        return which
    if isinstance(which, str):
        family, colon, order = which.strip().lower().partition(":")
        name = family.strip().replace("-", "_").replace(" ", "_")
        if name == "alpha":
            return _alpha_from_text(order.strip())
        name = ALIASES.get(name, name)
        if name in TABLE and not colon:
            return TABLE[name]
    raise unknown_name("divergence", which, [*NAMES, *ALIASES, "alpha:0.5"])
