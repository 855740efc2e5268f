"""The divergences and discrepancies between two sets, and why some have no value."""

from __future__ import annotations

import warnings

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError, unknown_name
from distmatch.discrepancies import KERNELS
from distmatch.divergences import ALIASES, FAMILIES, NAMES, measure
from distmatch.metrics.distances import DISTANCES

ALL = "all"
STEIN = "kernel_stein"
_ELSEWHERE = {
    "fisher": "needs the scores of p and of q: distmatch.discrepancies.fisher_divergence takes them",
    "distance_covariance": "is the dependence within pairs, no distance between two sets: "
    "distmatch.discrepancies.distance_covariance",
    "conditional_cauchy_schwarz": "needs the condition of each sample: "
    "distmatch.discrepancies.conditional_cauchy_schwarz",
}
_FEW_DIMENSIONS = 4  # beyond them nearest neighbors give no usable number

EVERYTHING = (*NAMES, *DISTANCES, STEIN, *_ELSEWHERE)
"""The names that ``all`` means."""
_RENAMED = {f"{side}kl_neighbours": f"{side}kl_neighbors" for side in ("", "reverse_")}


def checked_names(which: str) -> tuple[str, ...]:
    """Resolves names separated by commas, ``all`` among them; each comes once, in the order given.

    Args:
        which: Divergences, such as ``kl``, ``alpha:0.5`` or ``renyi:2``, and discrepancies, such as ``mmd``
            or ``mmd:laplace``.

    Raises:
        UserError: There is no such name, or none at all.
    """
    found: dict[str, None] = {}
    for part in filter(None, (text.strip() for text in which.split(","))):
        found |= dict.fromkeys(EVERYTHING if part.lower() == ALL else (_name(part),))
    if not found:
        raise UserError(
            "no divergence was named", got=repr(which), expected="all, or names separated by commas"
        )
    return tuple(found)


def _name(text: str) -> str:
    head, colon, rest = (part.strip() for part in text.lower().replace("-", "_").partition(":"))
    if head == "mmd" and colon:
        check_name("kernel", rest, KERNELS)
        return "mmd" if rest == "gaussian" else f"mmd:{rest}"
    if head in _RENAMED:
        warnings.warn(f"{head} is now called {_RENAMED[head]}", UserWarning, stacklevel=2)
        head = _RENAMED[head]
    if head in (*DISTANCES, STEIN, *_ELSEWHERE) and not colon:
        return head
    if ALIASES.get(head, head) in (*NAMES, *FAMILIES, "renyi"):
        return measure(text).name
    members = (f"{family}:0.5" for family in (*FAMILIES, "renyi"))
    raise unknown_name(
        "divergence or discrepancy", text, [*EVERYTHING, *ALIASES, *members, "mmd:laplace", ALL]
    )


def in_nats(name: str) -> bool:
    """Whether a divergence is a mean of logarithms; the others are plain numbers.

    Args:
        name: From :func:`checked_names`.
    """
    return any(word in name for word in ("kl", "js", "jeffreys", "renyi"))


def why_not(name: str, d: int, computable: bool, everything: bool) -> str | None:
    """Why there is no such number for these samples; None where there is one.

    Args:
        name: From :func:`checked_names`.
        d: Numbers in a sample.
        computable: Whether its further inputs are available.
        everything: Whether all were requested, so that unreliable ones are omitted.
    """
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name == STEIN and not computable:
        return "needs the score of p or of q: samples have none, a toy such as ring8 has"
    if name == "wasserstein" and d > 1:
        return f"is exact in one dimension only: in {d} dimensions see sinkhorn and sliced_wasserstein"
    if name.endswith("sliced_wasserstein") and d == 1:
        return "is wasserstein on the line"
    if name.endswith("kl_neighbors") and d > _FEW_DIMENSIONS and everything:
        return f"is unreliable in {d} dimensions; it is computed if named explicitly"
    return None
