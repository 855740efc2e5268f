"""Stochastic interpolants between two distributions in unit time (Albergo, Boffi, Vanden-Eijnden 2023).

    x_t = a(t) x0 + b(t) x1 + gamma(t) z,    gamma(0) = gamma(1) = 0,  z unit normal

Any coupling of x0 and x1 will do. With I = a x0 + b x1 and primes for time derivatives, the velocity is
``E[I' + gamma' z | x]``, the noise ``eta = E[z | x]``, the score ``-eta / gamma``. Two networks are learned
by square losses, and an ODE or, forwards and backwards, SDEs of any diffusion map one distribution to the
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.paths.custom import path_of

Field = Callable[[Tensor, Tensor], Tensor]
KINDS = ("linear", "trig", "encoding-decoding", "mirror")
GAMMAS = ("brownian", "quadratic", "sine", "none")
_PEAKS = {"brownian": 1 / 4, "quadratic": 1 / 16, "sine": 1.0, "none": 0.0}  # of gamma^2, at scale 1


@dataclass(frozen=True)
class Moments:
    """The coefficients of an interpolant at some times, (B,) each.

    Attributes:
        a: Factor of x0.
        b: Factor of x1.
        d_a: Time derivative of ``a``.
        d_b: Time derivative of ``b``.
        gamma: Factor of the noise.
        gamma_slope: gamma gamma', which is finite where gamma' is not.
    """

    a: Tensor
    b: Tensor
    d_a: Tensor
    d_b: Tensor
    gamma: Tensor
    gamma_slope: Tensor


@dataclass(frozen=True)
class Interpolant:
    """An interpolant between x0 at t = 0 and x1 at t = 1.

    Attributes:
        kind: ``"linear"``: a = 1 - t, b = t. ``"trig"``: cos and sin of pi t / 2, times sqrt(1 - gamma^2).
            ``"encoding-decoding"``: cos^2(pi t), of x0 up to t = 1/2 and of x1 from there on, with noise
            between. ``"mirror"``: x1 alone, noised and cleaned again.
        gamma: ``"brownian"``: sqrt(t (1 - t)). ``"quadratic"``: t (1 - t). ``"sine"``: sin^2(pi t). Each
            times sqrt(scale). ``"none"``: no noise.
        scale: Variance of the noise where gamma is 1: data scaled by c need c^2 times it.

    Raises:
        UserError: An unknown name, or a combination that leaves nothing of the data or no noise.
    """

    kind: str = "linear"
    gamma: str = "brownian"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_name("interpolant", self.kind, KINDS)
        check_name("gamma", self.gamma, GAMMAS)
        check_number("the scale of gamma", self.scale, "(0, inf)")
        if self.kind == "trig" and self.scale * _PEAKS[self.gamma] >= 1:
            raise UserError(
                "a trigonometric interpolant needs gamma below 1",
                got=f"{self.gamma}, scale {self.scale}",
                fix="use a smaller scale: below 4 for brownian, 16 for quadratic, 1 for sine",
            )
        if self.kind in ("encoding-decoding", "mirror") and self.gamma == "none":
            raise UserError(f"the {self.kind} interpolant needs noise", fix="choose another gamma")

    def at(self, t: Tensor) -> Moments:
        """The coefficients at times ``t`` (B,) in [0, 1]."""
        square, slope = self._noise(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        match self.kind:
            case "linear":
                a, b, d_a, d_b = 1 - t, t, -one, one
            case "trig":
                angle, rest = math.pi / 2 * t, (1 - square).sqrt()
                cos, sin, d_rest = angle.cos(), angle.sin(), -slope / rest
                a, d_a = rest * cos, d_rest * cos - math.pi / 2 * rest * sin
                b, d_b = rest * sin, d_rest * sin + math.pi / 2 * rest * cos
            case "mirror":
                a, b, d_a, d_b = zero, one, zero, zero
            case _:
                value, change = (math.pi * t).cos() ** 2, -math.pi * (2 * math.pi * t).sin()
                first = t < 0.5
                a, d_a = torch.where(first, value, zero), torch.where(first, change, zero)
                b, d_b = torch.where(first, zero, value), torch.where(first, zero, change)
        return Moments(a, b, d_a, d_b, square.sqrt(), slope)

    def _noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """gamma^2 and gamma gamma'."""
        if self.gamma == "brownian":
            return self.scale * t * (1 - t), self.scale * (1 - 2 * t) / 2
        if self.gamma == "quadratic":
            return self.scale * (t * (1 - t)) ** 2, self.scale * t * (1 - t) * (1 - 2 * t)
        if self.gamma == "sine":
            square = (math.pi * t).sin() ** 2
            return self.scale * square**2, self.scale * math.pi * square * (2 * math.pi * t).sin()
        return torch.zeros_like(t), torch.zeros_like(t)

    def noise_path(self, *, t_min: float = 1e-3, t_max: float = 0.999, sigma_data: float = 0.5) -> NoisePath:
        """The noise path that this is when x0 is standard normal and independent of x1, the data.

        Time is turned round, as paths run from data to noise: ``alpha(t) = b(1 - t)``,
        ``sigma(t)^2 = a(1 - t)^2 + gamma(1 - t)^2``. Linear without noise is the straight path.

        Args:
            t_min: Time nearest to the data.
            t_max: Time nearest to the noise.
            sigma_data: Standard deviation of the data.

        Raises:
            UserError: Signal and noise do not trade places steadily (encoding-decoding and mirror).
        """

        def sigma(t: Tensor) -> Tensor:
            m = self.at(1 - t)
            return (m.a**2 + self._noise(1 - t)[0]).sqrt()

        return path_of(
            lambda t: self.at(1 - t).b,
            sigma,
            t_min,
            t_max,
            name=f"{self.kind}-interpolant",
            sigma_data=sigma_data,
        )


