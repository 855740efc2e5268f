"""Weighted sums of divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence, Function
from distmatch.divergences.numerics import numeric_conjugate


def _weighted(functions: list[Function], weights: list[float]) -> Function:
    def total(x: Tensor) -> Tensor:
        parts = [w * f(x) for f, w in zip(functions, weights, strict=True)]
        return sum(parts[1:], start=parts[0])

    return total


def _checked_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    shares = [1.0 / count] * count if weights is None else [float(w) for w in weights]
    check_equal("the numbers of divergences and of weights", count, len(shares))
    if not all(math.isfinite(w) and w >= 0 for w in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise UserError(
            "the weights of a mixture must be shares",
            got=shares,
            expected="numbers of at least 0 that sum to 1",
            fix="divide them by their sum",
        )
    return shares


def mixture(
    divergences: Sequence[Divergence], weights: Sequence[float] | None = None, name: str | None = None
) -> Divergence:
    """The divergence sum_i w_i D_i, with generator sum_i w_i f_i.

    All its functions are the weighted sums of theirs, except the conjugate, which is searched numerically
    (Newton). ``mixture([KL, reverse KL])`` is half of Jeffreys.

    Args:
        divergences: At least one.
        weights: One share for each, at least 0 and with sum 1; None: equal shares.
        name: Its name; None: ``mixture(0.5*kl+0.5*tv)`` or the like.

    Returns:
        The divergence. It drives distillation only if every part does: the gradient of a part with a kink
        (total variation) would be lost without a word.

    Raises:
        UserError: There is no divergence, or the weights are no shares.
    """
    if not divergences:
        raise UserError(
            "a mixture needs at least one divergence", got="none", expected="a list of divergences"
        )
    shares = _checked_weights(len(divergences), weights)
    # A part of weight 0 is left out: 0 times an infinite value would be NaN.
    kept = [(d, w) for d, w in zip(divergences, shares, strict=True) if w > 0]
    parts, shares = [d for d, _ in kept], [w for _, w in kept]

    def total(pick: Callable[[Divergence], float]) -> float:
        return sum(w * pick(d) for d, w in kept)

    f = _weighted([d.f for d in parts], shares)
    df = _weighted([d.df for d in parts], shares)
    d2f = _weighted([d.d2f for d in parts], shares)
    title = name or f"mixture({'+'.join(f'{w:g}*{d.name}' for d, w in kept)})"
    dual_name = None if name is None else f"{name}_dual"
    return Divergence(
        name=title,
        f=f,
        df=df,
        d2f=d2f,
        weight=_weighted([d.weight for d in parts], shares),
        conjugate=numeric_conjugate(f, df, d2f),
        swapped=lambda: mixture([d.dual() for d in parts], shares, dual_name),
        at_zero=total(lambda d: d.at_zero),
        conjugate_domain=(-math.inf, total(lambda d: d.conjugate_domain[1])),
        conjugate_limit=total(lambda d: d.conjugate_limit),
        differentiable=all(d.differentiable for d in parts),
    )
