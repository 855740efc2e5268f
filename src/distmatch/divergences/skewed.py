"""The divergences between one distribution and a mixture of both: generalized JS, skew KL, skew reverse KL.

With L = log(b r + 1 - b), the log-ratio of the mixture M = b p + (1 - b) q to q, each of them is a mean under
M of the centered KL generator of p/M or q/M: no term cancels another near r = 1, and none overflows alone.
Skew divergences: Lee (1999); as training losses with small b: DistiLLM (arXiv 2402.03898).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence, Function
from distmatch.divergences.numerics import (
    bounded,
    bounded_exp,
    entropy_excess,
    exp_excess,
    expm1,
    family_name,
    log_blend,
    log_max,
    numeric_conjugate,
)
from distmatch.divergences.table import KL, REVERSE_KL

_LEAST = 1e-12  # a share closer to 0 or 1 has lost the digits of its complement


def _share(family: str, share: float, zero: bool) -> float:
    if isinstance(share, (int, float)) and (_LEAST <= share <= 1 - _LEAST or (zero and share == 0)):
        return float(share)
    raise UserError(
        f"the number of {family} is a share of a mixture",
        got=share,
        expected=f"{'0, or ' if zero else ''}more than 0 (by {_LEAST:g}) and less than 1",
        fix=f"write for example {family}:0.1",
    )


def gjs(b: float) -> Divergence:
    """Generalized Jensen-Shannon: b KL(p || M) + (1 - b) KL(q || M) with M = b p + (1 - b) q.

    b = 1/2 is JS. The bound is the entropy of (b, 1 - b); h(r) = b (1 - b) r / (b r + 1 - b). Divided by
    b (1 - b) it tends to KL(p || q) for b to 0 and to KL(q || p) for b to 1. Swapping the arguments replaces
    b by 1 - b.

    Args:
        b: The share of the teacher in the mixture, strictly between 0 and 1.

    Returns:
        The divergence, named ``gjs:b``.

    Raises:
        UserError: ``b`` is not strictly between 0 and 1.
    """
    b = _share("gjs", b, zero=False)
    return _gjs(b, 1.0 - b)


def _gjs(b: float, rest: float) -> Divergence:
    """Takes both shares, so that swapping twice gives back exactly the same ``b``."""
    log_scale = math.log(b) + math.log(rest)

    def f(x: Tensor) -> Tensor:
        x = bounded(x)
        to_q, to_p = log_blend(x, b, rest), log_blend(-x, rest, b)  # log M/q, log M/p
        return bounded_exp(to_q) * (b * entropy_excess(-to_p) + rest * entropy_excess(-to_q))

    def conjugate(t: Tensor) -> Tensor:
        # (1 - b)(log(1 - b) - log(1 - b e^{t/b})), without the cancellation at t = 0.
        return -rest * torch.log1p(-(b / rest) * torch.expm1(t / b))

    return Divergence(
        name=family_name("gjs", b),
        f=f,
        df=lambda x: -b * log_blend(-x, rest, b),
        d2f=lambda x: bounded_exp(log_scale - x - log_blend(x, b, rest)),
        weight=lambda x: b * rest * torch.exp(-log_blend(-x, rest, b)),
        conjugate=conjugate,
        swapped=lambda: _gjs(rest, b),
        at_zero=-rest * math.log(rest),
        conjugate_domain=(-math.inf, -b * math.log(b)),
    )


def _skew_kl_slope(a: float) -> Function:
    """The slope f' of the skew KL in the two forms that keep their digits below and above r = sqrt(e)."""
    log_odds = math.log1p(-a) - math.log(a)
    end = exp_excess(torch.tensor(math.log(a), dtype=torch.float64)).item()  # f'(inf) = -log a - (1 - a)

    def slope(x: Tensor) -> Tensor:
        y = -log_blend(-x.clamp(max=0.5), 1.0 - a, a)  # log p/M
        low = (1.0 - a) * y - a * exp_excess(y)
        high = end - exp_excess(-torch.nn.functional.softplus(log_odds - x.clamp(min=0.5)))
        return torch.where(x < 0.5, low, high)

    return slope


def skew_kl(a: float) -> Divergence:
    """Skew KL: KL(p || M) with M = a p + (1 - a) q, bounded by log(1/a).

    h(r) = (1 - a)^2 r / (a r + 1 - a)^2. a = 0 is KL(p || q). A small a keeps most of its mode-covering
    gradient but bounds the weight where q has lost the teacher. Its dual is :func:`skew_reverse_kl` of the
    same a.

    Args:
        a: The share of the teacher mixed into the student, 0 <= a < 1.

    Returns:
        The divergence, named ``skew_kl:a``.

    Raises:
        UserError: ``a`` is not in [0, 1).
    """
    a = _share("skew_kl", a, zero=True)
    name = family_name("skew_kl", a)
    if a == 0:
        return dataclasses.replace(KL, name=name, swapped=lambda: skew_reverse_kl(0.0))
    rest = 1.0 - a

    def f(x: Tensor) -> Tensor:
        x = bounded(x)
        return bounded_exp(log_blend(x, a, rest)) * entropy_excess(-log_blend(-x, rest, a))

    def d2f(x: Tensor) -> Tensor:
        exponent = 2 * math.log(rest) - x - 2 * log_blend(x, a, rest)
        return torch.exp(exponent.clamp(max=log_max(x.dtype) - 1.0))  # twice it is still finite

    slope = _skew_kl_slope(a)
    return Divergence(
        name=name,
        f=f,
        df=slope,
        d2f=d2f,
        weight=lambda x: rest**2 * torch.exp(-log_blend(-x, rest, a) - log_blend(x, a, rest)),
        conjugate=numeric_conjugate(f, slope, d2f),
        swapped=lambda: skew_reverse_kl(a),
        at_zero=rest,
        conjugate_domain=(-math.inf, -math.log(a) - rest),
        conjugate_limit=rest**2 / a,
    )


def skew_reverse_kl(a: float) -> Divergence:
    """Skew reverse KL: KL(q || M) with M = (1 - a) p + a q, bounded by log(1/a).

    h(r) = (1 - a)^2 r^2 / ((1 - a) r + a)^2. a = 0 is KL(q || p). Its dual is :func:`skew_kl` of the same a.

    Args:
        a: The share of the student mixed into the teacher, 0 <= a < 1.

    Returns:
        The divergence, named ``skew_reverse_kl:a``.

    Raises:
        UserError: ``a`` is not in [0, 1).
    """
    a = _share("skew_reverse_kl", a, zero=True)
    name = family_name("skew_reverse_kl", a)
    if a == 0:
        return dataclasses.replace(REVERSE_KL, name=name, swapped=lambda: skew_kl(0.0))
    rest = 1.0 - a
    lowest = -(rest**2) / a  # f'(0); below it the supremum sits at r = 0

    def conjugate(t: Tensor) -> Tensor:
        x = t.clamp(min=lowest)
        return -torch.log1p(-x / rest) - (a / rest) * x

    return Divergence(
        name=name,
        f=lambda x: exp_excess(log_blend(x, rest, a)),
        df=lambda x: -rest * expm1(-log_blend(x, rest, a)),
        d2f=lambda x: rest**2 * torch.exp(-2 * log_blend(x, rest, a)),
        weight=lambda x: rest**2 * torch.exp(-2 * log_blend(-x, a, rest)),
        conjugate=conjugate,
        swapped=lambda: skew_kl(a),
        at_zero=-math.log(a) - rest,
        conjugate_domain=(-math.inf, rest),
    )
