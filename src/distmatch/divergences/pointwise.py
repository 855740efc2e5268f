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


def partial(
    which: Divergence | Renyi, log_p: Tensor, log_q: Tensor, log_volume: Tensor | float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """What a set of places contributes to a divergence; :func:`combined` puts several sets together.

    Args:
        which: An f-divergence or a Renyi divergence.
        log_p: Log-densities of the teacher, shape (..., K).
        log_q: Those of the student, shape (..., K).
        log_volume: Log of the volume of each point; 0 for a discrete distribution.

    Returns:
        The sum of :func:`contributions` to it (Renyi: to the alpha divergence of its order), and for Renyi
        the log of the integral of p^a q^(1-a); shapes (...).
    """
    divergence = which if isinstance(which, Divergence) else which.alpha
    volume = torch.as_tensor(log_volume, dtype=log_p.dtype, device=log_p.device).exp()
    value = (contributions(divergence, log_p, log_q) * volume).sum(-1)
    if isinstance(which, Divergence) or which.is_kl:
        return value, None
    a = which.order
    nothing = (log_p == -math.inf) & (log_q == -math.inf)  # where the sum below would be NaN
    tilted = torch.where(nothing, torch.full_like(log_p, -math.inf), a * log_p + (1.0 - a) * log_q)
    return value, torch.logsumexp(tilted + log_volume, -1)


def combined(which: Divergence | Renyi, parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The value of the divergence in nats from all its parts."""
    value = torch.stack([v for v, _ in parts]).sum(0)
    logs = [log for _, log in parts if log is not None]
    if isinstance(which, Divergence) or not logs:
        return value
    direct = torch.logsumexp(torch.stack(logs), 0) / (which.order - 1.0)
    # Near 0 the mean of r^a is 1 with hardly a digit more, and A_a keeps them; far from it A_a has lost them.
    small = (which.order * (which.order - 1.0) * value).abs() < 0.5
    return torch.where(small, which.from_alpha(torch.where(small, value, torch.zeros_like(value))), direct)


def total(which: Divergence | Renyi, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of discrete distributions with log-probabilities of shape (..., K); shape (...)."""
    return combined(which, [partial(which, log_p, log_q)])
