"""An f-divergence from the user's own generator, with every derivative by automatic differentiation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.divergences.core import BETWEEN, MODE_COVERING, MODE_SEEKING, Divergence
from distmatch.divergences.numerics import narrow, numeric_conjugate

_GRID = 8.0  # f is checked for |log r| up to this: the range in which ratios are kept in distillation
_REACHES = (60.0, 40.0, 20.0, _GRID)  # how far the conjugate is searched, if f' is still finite there


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The elementwise derivative of an elementwise function."""
    return torch.func.grad(lambda r: function(r).sum())


def _evaluate(f: Callable[[Tensor], Tensor], log_r: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and r^2 f'' on a grid, or an error a newcomer can act on."""
    r = log_r.exp()
    value = f(r)
    if not isinstance(value, Tensor) or value.shape != r.shape:
        raise UserError(
            f"the generator of {name} is not elementwise",
            got=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
            expected=f"a tensor of the shape of its argument, {tuple(r.shape)}",
            fix="write f with elementwise torch functions of r",
        )
    slope = _derivative(f)(r)
    weight = r * r * _derivative(_derivative(f))(r)
    bad = ~(value.isfinite() & slope.isfinite() & weight.isfinite())
    if bad.any():
        raise UserError(
            f"the generator of {name} or a derivative is not finite",
            got=f"r = {r[bad][0].item():.4g}",
            expected=f"finite values for {math.exp(-_GRID):.2g} <= r <= {math.exp(_GRID):.2g}",
            fix="check its domain: f must be defined for every r > 0",
        )
    return value, slope, weight


def _warn_if_not_convex(log_r: Tensor, value: Tensor, slope: Tensor, weight: Tensor, name: str) -> None:
    # r^2 f'' is a difference of terms of the size of f and r f': what is below their rounding is no evidence.
    rounding = 1e-9 * (value.abs() + (log_r.exp() * slope).abs() + 1e-6)
    worst = int(torch.argmin(weight + rounding))
    if weight[worst] < -rounding[worst]:
        warnings.warn(
            f"the generator of {name} is not convex: r^2 f''(r) = {weight[worst].item():.3g} at "
            f"r = {log_r[worst].exp().item():.3g}. E_q[f(p/q)] is then no divergence: its gradient can "
            "push the student away from the teacher.",
            stacklevel=3,
        )


def _mode_seeking(log_r: Tensor, weight: Tensor) -> str:
    """By the slope of log h over two decades, which is ``a`` for the alpha family."""
    inner = (log_r.abs() <= 2.0) & (weight > 0)
    if int(inner.sum()) < 2:
        return BETWEEN
    x, y = log_r[inner], weight[inner].log()
    slope = float((y[-1] - y[0]) / (x[-1] - x[0]))
    return MODE_SEEKING if slope < 0.01 else MODE_COVERING if slope > 0.99 else BETWEEN


def custom(
    f: Callable[[Tensor], Tensor], name: str = "custom", *, upper_bound: float = math.inf
) -> Divergence:
    """A divergence from a generator of your own.

    Everything is computed in float64 from r = exp(log r); f', f'' and h = r^2 f'' by automatic
    differentiation, the conjugate by bisection over |log r| <= 60. The generator is centred
    (f'(1) (r - 1) is subtracted), which changes no divergence. Far from r = 1 the digits are those of your
    formula: f'' of ``log(r + 1) - log(r)``, say, is rounding error beyond r = 1e8.

    Args:
        f: The generator as an elementwise torch function of r > 0, convex, with f(1) = 0. For example
            ``lambda r: r * r.log()`` is KL(p || q).
        name: Its name in messages and logs.
        upper_bound: The largest value the divergence can take, if you know it.

    Returns:
        The divergence.

    Raises:
        UserError: ``f`` is not elementwise, or not finite on exp(-8) <= r <= exp(8).

    Warns:
        UserWarning: ``f`` is not convex, or f(1) is not 0 (it is then shifted by a constant).
    """
    grid = torch.linspace(-_GRID, _GRID, 257, dtype=torch.float64)  # log r = 0 is the middle node
    value, slope, weight = _evaluate(f, grid, name)
    offset, tilt = float(value[128]), float(slope[128])
    if abs(offset) > 1e-9:
        warnings.warn(
            f"the generator of {name} has f(1) = {offset:.6g}, not 0; it is shifted by that constant so that "
            "the divergence of equal distributions is 0.",
            stacklevel=2,
        )
    _warn_if_not_convex(grid, value, slope, weight, name)
    first, second = _derivative(f), _derivative(_derivative(f))

    def of_log_ratio(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda log_r: narrow(function(log_r.double().clamp(-700.0, 700.0).exp()), log_r.dtype)

    def swapped() -> Divergence:
        return custom(lambda r: r * (f(1.0 / r) - offset), f"{name}_dual", upper_bound=upper_bound)

    centred = of_log_ratio(lambda r: f(r) - offset - tilt * (r - 1.0))
    centred_slope = of_log_ratio(lambda r: first(r) - tilt)
    ends = {x: centred_slope(torch.tensor([-x, x], dtype=torch.float64)) for x in _REACHES}
    reach = next((x for x in _REACHES if bool(torch.isfinite(ends[x]).all())), _GRID)
    return Divergence(
        name=name,
        f=centred,
        df=centred_slope,
        d2f=of_log_ratio(second),
        weight=of_log_ratio(lambda r: r * r * second(r)),
        conjugate=numeric_conjugate(centred, centred_slope, reach),
        conjugate_domain=(-math.inf, float(ends[reach][1])),
        swapped=swapped,
        mode_seeking=_mode_seeking(grid, weight),
        upper_bound=upper_bound,
        differentiable=bool((weight.abs() > 1e-12).any()),
    )
