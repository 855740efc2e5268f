"""A noise path: alpha and sigma in time, time from the noise-to-signal ratio, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.predictions import Coefficients

Time = Tensor | float


@dataclass(frozen=True)
class NoisePath:
    """A path from data to noise. Two paths are equal when name, ends and options are.

    Attributes:
        name: Its name, as accepted by :func:`noise_path`.
        t_min: The time nearest to the data that it is meant for.
        t_max: The time nearest to pure noise that it is meant for.
        curve: ``t -> Coefficients``, for float64 tensors of any shape.
        inverse: ``rho -> t``, for float64 tensors of any shape.
        options: What its constructor was given.
    """

    name: str
    t_min: float
    t_max: float
    curve: Callable[[Tensor], Coefficients] = field(compare=False, repr=False)
    inverse: Callable[[Tensor], Tensor] = field(compare=False, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def coefficients(self, t: Time) -> Coefficients:
        """alpha, sigma and their derivatives at times ``t``."""
        return self.curve(_float64(t))

    def alpha(self, t: Time) -> Tensor:
        """The factor of the clean sample."""
        return self.coefficients(t).alpha

    def sigma(self, t: Time) -> Tensor:
        """The factor of the unit noise."""
        return self.coefficients(t).sigma

    def d_alpha(self, t: Time) -> Tensor:
        """The time derivative of :meth:`alpha`."""
        return self.coefficients(t).d_alpha

    def d_sigma(self, t: Time) -> Tensor:
        """The time derivative of :meth:`sigma`."""
        return self.coefficients(t).d_sigma

    def rho(self, t: Time) -> Tensor:
        """The noise-to-signal ratio ``sigma / alpha``: the noise level in the frame of the denoisers."""
        c = self.coefficients(t)
        return c.sigma / c.alpha

    def t_of_rho(self, rho: Time) -> Tensor:
        """The time at which the noise-to-signal ratio is ``rho``.

        Closed forms answer beyond the ends of the path as well; a path given by functions answers with the
        nearest end.
        """
        return self.inverse(_float64(rho))

    def log_snr(self, t: Time) -> Tensor:
        """``log(alpha^2 / sigma^2)``, falling from data to noise."""
        return -2 * self.rho(t).log()

    def f(self, t: Time) -> Tensor:
        """The drift coefficient ``alpha' / alpha`` of ``dx = f x dt + g dw``; infinite where alpha is 0."""
        c = self.coefficients(t)
        return c.d_alpha / c.alpha

    def g2(self, t: Time) -> Tensor:
        """The squared diffusion coefficient ``2 sigma sigma' - 2 f sigma^2``; infinite where alpha is 0."""
        c = self.coefficients(t)
        return 2 * c.sigma * c.wronskian / c.alpha

    @property
    def rho_min(self) -> float:
        """The noise-to-signal ratio at ``t_min``."""
        return float(self.rho(self.t_min))

    @property
    def rho_max(self) -> float:
        """The noise-to-signal ratio at ``t_max``; infinite when it ends in pure noise."""
        return float(self.rho(self.t_max))


def _float64(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def check_prior(
    path: NoisePath, sigma_data: float, *, rho_max: float | None = None, at_least: float = 10.0
) -> None:
    """Refuses a path whose last noise still shows the data.

    A sampler starts from N(0, rho_max^2), but data with standard deviation ``sigma_data`` are at
    N(mean, rho_max^2 + sigma_data^2) there. At the limit of 10, the two differ by about
    ``(sigma_data / rho_max)^2 / 2`` = 0.005 nats a dimension when the mean is as large as the spread.

    Args:
        path: The path.
        sigma_data: Standard deviation of the data.
        rho_max: Where sampling starts; by default at the end of the path.
        at_least: Smallest acceptable ``rho_max / sigma_data``.

    Raises:
        UserError: It does not reach its prior.
    """
    end = path.rho_max if rho_max is None else rho_max
    if not end >= at_least * sigma_data:
        raise UserError(
            f"the {path.name} path does not reach its prior: its last noise level is too low for these data",
            got=f"a noise-to-signal ratio of {end:.4g} for data of standard deviation {sigma_data:.4g}",
            expected=f"at least {at_least * sigma_data:.4g}",
            fix="let the path end later or noisier (t_max, sigma_max, beta_max), or scale the data down",
        )


def check_times(name: str, t_min: float, t_max: float, low: float, high: float) -> None:
    """Refuses times of a path that do not satisfy ``low <= t_min < t_max <= high``.

    Raises:
        UserError: They do not.
    """
    if not (low <= t_min < t_max <= high and t_max < math.inf):
        raise UserError(
            f"the times of the {name} path are out of order or out of its range",
            got=f"t_min={t_min}, t_max={t_max}",
            expected=f"{low:g} <= t_min < t_max <= {high:g}, finite",
        )
