"""What each place contributes to a divergence of two densities, with the parts where one of them vanishes.

D_f(p || q) = int_{q > 0} q f(p/q) + f'(inf) P(q = 0), and where p = 0 the integrand is q f(0). Where p > q
the integrand is taken as p times the dual generator of q/p: the same number, but it does not overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.divergences.core import Divergence
from distmatch.divergences.renyi import Renyi


def _cost(log_mass: Tensor, price: float) -> Tensor:
    # Not mass * inf: its gradient would be NaN even where it is not selected.
    return torch.full_like(log_mass, math.inf) if math.isinf(price) else log_mass.exp() * price


def contributions(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The integrand of D_f at each place; inf only where the divergence is. Its gradient holds no NaN.

    Args:
        divergence: Which one.
        log_p: Log-densities (or log-probabilities) of the teacher, -inf where it has no mass.
        log_q: Those of the student, of the same shape.
    """
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    either = no_p | no_q
    zero = torch.zeros_like(log_p)
    teacher, student = torch.where(no_p, zero, log_p), torch.where(no_q, zero, log_q)
    log_r = torch.where(either, zero, teacher - student)
    on_student = student.exp() * divergence.f(log_r.clamp(max=0.0))
    on_teacher = teacher.exp() * divergence.dual().f((-log_r).clamp(max=0.0))
    both = torch.where(log_r <= 0, on_student, on_teacher)
    lost = torch.where(no_q & ~no_p, _cost(teacher, divergence.conjugate_domain[1]), zero)
    stray = torch.where(no_p & ~no_q, _cost(student, divergence.at_zero), zero)
    return torch.where(either, lost + stray, both)


def total(
    which: Divergence | Renyi, log_p: Tensor, log_q: Tensor, log_volume: Tensor | float = 0.0
) -> Tensor:
    """The divergence as a sum over the last dimension.

    Args:
        which: An f-divergence or a Renyi divergence.
        log_p: Log-densities of the teacher, shape (..., K).
        log_q: Those of the student, shape (..., K).
        log_volume: Log of the volume each place stands for; 0 for a discrete distribution.

    Returns:
        Values in nats, shape (...); inf where the divergence is.
    """
    if isinstance(which, Divergence):
        volume = torch.as_tensor(log_volume, dtype=log_p.dtype, device=log_p.device).exp()
        return (contributions(which, log_p, log_q) * volume).sum(-1)
    value = total(which.alpha, log_p, log_q, log_volume)
    if which.is_kl:
        return value
    a = which.order
    nothing = (log_p == -math.inf) | ((log_q == -math.inf) if a < 1 else (log_p == log_q) & log_q.isinf())
    tilted = torch.where(nothing, torch.full_like(log_p, -math.inf), a * log_p + (1.0 - a) * log_q)
    direct = torch.logsumexp(tilted + log_volume, -1) / (a - 1.0)
    # Near 0 the mean of r^a is 1 with hardly a digit more, and A_a keeps them; far from it A_a has lost them.
    small = (a * (a - 1.0) * value).abs() < 0.5
    return torch.where(small, which.from_alpha(torch.where(small, value, torch.zeros_like(value))), direct)
