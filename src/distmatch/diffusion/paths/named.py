"""The paths with a name: what each is in time, and the time of a noise-to-signal ratio.

The closed forms below the constructors are written without cancellation, so that they are exact to rounding
at both ends; all take float64 tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number, check_rising
from distmatch.base.errors import UserError
from distmatch.diffusion.paths.core import NoisePath, check_times
from distmatch.diffusion.predictions import Coefficients


def vp(
    beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5, t_max: float = 1.0
) -> NoisePath:
    """The variance-preserving path with linear beta (Song et al. 2021).

    ``alpha = exp(-B/2)``, ``sigma^2 = 1 - alpha^2``, ``B(t) = beta_min t + (beta_max - beta_min) t^2 / 2``.
    Some code stops sampling at t = 1e-3, or has 19.9 or 19.1 for the slope: give what the teacher was trained
    with.

    Args:
        beta_min: Rate at t = 0, per unit of time.
        beta_max: Rate at t = 1.
        t_min: Smallest time.
        t_max: Largest time.
    """
    return _with_rates("vp", _vp_at, _vp_inverse, beta_min, beta_max, t_min, t_max)


def sub_vp(
    beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5, t_max: float = 1.0
) -> NoisePath:
    """The sub-variance-preserving path (Song et al. 2021): alpha = exp(-B/2), sigma = 1 - alpha^2.

    Args:
        beta_min: Rate at t = 0, per unit of time.
        beta_max: Rate at t = 1.
        t_min: Smallest time.
        t_max: Largest time.
    """
    return _with_rates("sub-vp", _sub_vp_at, _sub_vp_inverse, beta_min, beta_max, t_min, t_max)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> NoisePath:
    """The variance-exploding path (Song et al. 2021): alpha = 1, sigma geometric in t from 0 to 1.

    Args:
        sigma_min: Noise level at t = 0.
        sigma_max: Noise level at t = 1.
    """
    check_rising(sigma_min=sigma_min, sigma_max=sigma_max)
    s = (sigma_min, sigma_max)
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    return NoisePath("ve", 0.0, 1.0, partial(_ve_at, *s), partial(_ve_inverse, *s), options)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoisePath:
    """The path of EDM (Karras et al. 2022): alpha = 1, sigma = t; the frame of all denoisers here.

    Args:
        sigma_min: Smallest noise level.
        sigma_max: Largest noise level.
    """
    check_rising(sigma_min=sigma_min, sigma_max=sigma_max)
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    return NoisePath("edm", sigma_min, sigma_max, _edm_at, torch.clone, options)


def cosine(k: float = 0.008, *, t_min: float = 1e-4, t_max: float = 0.999) -> NoisePath:
    """The cosine path (Nichol and Dhariwal 2021): alpha = cos(h) / cos(h at 0), h = pi/2 (t + k) / (1 + k).

    Args:
        k: Offset that keeps the first noise levels from being too small.
        t_min: Smallest time.
        t_max: Largest time, at most 1; at 1 it is pure noise.
    """
    check_number("the offset of the cosine path", k, "[0, 1)", fix="it is usually 0.008")
    check_times("cosine", t_min, t_max, 0.0, 1.0)
    options = {"k": k, "t_min": t_min, "t_max": t_max}
    return NoisePath("cosine", t_min, t_max, partial(_cosine_at, k), partial(_cosine_inverse, k), options)


def condot(sigma_floor: float = 0.0, *, t_min: float = 1e-3, t_max: float = 0.999) -> NoisePath:
    """The straight path of rectified flow and conditional optimal transport: alpha = 1 - t, sigma = t.

    Time runs from data to noise here. Lipman et al. (2023) count the other way and keep a floor of noise,
    ``sigma = 1 - (1 - sigma_floor) (1 - t)``. All functions take t = 0 and t = 1 too; the ends below are
    where a sampler that works on rho starts and stops.

    Args:
        sigma_floor: Noise left at t = 0.
        t_min: Smallest time.
        t_max: Largest time, at most 1; at 1 it is pure noise.
    """
    check_number("the noise floor of the straight path", sigma_floor, "[0, 1)")
    check_times("straight", t_min, t_max, 0.0, 1.0)
    options = {"sigma_floor": sigma_floor, "t_min": t_min, "t_max": t_max}
    curve, inverse = partial(_condot_at, sigma_floor), partial(_condot_inverse, sigma_floor)
    return NoisePath("condot", t_min, t_max, curve, inverse, options)


def trigflow(sigma_data: float = 0.5, *, rho_min: float = 0.002, rho_max: float = 80.0) -> NoisePath:
    """TrigFlow (Lu and Song 2024): alpha = cos t, sigma = sigma_data sin t, so rho = sigma_data tan t.

    Args:
        sigma_data: Standard deviation of the data; the noise has it too.
        rho_min: Smallest noise-to-signal ratio.
        rho_max: Largest noise-to-signal ratio; infinite ends at pi / 2, pure noise.
    """
    check_number("sigma_data", sigma_data, "(0, inf)")
    if not 0 <= rho_min < rho_max:
        raise UserError("noise-to-signal ratios must rise", got=f"rho_min={rho_min}, rho_max={rho_max}")
    ends = (math.atan(rho_min / sigma_data), math.atan(rho_max / sigma_data))
    options = {"sigma_data": sigma_data, "rho_min": rho_min, "rho_max": rho_max}
    curve, inverse = partial(_trigflow_at, sigma_data), partial(_trigflow_inverse, sigma_data)
    return NoisePath("trigflow", *ends, curve, inverse, options)


PATHS: Mapping[str, Callable[..., NoisePath]] = {
    "vp": vp,
    "sub-vp": sub_vp,
    "ve": ve,
    "edm": edm,
    "cosine": cosine,
    "condot": condot,
    "rectified-flow": condot,
    "flow-matching": condot,
    "trigflow": trigflow,
}


def noise_path(name: str | NoisePath, **options: float) -> NoisePath:
    """The path of a name, or the path itself.

    Args:
        name: One of :data:`PATHS`, or a path.
        options: Arguments of its constructor.

    Raises:
        UserError: The name or an option is unknown.
    """
    if isinstance(name, NoisePath):
        if options:
            raise UserError("a finished path takes no options", got=options, fix="pass its name instead")
        return name
    check_name("noise path", name, PATHS)
    try:
        return PATHS[name](**options)
    except TypeError as error:
        raise UserError(f"the {name} path does not take these options", got=error) from error


def _with_rates(
    name: str,
    at: Callable[..., Coefficients],
    inverse: Callable[..., Tensor],
    beta_min: float,
    beta_max: float,
    t_min: float,
    t_max: float,
) -> NoisePath:
    if not 0 < beta_min <= beta_max < math.inf:
        raise UserError(
            "the rates of a variance-preserving path must be positive and not fall",
            got=f"beta_min={beta_min}, beta_max={beta_max}",
            expected="0 < beta_min <= beta_max; 0.1 and 20, usually",
        )
    check_times(name, t_min, t_max, 0.0, math.inf)
    b = (beta_min, beta_max)
    options = {"beta_min": beta_min, "beta_max": beta_max, "t_min": t_min, "t_max": t_max}
    return NoisePath(name, t_min, t_max, partial(at, *b), partial(inverse, *b), options)


def _integral(beta_min: float, beta_max: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """The rate at t and its integral B from 0."""
    slope = beta_max - beta_min
    return beta_min + slope * t, beta_min * t + 0.5 * slope * t**2


def _integral_inverse(beta_min: float, beta_max: float, b: Tensor) -> Tensor:
    """The time at which the integral of the rate is ``b``."""
    return 2 * b / (beta_min + (beta_min**2 + 2 * (beta_max - beta_min) * b).sqrt())


def _vp_at(beta_min: float, beta_max: float, t: Tensor) -> Coefficients:
    """``alpha = exp(-B/2), sigma = sqrt(1 - exp(-B))``."""
    rate, b = _integral(beta_min, beta_max, t)
    alpha, sigma = torch.exp(-b / 2), (-torch.expm1(-b)).sqrt()
    return Coefficients(alpha, sigma, -rate / 2 * alpha, rate * alpha**2 / (2 * sigma))


def _vp_inverse(beta_min: float, beta_max: float, rho: Tensor) -> Tensor:
    """rho^2 = exp(B) - 1."""
    return _integral_inverse(beta_min, beta_max, torch.log1p(rho**2))


def _sub_vp_at(beta_min: float, beta_max: float, t: Tensor) -> Coefficients:
    """``alpha = exp(-B/2), sigma = 1 - exp(-B)``."""
    rate, b = _integral(beta_min, beta_max, t)
    alpha = torch.exp(-b / 2)
    return Coefficients(alpha, -torch.expm1(-b), -rate / 2 * alpha, rate * alpha**2)


def _sub_vp_inverse(beta_min: float, beta_max: float, rho: Tensor) -> Tensor:
    """``rho = 2 sinh(B/2)``."""
    return _integral_inverse(beta_min, beta_max, 2 * torch.asinh(rho / 2))


def _ve_at(sigma_min: float, sigma_max: float, t: Tensor) -> Coefficients:
    """``alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t``."""
    growth = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(growth * t)
    return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), growth * sigma)


def _ve_inverse(sigma_min: float, sigma_max: float, rho: Tensor) -> Tensor:
    """``rho = sigma``."""
    return torch.log(rho / sigma_min) / math.log(sigma_max / sigma_min)


def _edm_at(t: Tensor) -> Coefficients:
    """``alpha = 1, sigma = t``."""
    return Coefficients(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))


def _cosine_at(k: float, t: Tensor) -> Coefficients:
    """``alpha = cos h / cos h0, sigma^2 = 1 - alpha^2``; ``h = pi/2 (t + k) / (1 + k)``, h0 at t = 0."""
    turn, h0, h = _angles(k, t)
    # cos h as a sine of the angle left to pi/2, and 1 - alpha^2 as a product of sines: no cancellation.
    alpha = torch.sin(turn * (1 - t)) / math.cos(h0)
    sigma = (torch.sin(turn * t) * torch.sin(h + h0)).sqrt() / math.cos(h0)
    d_alpha = -turn * torch.sin(h) / math.cos(h0)
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def _cosine_inverse(k: float, rho: Tensor) -> Tensor:
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


def _condot_at(sigma_floor: float, t: Tensor) -> Coefficients:
    """``alpha = 1 - t, sigma = floor + (1 - floor) t``."""
    sigma = sigma_floor + (1 - sigma_floor) * t
    return Coefficients(1 - t, sigma, -torch.ones_like(t), torch.full_like(t, 1 - sigma_floor))


def _condot_inverse(sigma_floor: float, rho: Tensor) -> Tensor:
    """``rho = (floor + (1 - floor) t) / (1 - t)``."""
    t = (rho - sigma_floor) / (rho + 1 - sigma_floor)
    return torch.where(rho.isinf(), 1.0, t)


def _trigflow_at(sigma_data: float, t: Tensor) -> Coefficients:
    """``alpha = cos t, sigma = sigma_data sin t``."""
    cosine, sine = t.cos(), t.sin()
    return Coefficients(cosine, sigma_data * sine, -sine, sigma_data * cosine)


def _trigflow_inverse(sigma_data: float, rho: Tensor) -> Tensor:
    """``rho = sigma_data tan t``."""
    return torch.atan(rho / sigma_data)
