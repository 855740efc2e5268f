"""The value of an f-divergence between two densities on a line, by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence

_NODES = 16


def divergence_1d(
    divergence: Divergence,
    log_p: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
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
        divergence: Which divergence.
        log_p: Log-density of the teacher, from positions (M,) float64 to (M,).
        log_q: Log-density of the student, likewise.
        low: Left end; together with ``high`` it should hold all but a negligible part of both densities.
        high: Right end.
        n: Number of panels; the width of a panel should not exceed the finest scale of the densities.
        device: Where the log-densities live.

    Returns:
        The value in nats, a float64 tensor of shape ().

    Raises:
        UserError: The interval is empty or not finite, or ``n`` is less than 1.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            "the interval of a quadrature is empty or not finite", got=(low, high), expected="low < high"
        )
    if n < 1:
        raise UserError("a quadrature needs at least one panel", got=n, expected="n >= 1")
    unit_nodes, unit_weights = np.polynomial.legendre.leggauss(_NODES)
    nodes = torch.as_tensor(unit_nodes, dtype=torch.float64, device=device)
    weights = torch.as_tensor(unit_weights, dtype=torch.float64, device=device)
    half = 0.5 * (high - low) / n
    centres = low + half * (2 * torch.arange(n, dtype=torch.float64, device=device) + 1)
    x = (centres[:, None] + half * nodes).flatten()
    teacher, student = log_p(x).double(), log_q(x).double()
    empty = (teacher == -math.inf) & (student == -math.inf)  # neither has mass here: nothing to add
    log_r = torch.where(empty, torch.zeros_like(teacher), teacher - student)
    on_student = student.exp() * divergence.f(log_r.clamp(max=0.0))
    on_teacher = teacher.exp() * divergence.dual().f((-log_r).clamp(max=0.0))
    integrand = torch.where(log_r <= 0, on_student, on_teacher)
    return half * (integrand.reshape(n, _NODES) @ weights).sum()
