"""One f-divergence as functions of the log-ratio log r = log p - log q (teacher over student).

Conventions, for every divergence in this package:

* ``D_f(p || q) = E_q[f(r)]`` in nats, with true constants: JS <= log 2, squared Hellinger <= 2.
* f is the *centred* generator: f(1) = f'(1) = 0. It differs from the textbook generator by a multiple of
  r - 1, whose mean under q is zero, so D_f, f'' and the weight are the same; but f >= 0, so that the mean of
  f(r) over samples of q is an unbiased estimate of D_f that is never negative (for KL(q || p) it is the
  estimator known as k3). f' and the conjugate are those of the centred f.
* ``weight`` is h(r) = r^2 f''(r), the factor of the score difference in
  grad D_f(p || q_theta) = -E[h(r) (s_p - s_q)^T dx/dtheta] (f-distill, arXiv 2502.15681, theorem 1).
* Values that overflow are held at about the largest finite number of their dtype; their gradient is zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmatch.base.errors import UserError

Function = Callable[[Tensor], Tensor]

MODE_SEEKING = "mode-seeking"
BETWEEN = "in between"
MODE_COVERING = "mode-covering"


def _promoted(function: Function) -> Function:
    """Makes ``function`` compute in float32 at least: in half precision exp(log r) has hardly any digits."""

    @functools.wraps(function)
    def promoted(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise UserError(
                "a divergence takes a tensor of log-ratios",
                got=type(x).__name__,
                expected="a torch tensor of log p - log q",
                fix="wrap it in torch.tensor(...)",
            )
        if x.dtype in (torch.float32, torch.float64):
            return function(x)
        return function(x.float())

    return promoted


def _on_domain(conjugate: Function, high: float, limit: float) -> Function:
    """Sets ``conjugate`` to +inf above ``high`` and to ``limit`` at it, without NaN gradients anywhere."""
    if math.isinf(high):
        return conjugate

    @functools.wraps(conjugate)
    def guarded(t: Tensor) -> Tensor:
        inside = conjugate(torch.where(t >= high, torch.full_like(t, high - 1.0), t))
        edge = torch.full_like(inside, limit)
        return torch.where(t > high, torch.full_like(inside, math.inf), torch.where(t == high, edge, inside))

    return guarded


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f(p || q) = E_q[f(p/q)], p the teacher and q the student.

    All functions are elementwise. They return the dtype of their input, except that float16, bfloat16 and
    integers are promoted to float32. NaN stays NaN.

    Attributes:
        name: The name :func:`distmatch.divergences.divergence` accepts (a custom one has a name of its own).
        f: log r -> centred generator f(r), nats.
        df: log r -> f'(r), derivative with respect to r (not log r).
        d2f: log r -> f''(r).
        weight: log r -> h(r) = r^2 f''(r).
        conjugate: t -> f*(t) = sup_u (u t - f(u)) over u >= 0; +inf above the domain, constant below f'(0).
        swapped: Gives the divergence with its arguments exchanged; :meth:`dual` calls it.
        mode_seeking: Whether its gradient drops modes (``"mode-seeking"``), keeps them (``"mode-covering"``),
            or lies ``"in between"``.
        upper_bound: The largest value D_f can take, f(0) + lim f(r)/r; inf when unbounded.
        conjugate_domain: (low, high): f* is finite for low < t < high.
        conjugate_limit: f*(high).
        differentiable: False when h vanishes almost everywhere, so that the divergence has a value but
            can not drive distillation.
    """

    name: str
    f: Function = field(repr=False)
    df: Function = field(repr=False)
    d2f: Function = field(repr=False)
    weight: Function = field(repr=False)
    conjugate: Function = field(repr=False)
    swapped: Callable[[], Divergence] = field(repr=False)
    mode_seeking: str
    upper_bound: float = math.inf
    conjugate_domain: tuple[float, float] = (-math.inf, math.inf)
    conjugate_limit: float = math.inf
    differentiable: bool = True

    def __post_init__(self) -> None:
        guarded = _on_domain(self.conjugate, self.conjugate_domain[1], self.conjugate_limit)
        object.__setattr__(self, "conjugate", _promoted(guarded))
        for name in ("f", "df", "d2f", "weight"):
            object.__setattr__(self, name, _promoted(getattr(self, name)))

    def dual(self) -> Divergence:
        """The divergence with swapped arguments: D_dual(p || q) = D(q || p).

        Its generator is r f(1/r) and its weight r h(1/r) (Csiszar's dual).
        """
        return self.swapped()

    def __str__(self) -> str:
        return self.name
