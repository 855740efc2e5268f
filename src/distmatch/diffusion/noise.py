"""Distributions of noise levels, each with its CDF, so that bins of equal probability are one call away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_number, check_rising
from distmatch.base.errors import UserError


@dataclass(frozen=True)
class LogNormal:
    """log sigma ~ N(mean, std^2): the training distribution of EDM (Karras et al. 2022, table 1).

    Attributes:
        mean: Mean of log sigma.
        std: Standard deviation of log sigma.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_number("the standard deviation of log sigma", self.std, "(0, inf)")

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the noise level below which a share ``u`` in (0, 1) of the samples is."""
        return torch.exp(self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def cdf(self, sigma: Tensor) -> Tensor:
        """The share of samples below ``sigma``."""
        return 0.5 * (1 + torch.erf((sigma.log() - self.mean) / (self.std * math.sqrt(2))))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``n`` levels on the generator's device."""
        normal = torch.randn(n, generator=generator, device=generator.device)
        return torch.exp(self.mean + self.std * normal)


@dataclass(frozen=True)
class Karras:
    """sigma^(1/rho) uniform between the ends: the grid of EDM (eq. 5) read as a distribution.

    Attributes:
        low: Smallest level.
        high: Largest level.
        rho: Curvature; larger puts more samples at small levels.
    """

    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_rising(low=self.low, high=self.high)
        check_number("rho", self.rho, "(0, inf)")

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the noise level below which a share ``u`` in [0, 1] of the samples is."""
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return (a + u * (b - a)) ** self.rho

    def cdf(self, sigma: Tensor) -> Tensor:
        """The share of samples below ``sigma``."""
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return ((sigma ** (1 / self.rho) - a) / (b - a)).clamp(0, 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``n`` levels on the generator's device."""
        return self.quantile(torch.rand(n, generator=generator, device=generator.device))


@dataclass(frozen=True)
class Truncated:
    """A log-normal between two levels; the tails that are cut off are shared out in proportion.

    Attributes:
        law: The whole distribution.
        low: Smallest level.
        high: Largest level.
    """

    law: LogNormal
    low: float
    high: float

    def __post_init__(self) -> None:
        low, high = self._ends
        if not high - low > 1e-6:
            raise UserError(
                "a log-normal distribution has almost no mass between its truncation limits",
                got=f"mean {self.law.mean:.4g} and std {self.law.std:.4g} of log sigma, between "
                f"{self.low:.4g} and {self.high:.4g}",
                fix="choose a mean and a standard deviation with mass there",
            )

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The shares of the whole distribution below the two levels."""
        low, high = self.law.cdf(torch.tensor([self.low, self.high], dtype=torch.float64)).tolist()
        return low, high

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the noise level below which a share ``u`` in [0, 1] of the samples is."""
        low, high = self._ends
        return self.law.quantile(low + (high - low) * u).clamp(self.low, self.high)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The share of samples below ``sigma``."""
        low, high = self._ends
        return ((self.law.cdf(sigma) - low) / (high - low)).clamp(0, 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``n`` levels on the generator's device."""
        return self.quantile(torch.rand(n, generator=generator, device=generator.device))


NoiseLevels = LogNormal | Karras | Truncated


def karras_grid(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """The sampling grid of EDM (eq. 5): ``steps`` decreasing levels from ``high`` to ``low``, then 0.

    Returns:
        Tensor of shape (steps + 1,), float64.

    Raises:
        UserError: Fewer than one step, or levels out of order.
    """
    check_count("the number of steps of a sampling grid", steps, fix="use --steps 1 or more")
    check_rising(low=low, high=high)
    i = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    a, b = high ** (1 / rho), low ** (1 / rho)
    return torch.cat([(a + i * (b - a)) ** rho, torch.zeros(1, dtype=torch.float64)])
