"""Any denoiser seen on a path: the way back from :mod:`~distmatch.diffusion.adapters`."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand, require_score
from distmatch.diffusion.paths.core import NoisePath, Time
from distmatch.diffusion.paths.named import noise_path
from distmatch.diffusion.predictions import Coefficients, check_prediction, convert


class OnPath:
    """A denoiser seen on a path: every prediction at ``x_t`` and ``t``.

    Args:
        denoiser: The denoiser.
        path: A path or its name; it need not be the one that the denoiser was trained on.
        sigma_limit: Levels beyond it, pure noise among them, are asked at it, with the noise scaled to it.
            By default the ``sigma_max`` of the denoiser, beyond which it was not trained. The error is of the
            order of (standard deviation of the data)^2 / sigma_limit.
    """

    def __init__(
        self, denoiser: Denoiser, path: str | NoisePath, *, sigma_limit: float | None = None
    ) -> None:
        self.denoiser = denoiser
        self.path = noise_path(path)
        self.sigma_limit = denoiser.sigma_max if sigma_limit is None else sigma_limit

    def predict(self, prediction: str, x: Tensor, t: Time, conditioning: ConditioningLike = None) -> Tensor:
        """A prediction at ``x`` (B, *shape) and times ``t``, (B,) or one for all.

        Finite at pure noise (alpha = 0), whatever is asked.

        Raises:
            UserError: An unknown prediction, or the score of a teacher that has none.
        """
        check_prediction(prediction)
        if prediction == "score":
            require_score(self.denoiser, "a score")
        c = self._coefficients(x, t)
        rho = c.sigma / c.alpha
        scale = torch.where(rho <= self.sigma_limit, 1 / c.alpha, self.sigma_limit / c.sigma)
        level = rho.clamp(max=self.sigma_limit).to(x.dtype)
        clean = self.denoiser(x * expand(scale, x).to(x.dtype), level, conditioning)
        return convert(clean, "x0", prediction, x, c)

    def velocity(self, x: Tensor, t: Time, conditioning: ConditioningLike = None) -> Tensor:
        """The velocity dx/dt of the probability flow, E[alpha' x0 + sigma' eps | x]."""
        return self.predict("flow", x, t, conditioning)

    def score(self, x: Tensor, t: Time, conditioning: ConditioningLike = None) -> Tensor:
        """The gradient of the log density of ``x_t``."""
        return self.predict("score", x, t, conditioning)

    def to_frame(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """``(y, sigma)`` of the denoisers from ``x_t`` and ``t``: both are divided by alpha."""
        c = self._coefficients(x, t)
        return x / c.over(x).alpha, c.sigma / c.alpha

    def from_frame(self, y: Tensor, sigma: Time) -> tuple[Tensor, Tensor]:
        """``(x_t, t)`` from y and sigma (B,), or one sigma for all."""
        level = torch.as_tensor(sigma, dtype=torch.float64, device=y.device).reshape(-1).expand(len(y))
        t = self.path.t_of_rho(level)
        return y * self.path.coefficients(t).over(y).alpha, t

    def _coefficients(self, x: Tensor, t: Time) -> Coefficients:
        times = torch.as_tensor(t, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        return self.path.coefficients(times)
