"""The Renyi divergence: not an f-divergence, but a monotone function of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.divergences.alpha import alpha
from distmatch.divergences.core import Divergence
from distmatch.divergences.numerics import family_name

_AT_ONE = 1e-12


@dataclass(frozen=True)
class Renyi:
    """R_a(p || q) = log E_q[r^a] / (a - 1) in nats, for a > 0; a = 1 is KL(p || q).

    It is no mean of a function of r under q, so it has no generator, no conjugate and no distillation weight.
    But it is an increasing function of the alpha divergence A_a of the same order,
    R_a = log(1 + a (a - 1) A_a) / (a - 1): whoever can estimate A_a can estimate R_a.

    Attributes:
        order: a, positive and finite.
    """

    order: float

    def __post_init__(self) -> None:
        check_number(
            "the order of a Renyi divergence", self.order, "(0, inf)", fix="for orders up to 0 use alpha:A"
        )

    @property
    def name(self) -> str:
        """The name :func:`distmatch.divergences.measure` accepts."""
        return family_name("renyi", self.order)

    @property
    def is_kl(self) -> bool:
        """Whether the order is 1, where it is KL(p || q)."""
        return abs(self.order - 1.0) < _AT_ONE

    @property
    def alpha(self) -> Divergence:
        """The alpha divergence of the same order."""
        return alpha(self.order)

    def from_alpha(self, value: Tensor) -> Tensor:
        """R_a from the value of A_a (nats); inf where the supports are disjoint or A_a is inf."""
        if self.is_kl:
            return value
        scale = self.order * (self.order - 1.0)
        return torch.log1p((scale * value).clamp(min=-1.0)) / (self.order - 1.0)

    def slope(self, value: Tensor) -> Tensor:
        """dR_a / dA_a at the value of A_a: what a standard error of A_a is multiplied with."""
        if self.is_kl:
            return torch.ones_like(value)
        return self.order / (1.0 + self.order * (self.order - 1.0) * value)

    def __str__(self) -> str:
        return self.name
