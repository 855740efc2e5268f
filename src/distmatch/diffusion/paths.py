"""Noise paths x_t = alpha(t) x0 + sigma(t) eps: from one time to everything that follows from it.

Time grows from data to noise. All arithmetic is float64. A denoiser depends on the noise-to-signal ratio
``rho = sigma / alpha`` alone, so a path matters only where time itself does: what a network is told, grids in
time, samples at an intermediate time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion import path_curves as curves
from distmatch.diffusion.custom_paths import path_of
from distmatch.diffusion.discrete_paths import DiscretePath, betas, discrete_path
from distmatch.diffusion.path_core import NoisePath, check_prior

__all__ = [
    "PATHS",
    "DiscretePath",
    "NoisePath",
    "betas",
    "check_prior",
    "condot",
    "cosine",
    "discrete_path",
    "edm",
    "noise_path",
    "path_of",
    "sub_vp",
    "trigflow",
    "ve",
    "vp",
]


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
    curves.check_rates(beta_min, beta_max)
    curves.check_times("VP", t_min, t_max, 0.0, math.inf)
    b = (beta_min, beta_max)
    options = {"beta_min": beta_min, "beta_max": beta_max, "t_min": t_min, "t_max": t_max}
    return NoisePath("vp", t_min, t_max, partial(curves.vp, *b), partial(curves.vp_inverse, *b), options)


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
    curves.check_rates(beta_min, beta_max)
    curves.check_times("sub-VP", t_min, t_max, 0.0, math.inf)
    b = (beta_min, beta_max)
    options = {"beta_min": beta_min, "beta_max": beta_max, "t_min": t_min, "t_max": t_max}
    return NoisePath(
        "sub-vp", t_min, t_max, partial(curves.sub_vp, *b), partial(curves.sub_vp_inverse, *b), options
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> NoisePath:
    """The variance-exploding path (Song et al. 2021): alpha = 1, sigma geometric in t from 0 to 1.

    Args:
        sigma_min: Noise level at t = 0.
        sigma_max: Noise level at t = 1.
    """
    curves.check_levels(sigma_min, sigma_max)
    s = (sigma_min, sigma_max)
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    return NoisePath("ve", 0.0, 1.0, partial(curves.ve, *s), partial(curves.ve_inverse, *s), options)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoisePath:
    """The path of EDM (Karras et al. 2022): alpha = 1, sigma = t; the frame of all denoisers here.

    Args:
        sigma_min: Smallest noise level.
        sigma_max: Largest noise level.
    """
    curves.check_levels(sigma_min, sigma_max)
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    return NoisePath("edm", sigma_min, sigma_max, curves.edm, torch.clone, options)


def cosine(k: float = 0.008, *, t_min: float = 1e-4, t_max: float = 0.999) -> NoisePath:
    """The cosine path (Nichol and Dhariwal 2021): alpha = cos(h) / cos(h at 0), h = pi/2 (t + k) / (1 + k).

    Args:
        k: Offset that keeps the first noise levels from being too small.
        t_min: Smallest time.
        t_max: Largest time, at most 1; at 1 it is pure noise.
    """
    if not 0 <= k < 1:
        raise UserError("the offset of the cosine path must lie in [0, 1)", got=k, expected="0.008, usually")
    curves.check_times("cosine", t_min, t_max, 0.0, 1.0)
    options = {"k": k, "t_min": t_min, "t_max": t_max}
    return NoisePath(
        "cosine", t_min, t_max, partial(curves.cosine, k), partial(curves.cosine_inverse, k), options
    )


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
    if not 0 <= sigma_floor < 1:
        raise UserError("the noise floor of the straight path must lie in [0, 1)", got=sigma_floor)
    curves.check_times("straight", t_min, t_max, 0.0, 1.0)
    options = {"sigma_floor": sigma_floor, "t_min": t_min, "t_max": t_max}
    curve, inverse = partial(curves.condot, sigma_floor), partial(curves.condot_inverse, sigma_floor)
    return NoisePath("condot", t_min, t_max, curve, inverse, options)


def trigflow(sigma_data: float = 0.5, *, rho_min: float = 0.002, rho_max: float = 80.0) -> NoisePath:
    """TrigFlow (Lu and Song 2024): alpha = cos t, sigma = sigma_data sin t, so rho = sigma_data tan t.

    Args:
        sigma_data: Standard deviation of the data; the noise has it too.
        rho_min: Smallest noise-to-signal ratio.
        rho_max: Largest noise-to-signal ratio; infinite ends at pi / 2, pure noise.
    """
    if not 0 < sigma_data < math.inf:
        raise UserError("sigma_data must be positive and finite", got=sigma_data)
    if not 0 <= rho_min < rho_max:
        raise UserError("noise-to-signal ratios must rise", got=f"rho_min={rho_min}, rho_max={rho_max}")
    ends = (math.atan(rho_min / sigma_data), math.atan(rho_max / sigma_data))
    options = {"sigma_data": sigma_data, "rho_min": rho_min, "rho_max": rho_max}
    curve, inverse = partial(curves.trigflow, sigma_data), partial(curves.trigflow_inverse, sigma_data)
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
            raise UserError("a finished path takes no options", got=options, fix="give its name instead")
        return name
    if name not in PATHS:
        raise unknown_name("noise path", name, PATHS)
    try:
        return PATHS[name](**options)
    except TypeError as error:
        raise UserError(f"the {name} path does not take these options", got=error) from error
