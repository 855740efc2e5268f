"""Lower bounds of several divergences made consistent: each raised to the largest that the others imply.

Three kinds of implication, each exact. D_f <= V (f(0) + f'(inf)) with V the total variation, so a bound of a
bounded divergence is one of V. D_f is at least its least value over pairs of two-point distributions with the
same V, since the set where p exceeds q divides every pair into one of these (data processing). And Renyi
divergences rise with their order: 1/2 is that of squared Hellinger, 1 of KL, 2 of Pearson's chi-square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from distmatch.divergences import Divergence, divergence, divergence_discrete
from distmatch.divergences.estimators.results import LowerBound

_GRID = 401
_ABSURD = 3.0
"""An error of that many times the bound, or the largest value, says that there is no bound."""
_SIGMAS = 3.0


@dataclass(frozen=True)
class Consistent:
    """Bounds that can all hold at once.

    Attributes:
        bounds: By divergence.
        implied: From which other bound one comes, where that is larger than its own.
        withheld: Why there is none, for the others.
    """

    bounds: dict[str, LowerBound]
    implied: dict[str, str]
    withheld: dict[str, str]


def least_at(which: str | Divergence, tv: float) -> float:
    """The least value that a divergence can have between two distributions of that total variation, to 1e-6.

    Args:
        which: The divergence or its name.
        tv: Total variation in [0, 1].
    """
    measure = divergence(which)
    tv = min(max(tv, 0.0), 1.0)
    low, high = 0.0, 1.0 - tv
    best = math.inf
    for _ in range(3):  # convex in the mass of q on the first point
        first = torch.linspace(low, high, _GRID, dtype=torch.float64).clamp(0, 1)
        q = torch.stack([first, 1 - first], 1)
        p = torch.stack([(first + tv).clamp(max=1.0), (1 - first - tv).clamp(min=0.0)], 1)
        values = divergence_discrete(measure, p, q)
        at = int(values.argmin())
        best = min(best, float(values[at]))
        step = (high - low) / (_GRID - 1)
        low, high = max(float(first[at]) - step, 0.0), min(float(first[at]) + step, 1.0 - tv)
    return best


def consistent(found: Mapping[str, LowerBound]) -> Consistent:
    """Makes lower bounds from the same samples consistent with one another.

    A bound outside the possible values, or with too large an error, is omitted, and so is what it would
    imply; the others then imply one for its divergence where they can. An implied bound has the error and the
    warning of its source. As the larger of several estimates it is a little too large on average, by less
    than its error. A bounded divergence is not said to be nearer its largest value than one sample of n.

    Args:
        found: Bounds by the name of a divergence.
    """
    withheld = {name: why for name, bound in found.items() if (why := _impossible(name, bound))}
    bounds = {
        name: _below_largest(bound, divergence(name).upper_bound)
        for name, bound in found.items()
        if name not in withheld
    }
    implied: dict[str, str] = {}

    def raised(name: str, source: str, by: Callable[[float], float]) -> None:
        given = bounds[source]
        value = by(given.value)
        if not math.isfinite(value) or value <= max(bounds[name].value if name in bounds else 0.0, 0.0):
            return
        error = value - by(max(given.value - given.stderr, 0.0))  # downwards: upwards it may be infinite
        bounds[name] = LowerBound(value, error, given.n, given.warning)
        implied[name] = implied.get(source, source)

    for name in [n for n in bounds if n != "tv" and "tv" in found]:
        if math.isfinite(largest := divergence(name).upper_bound):
            raised("tv", name, lambda v, largest=largest: min(v / largest, 1.0))  # type: ignore[misc]
    if "tv" in bounds and bounds["tv"].value > 0:
        for name in found:
            if name != "tv":
                raised(name, "tv", lambda v, name=name: least_at(name, v))  # type: ignore[misc]
    for chain in (_FORWARD, _BACKWARD):
        for low, high in ((a, b) for i, a in enumerate(chain) for b in list(chain)[i + 1 :]):
            if low in bounds and high in found and bounds[low].value > 0:
                into, out = chain[low][0], chain[high][1]
                raised(high, low, lambda v, into=into, out=out: out(into(v)))  # type: ignore[misc]
    if {"kl", "reverse_kl"} <= bounds.keys() and "jeffreys" in found:
        other = bounds["reverse_kl"].value
        raised("jeffreys", "kl", lambda v: v + max(other, 0.0))
    return Consistent(
        {name: bounds[name] for name in found if name in bounds},
        implied,
        {name: why for name, why in withheld.items() if name not in bounds},
    )


def _below_largest(bound: LowerBound, largest: float) -> LowerBound:
    """At most a share 1 - 1/n of the largest value: n samples without an error do not show there are none."""
    most = largest * (1 - 1 / bound.n)
    if bound.value <= most:
        return bound
    return replace(bound, value=most, stderr=math.hypot(bound.stderr, largest / bound.n))


def _impossible(name: str, bound: LowerBound) -> str | None:
    """Why a bound is none."""
    largest = divergence(name).upper_bound
    value, error = bound.value, bound.stderr
    if not math.isfinite(value) or not math.isfinite(error):
        return "has no finite bound: " + (bound.warning or "a few samples decide")
    size = largest if math.isfinite(largest) else max(abs(value), 1.0)
    if error > _ABSURD * size:
        return f"would be at least {value:.3g} ± {error:.1g}, which is uninformative: a few samples dominate"
    if value > largest + _SIGMAS * error:
        return f"would be at least {value:.3g}, and cannot be above {largest:.3g}"
    if value < -_SIGMAS * error:
        return f"would be at least {value:.3g}, less than the trivial bound 0"
    return None


# To the Renyi divergence of the orders 1/2, 1 and 2, and back, in the order of the orders.
_Chain = dict[str, tuple[Callable[[float], float], Callable[[float], float]]]


def _order_half(v: float) -> float:
    return -2 * math.log1p(-v / 2) if v < 2 else math.inf


def _exp_excess(v: float) -> float:
    return math.expm1(v) if v < 700 else math.inf


_FORWARD: _Chain = {
    "hellinger": (_order_half, lambda r: -2 * math.expm1(-r / 2)),
    "kl": (lambda v: v, lambda r: r),
    "pearson": (math.log1p, _exp_excess),
}
_BACKWARD: _Chain = {
    "hellinger": _FORWARD["hellinger"],
    "reverse_kl": _FORWARD["kl"],
    "neyman": _FORWARD["pearson"],
}
