"""Exponentials of a log-ratio that keep their digits near zero, stay finite, and have exact gradients.

Three things go wrong with the textbook formulas in float32: ``exp`` overflows (and its gradient becomes NaN),
differences cancel near r = 1, and autograd rebuilds ``exp(x)`` from ``expm1(x) + 1``, which loses small
gradients.
Every function here is elementwise, keeps the dtype, and propagates NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Function = Callable[[Tensor], Tensor]

LOG2 = math.log(2.0)
_NEAR = 0.5
# 1/k! for k = 2..16: the remainder for |x| <= 0.5 is below float64 rounding.
_SERIES = [1.0 / math.factorial(k) for k in range(2, 17)]


def log_max(dtype: torch.dtype) -> float:
    """The largest x for which exp(x) is still finite in ``dtype`` (a little less, to allow for rounding)."""
    return math.log(torch.finfo(dtype).max) - 1e-4


def blend(
    x: Tensor, near: Callable[[Tensor], Tensor], far: Callable[[Tensor], Tensor], width: float = _NEAR
) -> Tensor:
    """``near(x)`` where |x| < width, else ``far(x)``; the near form never sees a large number."""
    return torch.where(x.abs() < width, near(x.clamp(-width, width)), far(x))


def bounded(x: Tensor, low: float | None = None) -> Tensor:
    """Holds log r where products of r and log r, and their backward passes, are finite."""
    top = log_max(x.dtype)
    return x.clamp(low, top - math.log(top) - 1.0)


def constant(x: Tensor, value: float) -> Tensor:
    """``value`` everywhere, but NaN where ``x`` is NaN; its gradient is zero."""
    return torch.where(x.isnan(), x, torch.full_like(x, value))


def bounded_exp(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * exp(x)`` with its size held below the largest finite number; ``scale`` is not 0."""
    return scale * torch.exp(x.clamp(max=log_max(x.dtype) - max(0.0, math.log(abs(scale)))))


def power(log_r: Tensor, exponent: float, scale: float = 1.0) -> Tensor:
    """``scale * r**exponent``, bounded; also right for exponent 0 and an infinite log-ratio."""
    if exponent == 0:
        return constant(log_r, scale)
    top = log_max(log_r.dtype) - max(0.0, math.log(abs(exponent) * max(1.0, scale)))  # room for the gradient
    return scale * torch.exp((exponent * log_r).clamp(max=top))


def expm1(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * (exp(x) - 1)``, bounded, with a gradient that does not underflow for negative ``x``."""
    return blend(x, lambda y: scale * torch.expm1(y), lambda y: bounded_exp(y, scale) - scale)


def exp_curvature(x: Tensor) -> Tensor:
    """``(exp(x) - 1 - x) / x^2`` for |x| <= 0.5, by its Taylor series."""
    total = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        total = total * x + coefficient
    return total


def exp_excess(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * (exp(x) - 1 - x)``; with scale 1 the centered reverse-KL generator, never negative."""
    return blend(
        x,
        lambda y: scale * exp_curvature(y) * y * y,
        # Beyond 1000 the exponential has long been bounded; the clamp keeps inf - inf away.
        lambda y: bounded_exp(y, scale) - scale * (1.0 + y.clamp(max=1000.0)),
    )


def entropy_excess(x: Tensor) -> Tensor:
    """``x exp(x) - exp(x) + 1``, never negative: the centered KL generator."""
    y = bounded(x, -1000.0)  # below exp is 0 in every dtype, and 0 * inf is avoided
    return blend(
        y, lambda z: torch.exp(z) * exp_curvature(-z) * z * z, lambda z: 1.0 + torch.exp(z) * (z - 1.0)
    )


def log_mean(log_r: Tensor) -> Tensor:
    """``log((1 + r) / 2)``, the log-ratio of the half-half mixture to q."""
    return blend(log_r, lambda y: torch.log1p(0.5 * torch.expm1(y)), lambda y: -logsigmoid(-y) - LOG2)


def log_blend(x: Tensor, b: float, rest: float) -> Tensor:
    """``log(b r + rest)``, the log-ratio of the mixture b p + rest q to q; both positive, with sum 1.

    Both are taken because ``1 - b`` has lost the digits of a small ``rest``.
    """
    with torch.no_grad():
        excess = b * torch.expm1(x.clamp(max=log_max(x.dtype) - 1.0))
        near = (excess > -0.5) & (excess < 1.0)  # where log1p(excess) keeps all digits
    inside = torch.where(near, x, torch.zeros_like(x))
    log_b, log_rest = math.log(b), math.log(rest)
    return torch.where(
        near,
        torch.log1p(b * expm1(inside)),
        torch.logaddexp(x + log_b, torch.full_like(x, log_rest)),
    )


def family_name(family: str, order: float) -> str:
    """The name of a member, for example ``alpha:0.5``; it reads back as exactly the same number."""
    short = f"{order:g}"
    return f"{family}:{short if float(short) == order else repr(order)}"


def _maximizer(df: Function, d2f: Function, target: Tensor, reach: float) -> Tensor:
    """The log u in [-reach, reach] where f'(u) equals ``target``, by Newton steps inside a shrinking bracket.

    A step that leaves the bracket, or does not halve the one before, is replaced by a bisection: the search
    can not fail, at a kink or a pole it is merely as slow as bisection.
    """
    low, high = torch.full_like(target, -reach), torch.full_like(target, reach)
    below_all, above_all = df(low) >= target, df(high) <= target
    x, step = torch.zeros_like(target), torch.full_like(target, 2.0 * reach)
    done = below_all | above_all | target.isnan()
    for _ in range(200):
        gap = df(x) - target
        low, high = torch.where(gap < 0, x, low), torch.where(gap >= 0, x, high)
        newton = x - gap / (d2f(x) * torch.exp(x))  # df'/d(log u) = u f''(u)
        trusted = (newton >= low) & (newton <= high) & ((newton - x).abs() < 0.5 * step.abs())
        following = torch.where(trusted, newton, 0.5 * (low + high))
        step = torch.where(done, torch.zeros_like(x), following - x)
        x = torch.where(done, x, following)
        # A Newton step this small leaves an error of its square; at the next one rounding would take over.
        done = done | (step.abs() <= 1e-13 * x.abs().clamp(min=1.0))
        if bool(done.all()):
            break
    x = torch.where(below_all, torch.full_like(x, -reach), x)
    return torch.where(above_all, torch.full_like(x, reach), x)


def numeric_conjugate(f: Function, df: Function, d2f: Function, reach: float = 700.0) -> Function:
    """The convex conjugate ``sup_u (u t - f(u))`` by safeguarded Newton search of f'(u) = t, in float64.

    By the envelope theorem the gradient of the result is the maximizer u itself: the search needs no graph.

    Args:
        f: The generator as a function of log u.
        df: f' as a function of log u, non-decreasing.
        d2f: f'' as a function of log u.
        reach: The search covers |log u| <= reach.

    Returns:
        A function of t; its first derivative is exact, higher derivatives are not available.
    """

    def conjugate(t: Tensor) -> Tensor:
        with torch.no_grad():
            best = _maximizer(df, d2f, t.detach().double(), reach)
            value = f(best)
        return narrow(torch.exp(best) * t.double() - value, t.dtype)

    return conjugate


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts ``x`` to ``dtype``, holding what would overflow at the largest finite number."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
