"""How networks from elsewhere count time, as plain data, so that a denoiser can be copied and compared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scaled:
    """Our time times a factor.

    Attributes:
        factor: The network's time units per unit of distmatch.
    """

    factor: float

    def __call__(self, t: Tensor) -> Tensor:
        """The time that the network receives."""
        return t * self.factor


@dataclass(frozen=True)
class HalfLog:
    """log(sigma / 2): the noise coordinate of NCSN++ (Karras et al. 2022, table 1)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """The coordinate that the network receives."""
        return (sigma / 2).log()
