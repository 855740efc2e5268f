"""An f-divergence from the user's own generator, with every derivative by automatic differentiation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence
from distmatch.divergences.numerics import narrow, numeric_conjugate

_GRID = 8.0  # f is checked for |log r| up to this: the range in which ratios are kept in distillation
_REACHES = (700.0, 350.0, 60.0, 30.0, 15.0, _GRID)  # how far f is followed, if it is still finite there


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
            f"r = {log_r[worst].exp().item():.3g}. E_q[f(p/q)] is then not a divergence: its gradient "
            f"can move the student away from the teacher.",
            stacklevel=3,
        )


def _limit(f: Callable[[Tensor], Tensor], sign: float) -> float:
    """The limit of f(r) for log r to sign * inf: its value far out where it has settled, else inf."""
    for reach in _REACHES:
        half, full = f(torch.tensor([0.5 * sign * reach, sign * reach], dtype=torch.float64).exp()).tolist()
        if math.isfinite(half) and math.isfinite(full):
            return full if abs(full - half) <= 1e-6 * max(1.0, abs(full)) else math.inf
    return math.inf


def _reach(slope: Callable[[Tensor], Tensor]) -> float:
    """The largest distance at which f' is finite on both sides, as a range for the conjugate's search."""
    for reach in _REACHES:
        if bool(slope(torch.tensor([-reach, reach], dtype=torch.float64)).isfinite().all()):
            return reach
    return _GRID


def custom(
    f: Callable[[Tensor], Tensor], name: str = "custom", *, limits: tuple[float, float] | None = None
) -> Divergence:
    """A divergence from a generator of your own.

    Everything is computed in float64 from r = exp(log r); f', f'' and h = r^2 f'' by automatic
    differentiation, the conjugate by Newton's method inside a bracket, as far out as f' is finite in float64
    (at most |log r| <= 700). The generator is centered (f'(1) (r - 1) is subtracted), which changes no
    divergence. Far from r = 1 the digits are those of your
    formula: f'' of ``log(r + 1) - log(r)``, say, is rounding error beyond r = 1e8.

    Args:
        f: The generator as an elementwise torch function of r > 0, convex, with f(1) = 0. For example
            ``lambda r: r * r.log()`` is KL(p || q).
        name: Its name in messages and logs.
        limits: f(0) and lim f(r)/r for r to infinity, of the generator as you wrote it; inf where there is
            none. None: read off far out; a limit approached slower than by a power 0.04 of r is then taken
            for inf.

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

    at_zero, at_infinity = limits or (_limit(f, -1.0), _limit(lambda r: f(r) / r, 1.0))

    def swapped() -> Divergence:
        ends = (at_infinity, at_zero - offset)
        return custom(lambda r: r * (f(1.0 / r) - offset), f"{name}_dual", limits=ends)

    centered = of_log_ratio(lambda r: f(r) - offset - tilt * (r - 1.0))
    centered_slope = of_log_ratio(lambda r: first(r) - tilt)
    curvature = of_log_ratio(second)
    reach = _reach(lambda x: first(x.exp()))
    search = numeric_conjugate(centered, centered_slope, curvature, reach)
    searched = float(centered_slope(torch.tensor([reach], dtype=torch.float64)))

    def conjugate(t: Tensor) -> Tensor:
        # Beyond the searched range the supremum is unknown: it is larger than any computed value.
        unseen = (t > searched) if math.isinf(at_infinity) else torch.zeros_like(t, dtype=torch.bool)
        return torch.where(unseen, torch.full_like(t, math.inf), search(t))

    return Divergence(
        name=name,
        f=centered,
        df=centered_slope,
        d2f=curvature,
        weight=of_log_ratio(lambda r: r * r * second(r)),
        conjugate=conjugate,
        conjugate_domain=(-math.inf, at_infinity - tilt),
        at_zero=at_zero - offset + tilt,
        swapped=swapped,
        differentiable=bool((weight.abs() > 1e-12).any()),
    )
