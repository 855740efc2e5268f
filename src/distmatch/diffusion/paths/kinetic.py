"""Noise paths of least kinetic energy (Shaul et al. 2023, "On kinetic optimal probability paths").

Write a path as ``alpha = r cos(psi)``, ``sigma = sigma_data r sin(psi)``. Its kinetic energy, that of the
marginal flow, a dimension and in units of sigma_data^2, is

    E = integral of r'^2 + r^2 G(psi) psi'^2 dt,    G = 1 - L,

where L is the EDM loss of the perfect denoiser at the level rho = sigma_data tan(psi): its square error as a
share of what Gaussian data of the same spread would have. In the coordinate chi(psi) = integral of sqrt(G)
from 0 this is the flat plane in polar form, so the best path is a straight line,
``r e^(i chi) = (1 - t) + t e^(i Chi)``, of energy ``2 - 2 cos(Chi)``, Chi = chi(pi / 2). No shooting and no
search is needed.

For scattered points (L = 0) it is the straight path; for Gaussian data (L = 1) nothing moves and the energy
is 0. Gains over the straight path vanish in high dimension, where images are nearly scattered points.
``sigma_data`` is the root mean square of the data here, which is their spread if their mean is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator as make_generator
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.predictions import Coefficients

_FLOOR = 1e-3  # smallest sqrt(G): the path passes every level, also those where nothing moves
_ROWS = 512  # noised samples at a time when the data are compared with each other


def kinetic_path(
    losses: Sequence[float] | Tensor, sigma_data: float, *, rho_min: float = 0.002, rho_max: float = 80.0
) -> NoisePath:
    """The path of least kinetic energy.

    Args:
        losses: L at angles ``psi`` evenly from 0 to pi / 2, ends included; 3 or more, clipped to [0, 1]. From
            :func:`losses_of_data` or :func:`losses_of_teacher`.
        sigma_data: Root mean square of the data; the noise at the end of the path has it too.
        rho_min: Smallest noise-to-signal ratio.
        rho_max: Largest noise-to-signal ratio; infinite ends at t = 1, pure noise.

    Returns:
        A path on times within [0, 1]. Rates of change are unbounded at the levels where G is 0.

    Raises:
        UserError: Too few losses, or numbers out of range.
    """
    values = torch.as_tensor(losses, dtype=torch.float64).flatten()
    if len(values) < 3 or not bool(values.isfinite().all()):
        raise UserError("a kinetic path needs 3 or more losses, all finite", got=f"{len(values)} numbers")
    if not (0 < sigma_data < math.inf and 0 <= rho_min < rho_max):
        raise UserError(
            "a kinetic path needs a positive sigma_data and rising noise-to-signal ratios",
            got=f"sigma_data={sigma_data}, rho_min={rho_min}, rho_max={rho_max}",
        )
    table = _Table(values)
    options = {
        "losses": tuple(values.tolist()),
        "sigma_data": sigma_data,
        "rho_min": rho_min,
        "rho_max": rho_max,
    }
    inverse = partial(_inverse, table, sigma_data)
    start, end = inverse(torch.tensor([rho_min, rho_max], dtype=torch.float64)).tolist()
    return NoisePath("kinetic-optimal", start, end, partial(_curve, table, sigma_data), inverse, options)


def kinetic_path_of(
    data: Tensor,
    *,
    rho_min: float | None = None,
    rho_max: float | None = None,
    most: int = 4096,
    seed: int = 0,
) -> NoisePath:
    """The path of least kinetic energy for a data set.

    Args:
        data: Clean samples (n, *shape).
        rho_min: Smallest noise-to-signal ratio; by default 0.004 times the data's root mean square, which
            is 0.002 for EDM's 0.5.
        rho_max: Largest noise-to-signal ratio; by default 160 times it.
        most: Samples that are looked at, at most; the cost grows with its square.
        seed: Chooses them, and the noise.
    """
    order = torch.randperm(len(data), generator=make_generator(seed, "kinetic choice"))
    chosen = data[order[:most].to(data.device)].double()
    scale = float(chosen.square().mean().sqrt())
    losses = losses_of_data(chosen, scale, samples=min(len(chosen), 512), seed=seed)
    low = 0.004 * scale if rho_min is None else rho_min
    high = 160 * scale if rho_max is None else rho_max
    return kinetic_path(losses, scale, rho_min=low, rho_max=high)


def least_energy(losses: Sequence[float] | Tensor) -> float:
    """The energy ``2 - 2 cos(Chi)`` of :func:`kinetic_path`, a dimension, in units of sigma_data^2."""
    return 2 - 2 * math.cos(_Table(torch.as_tensor(losses, dtype=torch.float64).flatten()).whole)


def losses_of_teacher(
    denoiser: Denoiser,
    samples: Tensor,
    sigma_data: float,
    *,
    angles: int = 129,
    seed: int = 0,
    conditioning: ConditioningLike = None,
) -> Tensor:
    """The EDM loss of a teacher at evenly spaced angles, for :func:`kinetic_path`.

    It is measured as ``1 - E|F|^2``, F = (D - c_skip y) / c_out the output of EDM's network: the same by the
    orthogonality of errors and conditional means, and without noise where D is linear. All levels share
    their noise, so that the curve is smooth.

    Args:
        denoiser: The teacher; asked between its own ``sigma_min`` and ``sigma_max`` only. The loss beyond is
            that at the nearer end.
        samples: Clean samples (n, *shape) on its device.
        sigma_data: Root mean square of the data.
        angles: Number of angles.
        seed: Seed of the noise.
        conditioning: Labels (n,) of the samples.

    Returns:
        (angles,) float64 on the CPU.
    """
    noise = torch.randn(samples.shape, generator=make_generator(seed, "kinetic")).to(samples)
    rho = _levels(angles, sigma_data).clamp(denoiser.sigma_min, denoiser.sigma_max)
    found = []
    with torch.no_grad():
        for level in rho.tolist():
            sigma = torch.full((len(samples),), level, dtype=samples.dtype, device=samples.device)
            y = samples + level * noise
            found.append(_loss(denoiser(y, sigma, conditioning), y, level, sigma_data))
    return torch.stack(found)


def losses_of_data(
    data: Tensor, sigma_data: float, *, angles: int = 129, samples: int = 2048, seed: int = 0
) -> Tensor:
    """The same for the optimal denoiser of the given samples, as Shaul et al. estimate it: n^2 distances.

    Args:
        data: Clean samples (n, *shape).
        sigma_data: Root mean square of the data.
        angles: Number of angles.
        samples: Noised samples a level.
        seed: Chooses them and their noise.

    Returns:
        (angles,) float64 on the CPU.
    """
    flat = data.flatten(1).double().cpu()
    gen = make_generator(seed, "kinetic data")
    chosen = flat[torch.randint(len(flat), (samples,), generator=gen)]
    noise = torch.randn(chosen.shape, generator=gen, dtype=torch.float64)
    norms = flat.square().sum(1)
    found = []
    for level in _levels(angles, sigma_data).clamp(1e-3 * sigma_data, 1e3 * sigma_data).tolist():
        parts = [
            _loss(((y @ flat.T - norms / 2) / level**2).softmax(1) @ flat, y, level, sigma_data) * len(y)
            for y in (chosen + level * noise).split(_ROWS)
        ]
        found.append(torch.stack(parts).sum() / samples)
    return torch.stack(found)


def _loss(denoised: Tensor, y: Tensor, level: float, sigma_data: float) -> Tensor:
    """1 - E|F|^2 a dimension, float64 on the CPU."""
    variance = level**2 + sigma_data**2
    output = (denoised - sigma_data**2 / variance * y) * (math.sqrt(variance) / (level * sigma_data))
    return 1 - output.double().square().mean().cpu()


def _levels(angles: int, sigma_data: float) -> Tensor:
    return sigma_data * torch.linspace(0, math.pi / 2, angles, dtype=torch.float64).tan().abs()


class _Table:
    """sqrt(G), linear between evenly spaced angles, and its integral chi, which is then exact."""

    def __init__(self, losses: Tensor) -> None:
        self.step = math.pi / 2 / (len(losses) - 1)
        self.speed = (1 - losses.clamp(0, 1)).sqrt().clamp_min(_FLOOR)
        pieces = self.step * (self.speed[1:] + self.speed[:-1]) / 2
        self.chi = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
        self.whole = float(self.chi[-1])
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def to(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Speed and chi on the device of ``like``, copied there once: a copy waits for the device."""
        if like.device not in self._copies:
            self._copies[like.device] = (self.speed.to(like.device), self.chi.to(like.device))
        return self._copies[like.device]

    def forward(self, psi: Tensor) -> Tensor:
        """The value of chi at an angle."""
        speed, chi = self.to(psi)
        left = (psi / self.step).floor().long().clamp(0, len(speed) - 2)
        u = psi - left.to(psi.dtype) * self.step
        slope = (speed[left + 1] - speed[left]) / self.step
        return chi[left] + u * (speed[left] + slope * u / 2)

    def backward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The angle at chi, and sqrt(G) there."""
        speed, chi = self.to(value)
        left = (torch.searchsorted(chi, value.contiguous(), right=True) - 1).clamp(0, len(speed) - 2)
        rest = (value - chi[left]).clamp_min(0)
        slope = (speed[left + 1] - speed[left]) / self.step
        # The root of u speed + u^2 slope / 2 = rest in the form that loses no digits for a small slope.
        there = (speed[left] ** 2 + 2 * slope * rest).clamp_min(_FLOOR**2).sqrt()
        return left.to(value.dtype) * self.step + 2 * rest / (speed[left] + there), there


def _curve(table: _Table, sigma_data: float, t: Tensor) -> Coefficients:
    whole = table.whole
    real, imaginary = 1 - t * (2 * math.sin(whole / 2) ** 2), t * math.sin(whole)
    radius = torch.hypot(real, imaginary)
    psi, speed = table.backward(torch.atan2(imaginary, real))
    d_real, d_imaginary = -2 * math.sin(whole / 2) ** 2, math.sin(whole)
    d_radius = (real * d_real + imaginary * d_imaginary) / radius
    d_psi = (real * d_imaginary - imaginary * d_real) / (radius**2 * speed)
    cos, sin = psi.cos(), psi.sin()
    return Coefficients(
        radius * cos,
        sigma_data * radius * sin,
        d_radius * cos - radius * sin * d_psi,
        sigma_data * (d_radius * sin + radius * cos * d_psi),
    )


def _inverse(table: _Table, sigma_data: float, rho: Tensor) -> Tensor:
    whole = table.whole
    chi = table.forward(torch.atan(rho / sigma_data))
    return chi.sin() / (chi.sin() + (whole - chi).clamp_min(0).sin())
