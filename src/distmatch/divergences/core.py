"""One f-divergence as functions of the log-ratio log r = log p - log q (teacher over student).

Conventions, for every divergence in this package:

* ``D_f(p || q) = E_q[f(r)]`` in nats, with true constants: JS <= log 2, squared Hellinger <= 2.
* f is the *centered* generator: f(1) = f'(1) = 0. It differs from the textbook generator by a multiple of
  r - 1, whose mean under q is zero, so D_f, f'' and the weight are the same; but f >= 0, so that the mean of
  f(r) over samples of q is an unbiased estimate of D_f that is never negative (for KL(q || p) it is the
  estimator known as k3). f' and the conjugate are those of the centered f.
* ``weight`` is h(r) = r^2 f''(r), the factor of the score difference in
  grad D_f(p || q_theta) = -E[h(r) (s_p - s_q)^T dx/dtheta] (f-distill, arXiv 2502.15681, theorem 1).
* Values that overflow are held at about the largest finite number of their dtype; their gradient is zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.divergences.numerics import expm1, narrow

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
        name: The name :func:`distmatch.divergences.divergence` accepts (a custom one has another name).
        f: log r -> centered generator f(r), nats.
        df: log r -> f'(r), derivative with respect to r (not log r).
        d2f: log r -> f''(r).
        weight: log r -> h(r) = r^2 f''(r).
        conjugate: t -> f*(t) = sup_u (u t - f(u)) over u >= 0; +inf above the domain, constant below f'(0).
        swapped: Gives the divergence with its arguments exchanged; :meth:`dual` calls it.
        at_zero: f(0), what a unit of student mass costs where the teacher has none; inf when unbounded.
        conjugate_domain: (low, high): f* is finite for low < t < high. high is f'(inf) = lim f(r)/r, what a
            unit of teacher mass costs where the student has none.
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
    at_zero: float
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

    def shifted(self, c: float) -> Divergence:
        """The same divergence with the generator f(r) + c (r - 1).

        Values of D_f, f'' and the weight stay; f' gains c, and the conjugate becomes f*(t - c) + c. With c =
        1 the KL divergence gets its textbook generator r log r. Means of f over samples change: they are
        unbiased for every c, but never negative only for c = 0.

        Args:
            c: Any finite number.

        Returns:
            The divergence, under the same name.

        Raises:
            UserError: ``c`` is not a finite number.
        """
        check_number("the shift of a generator", c)
        if c == 0:
            return self
        f, df, conjugate = self.f, self.df, self.conjugate
        return dataclasses.replace(
            self,
            f=lambda x: narrow(f(x) + expm1(x, c), x.dtype),
            df=lambda x: narrow(df(x) + c, x.dtype),
            conjugate=lambda t: conjugate(t - c) + c,
            swapped=lambda: self.dual().shifted(-c),
            at_zero=self.at_zero - c,
            conjugate_domain=(self.conjugate_domain[0], self.conjugate_domain[1] + c),
            conjugate_limit=self.conjugate_limit + c,
        )

    @property
    def upper_bound(self) -> float:
        """The largest value D_f can take, f(0) + f'(inf), reached by disjoint distributions; may be inf."""
        return self.at_zero + self.conjugate_domain[1]

    @property
    def mode_seeking(self) -> str:
        """What the student does with a mode of the teacher that it can not afford.

        ``"mode-covering"`` when missing teacher mass costs infinitely much (f'(inf) = inf),
        ``"mode-seeking"`` when only misplaced student mass does (f(0) = inf), ``"in between"`` when
        neither does: the bounded divergences.
        """
        if math.isinf(self.conjugate_domain[1]):
            return MODE_COVERING
        return MODE_SEEKING if math.isinf(self.at_zero) else BETWEEN

    def __str__(self) -> str:
        return self.name
