"""Noise levels drawn by the time of a path, for training; the same interface as the other distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number, check_rising
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.paths.steps import check_shift, shifted, unshifted

SPACINGS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class PathLevels:
    """Levels sigma = rho(t) with t drawn between the times of two levels.

    With share = (t - t(low)) / (t(high) - t(low)) in (0, 1): ``"uniform"`` draws it uniformly;
    ``"logit-normal"`` draws logit(share) ~ N(mean, std^2), which favors the middle (Esser et al. 2024,
    "Scaling rectified flow transformers", section 3.1). With a shift s, the share is that of the time u
    with t = s u / (1 + (s - 1) u).

    Attributes:
        path: The path.
        low: Smallest level.
        high: Largest level.
        spacing: ``"uniform"`` or ``"logit-normal"``.
        mean: Mean of the logit; above 0 favors noise.
        std: Spread of the logit.
        shift: The shift s of a flow's times.
    """

    path: NoisePath
    low: float
    high: float
    spacing: Literal["uniform", "logit-normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_rising(low=self.low, high=self.high)
        check_name("distribution of times", self.spacing, SPACINGS)
        check_number("the mean of a logit-normal", self.mean)
        check_number("the spread of a logit-normal", self.std, "(0, inf)")
        check_shift(self.path, self.shift)
        ends = self._time(torch.tensor([self.low, self.high], dtype=torch.float64)).tolist()
        object.__setattr__(self, "_ends", tuple(ends))

    def _time(self, sigma: Tensor) -> Tensor:
        return unshifted(self.path.t_of_rho(sigma), self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the noise level below which a share ``u`` in [0, 1] of the samples is."""
        if self.spacing == "logit-normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return self._level(u)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The share of samples below ``sigma``."""
        start, end = self._ends  # type: ignore[attr-defined]
        share = ((self._time(sigma) - start) / (end - start)).clamp(0, 1)
        if self.spacing == "logit-normal":
            share = torch.special.ndtr((torch.logit(share) - self.mean) / self.std)
        return share.to(sigma.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``n`` levels on the generator's device."""
        if self.spacing == "logit-normal":
            normal = torch.randn(n, generator=generator, device=generator.device)
            return self._level(torch.sigmoid(self.mean + self.std * normal))
        return self._level(torch.rand(n, generator=generator, device=generator.device))

    def _level(self, share: Tensor) -> Tensor:
        start, end = self._ends  # type: ignore[attr-defined]
        level = self.path.rho(shifted(start + (end - start) * share.double(), self.shift))
        return level.clamp(self.low, self.high).to(share.dtype)