def velocity_loss(
    velocity: Field, interpolant: Interpolant, x0: Tensor, x1: Tensor, t: Tensor, z: Tensor
) -> Tensor:
    """``|v|^2 / 2 - (I' + gamma' z) . v`` averaged over z and -z, (B,): smallest at the velocity.

    It is a square error up to a constant. Noise of both signs cancels gamma', which is infinite at the ends
    for a Brownian gamma, so that the variance stays finite.

    Args:
        velocity: ``velocity(x, t)`` for x (B, *shape) and t (B,).
        interpolant: The interpolant.
        x0: Samples of the distribution at 0, (B, *shape).
        x1: Samples of the distribution at 1, coupled with ``x0`` in this order.
        t: Times (B,), inside (0, 1).
        z: Unit normal noise like ``x0``.
    """
    m = interpolant.at(t)
    center, moved = _mean(m.a, m.b, x0, x1), _mean(m.d_a, m.d_b, x0, x1)
    if interpolant.gamma == "none":
        v = velocity(center, t)
        return (v.square() / 2 - moved * v).flatten(1).sum(1)
    shift = expand(m.gamma, z) * z
    plus, minus = velocity(center + shift, t), velocity(center - shift, t)
    rate = expand(m.gamma_slope / m.gamma, z) * z
    square = (plus.square() + minus.square()) / 4
    return (square - moved * (plus + minus) / 2 - rate * (plus - minus) / 2).flatten(1).sum(1)


def noise_loss(
    noise: Field, interpolant: Interpolant, x0: Tensor, x1: Tensor, t: Tensor, z: Tensor
) -> Tensor:
    """``|eta|^2 / 2 - z . eta`` averaged over z and -z, (B,): smallest at eta = E[z | x].

    Args:
        noise: ``noise(x, t)``.
        interpolant: The interpolant, with noise.
        x0: Samples of the distribution at 0, (B, *shape).
        x1: Samples of the distribution at 1.
        t: Times (B,).
        z: Unit normal noise like ``x0``.
    """
    m = interpolant.at(t)
    center, shift = _mean(m.a, m.b, x0, x1), expand(m.gamma, z) * z
    plus, minus = noise(center + shift, t), noise(center - shift, t)
    return ((plus.square() + minus.square()) / 4 - z * (plus - minus) / 2).flatten(1).sum(1)


def _mean(a: Tensor, b: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return expand(a, x0) * x0 + expand(b, x1) * x1
