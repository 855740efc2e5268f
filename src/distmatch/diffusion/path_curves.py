"""The closed forms behind the noise paths: alpha, sigma and derivatives at t, and t at rho = sigma / alpha.

Each is written without cancellation, so that it is exact to rounding at both ends; all take float64 tensors
of any shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.predictions import Coefficients


def check_times(name: str, t_min: float, t_max: float, low: float, high: float) -> None:
    """Refuses times of a path that do not satisfy ``low <= t_min < t_max <= high``.

    Raises:
        UserError: They do not.
    """
    if not (low <= t_min < t_max <= high and t_max < math.inf):
        raise UserError(
            f"the times of the {name} path are out of order or out of its range",
            got=f"t_min={t_min}, t_max={t_max}",
            expected=f"{low:g} <= t_min < t_max <= {high:g}, finite",
        )


def check_levels(low: float, high: float) -> None:
    """Refuses noise levels that do not satisfy ``0 < low < high < inf``.

    Raises:
        UserError: They do not.
    """
    if not 0 < low < high < math.inf:
        raise UserError(
            "noise levels must satisfy 0 < sigma_min < sigma_max",
            got=f"sigma_min={low}, sigma_max={high}",
        )


def check_rates(beta_min: float, beta_max: float) -> None:
    """Refuses rates that do not satisfy ``0 < beta_min <= beta_max < inf``.

    Raises:
        UserError: They do not.
    """
    if not 0 < beta_min <= beta_max < math.inf:
        raise UserError(
            "the rates of a variance-preserving path must be positive and not fall",
            got=f"beta_min={beta_min}, beta_max={beta_max}",
            expected="0 < beta_min <= beta_max; 0.1 and 20, usually",
        )


def _integral(beta_min: float, beta_max: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """The rate at t and its integral B from 0."""
    slope = beta_max - beta_min
    return beta_min + slope * t, beta_min * t + 0.5 * slope * t**2


def _integral_inverse(beta_min: float, beta_max: float, b: Tensor) -> Tensor:
    """The time at which the integral of the rate is ``b``."""
    return 2 * b / (beta_min + (beta_min**2 + 2 * (beta_max - beta_min) * b).sqrt())


def vp(beta_min: float, beta_max: float, t: Tensor) -> Coefficients:
    """``alpha = exp(-B/2), sigma = sqrt(1 - exp(-B))``."""
    rate, b = _integral(beta_min, beta_max, t)
    alpha, sigma = torch.exp(-b / 2), (-torch.expm1(-b)).sqrt()
    return Coefficients(alpha, sigma, -rate / 2 * alpha, rate * alpha**2 / (2 * sigma))


def vp_inverse(beta_min: float, beta_max: float, rho: Tensor) -> Tensor:
    """rho^2 = exp(B) - 1."""
    return _integral_inverse(beta_min, beta_max, torch.log1p(rho**2))


def sub_vp(beta_min: float, beta_max: float, t: Tensor) -> Coefficients:
    """``alpha = exp(-B/2), sigma = 1 - exp(-B)``."""
    rate, b = _integral(beta_min, beta_max, t)
    alpha = torch.exp(-b / 2)
    return Coefficients(alpha, -torch.expm1(-b), -rate / 2 * alpha, rate * alpha**2)


def sub_vp_inverse(beta_min: float, beta_max: float, rho: Tensor) -> Tensor:
    """``rho = 2 sinh(B/2)``."""
    return _integral_inverse(beta_min, beta_max, 2 * torch.asinh(rho / 2))


def ve(sigma_min: float, sigma_max: float, t: Tensor) -> Coefficients:
    """``alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t``."""
    growth = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(growth * t)
    return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), growth * sigma)


def ve_inverse(sigma_min: float, sigma_max: float, rho: Tensor) -> Tensor:
    """``rho = sigma``."""
    return torch.log(rho / sigma_min) / math.log(sigma_max / sigma_min)


def edm(t: Tensor) -> Coefficients:
    """``alpha = 1, sigma = t``."""
    return Coefficients(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))


def cosine(k: float, t: Tensor) -> Coefficients:
    """``alpha = cos h / cos h0, sigma^2 = 1 - alpha^2``; ``h = pi/2 (t + k) / (1 + k)``, h0 at t = 0."""
    turn, h0, h = _angles(k, t)
    # cos h as a sine of the angle left to pi/2, and 1 - alpha^2 as a product of sines: no cancellation.
    alpha = torch.sin(turn * (1 - t)) / math.cos(h0)
    sigma = (torch.sin(turn * t) * torch.sin(h + h0)).sqrt() / math.cos(h0)
    d_alpha = -turn * torch.sin(h) / math.cos(h0)
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def cosine_inverse(k: float, rho: Tensor) -> Tensor:
    """``tan^2 h = (rho^2 + sin^2 h0) / cos^2 h0``; ``h - h0`` comes from the difference of tangents."""
    turn, h0, _ = _angles(k, rho)
    tangent = (rho**2 + math.sin(h0) ** 2).sqrt() / math.cos(h0)
    start, scaled = math.tan(h0), rho / math.cos(h0)
    # 0 / 0 at rho = 0 when there is no offset.
    difference = scaled * (scaled / (tangent + start)).nan_to_num(0.0)
    t = torch.atan2(difference, 1 + tangent * start) / turn
    return torch.where(rho.isinf(), 1.0, t)


def _angles(k: float, t: Tensor) -> tuple[float, float, Tensor]:
    turn = math.pi / 2 / (1 + k)
    return turn, turn * k, turn * (t + k)


def condot(sigma_floor: float, t: Tensor) -> Coefficients:
    """``alpha = 1 - t, sigma = floor + (1 - floor) t``."""
    sigma = sigma_floor + (1 - sigma_floor) * t
    return Coefficients(1 - t, sigma, -torch.ones_like(t), torch.full_like(t, 1 - sigma_floor))


def condot_inverse(sigma_floor: float, rho: Tensor) -> Tensor:
    """``rho = (floor + (1 - floor) t) / (1 - t)``."""
    t = (rho - sigma_floor) / (rho + 1 - sigma_floor)
    return torch.where(rho.isinf(), 1.0, t)


def trigflow(sigma_data: float, t: Tensor) -> Coefficients:
    """``alpha = cos t, sigma = sigma_data sin t``."""
    cosine, sine = t.cos(), t.sin()
    return Coefficients(cosine, sigma_data * sine, -sine, sigma_data * cosine)


def trigflow_inverse(sigma_data: float, rho: Tensor) -> Tensor:
    """``rho = sigma_data tan t``."""
    return torch.atan(rho / sigma_data)
