"""The alpha (Cressie-Read) family: h(r) = r^a, one number from mode-seeking to mode-covering."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.divergences.core import Divergence
from distmatch.divergences.numerics import (
    blend,
    bounded,
    bounded_exp,
    entropy_excess,
    exp_curvature,
    exp_excess,
    expm1,
    family_name,
    log_max,
    power,
)
from distmatch.divergences.table import KL, REVERSE_KL

# Closer than this to a = 0 or a = 1 the generator is written around its limit, against cancellation.
_LIMIT_ZONE = 0.1
# Closer than this it is the limit itself: 1 / a would overflow, and the difference is far below rounding.
_AT_LIMIT = 1e-12


def _generator(a: float) -> Callable[[Tensor], Tensor]:
    """f(r) = (r^a - a r + a - 1) / (a (a - 1)) as a function of log r, for a not 0 or 1."""
    b = 1.0 - a

    def near_kl(x: Tensor) -> Tensor:
        # (KL generator - r phi(-b log r) / b) / a with phi(y) = e^y - 1 - y: the second term vanishes with b.
        x = bounded(x, -1000.0)
        small = (b * x).abs() < 0.5
        y = torch.where(small, torch.zeros_like(x), x)  # so that the form not chosen cannot overflow
        rest = torch.where(
            small,
            torch.exp(x) * exp_curvature((-b * x).clamp(-0.5, 0.5)) * (b * x * x),
            bounded_exp(a * y, 1.0 / b) - torch.exp(y) * (1.0 - b * y) / b,
        )
        return (entropy_excess(x) - rest) / a

    def near_reverse_kl(x: Tensor) -> Tensor:
        # phi(log r) / b - phi(a log r) / (a b): the second term vanishes with a. Exact for every a, but it
        # cancels far from r = 1. The clamp is where r^a has no digits left; it keeps inf - inf away.
        x = x.clamp(-100.0 / abs(a), log_max(x.dtype) - 1.0)
        return exp_excess(x, 1.0 / b) - exp_excess(a * x, 1.0 / (a * b))

    def far(x: Tensor) -> Tensor:
        x = x.clamp(max=(log_max(x.dtype) - max(0.0, -math.log(abs(a * b)))) / max(1.0, a))
        return bounded_exp(x, 1.0 / b) - bounded_exp(a * x, 1.0 / (a * b)) + 1.0 / a

    if abs(b) < _LIMIT_ZONE:
        return near_kl
    if abs(a) < _LIMIT_ZONE:
        return near_reverse_kl
    return lambda x: blend(x, near_reverse_kl, far)


def _conjugate(a: float) -> Callable[[Tensor], Tensor]:
    """f*(t) = ((1 + (a - 1) t)_+^{a / (a - 1)} - 1) / a, through the log of the maximizer."""

    def conjugate(t: Tensor) -> Tensor:
        # The floor is where 1 + (a - 1) t reaches 0: for a > 1 the conjugate is constant below it.
        x = ((a - 1.0) * t).clamp(min=torch.finfo(t.dtype).eps - 1.0)
        return expm1(a / (a - 1.0) * torch.log1p(x), 1.0 / a)

    return conjugate


def alpha(a: float) -> Divergence:
    """The alpha divergence with f(r) = (r^a - a r + a - 1) / (a (a - 1)) and weight h(r) = r^a.

    Special cases: a = 0 reverse KL, a = 1/2 twice squared Hellinger, a = 1 KL, a = 2 half Pearson, a = -1
    half Neyman. For 0 < a < 1 it is bounded by 1 / (a (1 - a)). Swapping the arguments replaces a by 1 - a.

    Args:
        a: Any finite number; larger covers more modes, at the price of a larger variance of the weight.

    Returns:
        The divergence, named ``alpha:a``.

    Raises:
        UserError: ``a`` is not a finite number.
    """
    check_number("the order of an alpha divergence", a)
    a = float(a)

    def swapped() -> Divergence:
        return alpha(1.0 - a)

    if min(abs(a), abs(1.0 - a)) < _AT_LIMIT:
        limit = REVERSE_KL if a < 0.5 else KL
        return dataclasses.replace(limit, name=family_name("alpha", a), swapped=swapped)
    return Divergence(
        name=family_name("alpha", a),
        f=_generator(a),
        df=lambda x: expm1((a - 1.0) * x, 1.0 / (a - 1.0)),
        d2f=lambda x: power(x, a - 2.0),
        weight=lambda x: power(x, a),
        conjugate=_conjugate(a),
        swapped=swapped,
        at_zero=1.0 / a if a > 0 else math.inf,
        conjugate_domain=(-math.inf, 1.0 / (1.0 - a) if a < 1 else math.inf),
        conjugate_limit=-1.0 / a if a < 0 else math.inf,
    )
