"""A noise path from two functions of the user's: derivatives by autograd, time by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.paths.core import NoisePath, check_prior, check_times
from distmatch.diffusion.predictions import Coefficients

Curve = Callable[[Tensor], Tensor]

_CHECKED = 1001  # times at which a path is checked
_REACH = 40.0  # logit of the share of the time range: sigmoid(-40) = 4e-18
_HALVINGS = 60  # 2 * 40 / 2^60 = 7e-17 in the logit: rounding


def path_of(
    alpha: Curve,
    sigma: Curve,
    t_min: float = 0.0,
    t_max: float = 1.0,
    *,
    name: str = "custom",
    sigma_data: float = 0.5,
) -> NoisePath:
    """A path given by two functions, which are checked before they are used.

    Args:
        alpha: Factor of the clean sample, a differentiable torch function of float64 times of any shape.
        sigma: Factor of the noise, likewise.
        t_min: The time nearest to the data.
        t_max: The time nearest to pure noise; alpha may be 0 there.
        name: A name for messages.
        sigma_data: Standard deviation of the data, against which the last noise is held.

    Returns:
        The path. :meth:`NoisePath.t_of_rho` halves an interval 60 times and is exact to rounding.

    Raises:
        UserError: A function returns something of another shape, a value that is not finite or a negative
            one; the noise-to-signal ratio does not rise everywhere; or the path does not reach its prior.
    """
    check_times(name, t_min, t_max, -math.inf, math.inf)
    _check(alpha, sigma, torch.linspace(t_min, t_max, _CHECKED, dtype=torch.float64))
    curve = partial(_curve, alpha, sigma)
    inverse = partial(_inverse, alpha, sigma, t_min, t_max)
    path = NoisePath(name, t_min, t_max, curve, inverse, {"alpha": alpha, "sigma": sigma})
    check_prior(path, sigma_data)
    return path


def _curve(alpha: Curve, sigma: Curve, t: Tensor) -> Coefficients:
    (d_alpha, a), (d_sigma, s) = (_with_slope(curve, t) for curve in (alpha, sigma))
    return Coefficients(a, s, d_alpha, d_sigma)


def _with_slope(curve: Curve, t: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative and the value; works inside other transforms, as a likelihood's Jacobian is."""

    def summed(time: Tensor) -> tuple[Tensor, Tensor]:
        value = curve(time)
        return value.sum(), value

    return torch.func.grad(summed, has_aux=True)(t)


def _inverse(alpha: Curve, sigma: Curve, t_min: float, t_max: float, rho: Tensor) -> Tensor:
    """Bisection in the logit of the share of the range, which resolves times close to either end."""
    low, high = torch.full_like(rho, -_REACH), torch.full_like(rho, _REACH)
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            t = t_min + (t_max - t_min) * middle.sigmoid()
            # sigma against rho alpha, not sigma / alpha against rho: alpha may be 0.
            beyond = sigma(t) >= rho * alpha(t)
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    share = ((low + high) / 2).sigmoid()
    # Near an end the share itself is the answer, not its rounding against the other end.
    t = t_min + (t_max - t_min) * share
    t = torch.where(high >= _REACH, t_max, t)
    return torch.where(low <= -_REACH, t_min, t)


def _check(alpha: Curve, sigma: Curve, t: Tensor) -> None:
    a, s = alpha(t), sigma(t)
    for label, value in (("alpha", a), ("sigma", s)):
        if value.shape != t.shape:
            raise UserError(
                f"{label}(t) must return one number for each time",
                got=f"shape {tuple(value.shape)} for {tuple(t.shape)} times",
                fix="use torch functions of t; for a constant, torch.ones_like(t)",
            )
        bad = ~value.isfinite() | (value < 0)
        if bool(bad.any()):
            where = int(bad.int().argmax())
            raise UserError(
                f"{label}(t) must be finite and not negative from t_min to t_max",
                got=f"{label}({float(t[where]):.6g}) = {float(value[where]):.6g}",
                fix="choose t_min and t_max where the path is defined",
            )
    # The angle of (alpha, sigma) rises exactly when sigma / alpha does, and is finite at pure noise.
    falls = torch.atan2(s, a).diff() <= 0
    if bool(falls.any()):
        where = int(falls.int().argmax())
        raise UserError(
            "the noise-to-signal ratio of a path must rise with time",
            got=f"it does not between t={float(t[where]):.6g} and t={float(t[where + 1]):.6g}",
            fix="let time run from data to noise (replace t by 1 - t if yours runs the other way)",
        )
