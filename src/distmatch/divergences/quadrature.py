"""The value of a divergence between two densities on a line or in the plane, by quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence
from distmatch.divergences.lookup import measure
from distmatch.divergences.pointwise import combined, partial
from distmatch.divergences.renyi import Renyi

_NODES = 16
_CHUNK = 1 << 18  # points evaluated at once in the plane

LogDensity = Callable[[Tensor], Tensor]


def _rule(low: float, high: float, n: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Nodes and log-weights, float64 of shape (16 n,), of ``n`` Gauss-Legendre panels on [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            "the interval of a quadrature is empty or not finite", got=(low, high), expected="low < high"
        )
    check_count("the number of panels of a quadrature", n)
    unit_nodes, unit_weights = np.polynomial.legendre.leggauss(_NODES)
    nodes = torch.as_tensor(unit_nodes, dtype=torch.float64, device=device)
    weights = torch.as_tensor(unit_weights, dtype=torch.float64, device=device)
    half = 0.5 * (high - low) / n
    centers = low + half * (2 * torch.arange(n, dtype=torch.float64, device=device) + 1)
    return (centers[:, None] + half * nodes).flatten(), (half * weights).log().repeat(n)


def _evaluate(log_density: LogDensity, x: Tensor, who: str) -> Tensor:
    value = log_density(x)
    count = (len(x),)
    if not isinstance(value, Tensor) or value.shape != count:
        raise UserError(
            f"{who} must return one log-density per position",
            got=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
            expected=f"a tensor of shape {count} from positions of shape {tuple(x.shape)}",
        )
    if bool((value.isnan() | (value == math.inf)).any()):
        raise UserError(
            f"{who} is NaN or infinite at a position of the quadrature",
            got=f"position {x[(value.isnan() | (value == math.inf))][0].tolist()}",
            expected="finite values, or -inf where there is no mass",
        )
    return value.double()


def _integral(
    which: str | Divergence | Renyi,
    densities: tuple[LogDensity, LogDensity],
    chunks: Iterable[tuple[Tensor, Tensor]],
) -> Tensor:
    """The divergence over the chunks of (positions, log-volumes); warns unless both masses are 1."""
    found = measure(which)
    parts, masses = [], [0.0, 0.0]
    for x, log_volume in chunks:
        logs = [_evaluate(f, x, who) for f, who in zip(densities, ("log_p", "log_q"), strict=True)]
        parts.append(partial(found, logs[0], logs[1], log_volume))
        for k, log_density in enumerate(logs):
            masses[k] += float((log_density.detach() + log_volume).exp().sum())
    for who, mass in zip(("p", "q"), masses, strict=True):
        if abs(mass - 1.0) > 1e-3:
            warnings.warn(
                f"{who} has mass {mass:.4g} on the region of the quadrature, not 1: the region is too small, "
                "the panels are too wide, or the density is not normalized; the value is that much off.",
                stacklevel=3,
            )
    return combined(found, parts)


def divergence_1d(
    which: str | Divergence | Renyi,
    log_p: LogDensity,
    log_q: LogDensity,
    low: float,
    high: float,
    n: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """D_f(p || q) = int q f(p/q) dx on [low, high], by ``n`` panels of 16-point Gauss-Legendre in float64.

    Smooth densities give the value to rounding. Where p > q the integrand is taken as p times the dual
    generator of q/p: the same number, but it neither overflows nor misses the part of p where q vanishes.
    Autograd flows through the log-densities.

    Args:
        which: A name accepted by :func:`distmatch.divergences.measure`, or its object.
        log_p: Log-density of the teacher, from positions (M,) float64 to (M,); -inf where it has no mass.
        log_q: Log-density of the student, likewise.
        low: Left end; together with ``high`` it should hold all but a negligible part of both densities.
        high: Right end.
        n: Number of panels; the width of a panel should not exceed the finest scale of the densities.
        device: Device of the log-densities.

    Returns:
        The value in nats, a float64 tensor of shape ().

    Raises:
        UserError: The interval is empty or not finite, ``n`` is less than 1, or a log-density is NaN.

    Warns:
        UserWarning: A density does not have mass 1 (within 0.001) on the interval.
    """
    x, log_volume = _rule(low, high, n, device)
    return _integral(which, (log_p, log_q), [(x, log_volume)])


def divergence_2d(
    which: str | Divergence | Renyi,
    log_p: LogDensity,
    log_q: LogDensity,
    low: tuple[float, float],
    high: tuple[float, float],
    n: int = 24,
    device: torch.device | str = "cpu",
) -> Tensor:
    """D_f(p || q) over a rectangle, by ``n`` x ``n`` panels of 16 x 16 Gauss-Legendre points in float64.

    Works in chunks of at most 262,144 points, so that memory stays bounded where no gradient is asked. As
    :func:`divergence_1d` otherwise.

    Args:
        which: A name accepted by :func:`distmatch.divergences.measure`, or its object.
        log_p: Log-density of the teacher, from positions (M, 2) float64 to (M,); -inf where it has no mass.
        log_q: Log-density of the student, likewise.
        low: Lower left corner; the rectangle should hold all but a negligible part of both densities.
        high: Upper right corner.
        n: Number of panels along each side; 256 n^2 points.
        device: Device of the log-densities.

    Returns:
        The value in nats, a float64 tensor of shape ().

    Raises:
        UserError: The rectangle is empty or not finite, ``n`` is less than 1, or a log-density is NaN.

    Warns:
        UserWarning: A density does not have mass 1 (within 0.001) on the rectangle.
    """
    x, log_width = _rule(low[0], high[0], n, device)
    y, log_height = _rule(low[1], high[1], n, device)
    rows = max(1, _CHUNK // len(y))
    chunks = (
        (torch.cartesian_prod(part, y), (log_part[:, None] + log_height).flatten())
        for part, log_part in zip(x.split(rows), log_width.split(rows), strict=True)
    )
    return _integral(which, (log_p, log_q), chunks)
