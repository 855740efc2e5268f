"""A network that predicts noise, v, flow, score or x0 on a noise path, as a denoiser that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distmatch.diffusion.paths.core import NoisePath, check_prior
from distmatch.diffusion.predictions import Coefficients, check_prediction, convert
from distmatch.nets.edm import EDMDenoiser

_TINY = 1e-12  # rates of change may be infinite without noise


class PathDenoiser(EDMDenoiser):
    """``D = x0(s F(c_in x_t, c_noise), x_t)``: the network F predicts a target on a path, in units of s.

    The target is that of :mod:`distmatch.diffusion.predictions`; s is its standard deviation for data of
    standard deviation ``sigma_data`` (score: 1 / sigma), so that the network returns numbers of
    order 1 at every level. It is shown ``x_t`` at unit variance and the level as ``ln(rho) / 4``, as the
    networks of EDM are, which is the same on every path. A path therefore changes what v and flow are, and
    with them how the network's errors are distributed over the levels.

    Where the target is the noise alone (eps, score, and the flow of a path without drift), an error of it is
    one of x0 times sigma, and at sigma = 80 the rare start that a network has hardly seen would be thrown
    out of the data. There the network predicts what the best linear guess from x_t,
    ``rho / (rho^2 + sigma_data^2) y``, leaves of the noise, in units of its standard deviation
    ``sigma_data / sqrt(rho^2 + sigma_data^2)``: its errors are errors of x0 of at most their own size times
    ``sigma_data``. The loss and its weights stay those of the target.

    Args:
        net: A network ``net(x, c_noise, labels)``.
        path: The path.
        prediction: "x0", "eps", "v", "flow" or "score".
        shape: Shape of one sample.
        num_classes: Number of classes; 0 when unconditional.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise-to-signal ratio it is meant for.
        sigma_max: Largest noise-to-signal ratio; sampling starts there.
        pfgm_dims: As for :class:`EDMDenoiser`.
        remainder: Predict noise as what a linear guess leaves of it. False is the whole target, as models
            were trained that were saved before there was a choice.

    Raises:
        UserError: An unknown prediction, levels out of order, or a path that does not reach its prior.
    """

    def __init__(
        self,
        net: nn.Module,
        path: NoisePath,
        prediction: str,
        *,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        pfgm_dims: float = 0.0,
        remainder: bool = True,
    ) -> None:
        super().__init__(
            net,
            shape=shape,
            num_classes=num_classes,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            pfgm_dims=pfgm_dims,
        )
        check_prediction(prediction)
        check_prior(path, self.sigma_data, rho_max=min(self.sigma_max, path.rho_max))
        self.path, self.prediction = path, prediction
        alone = prediction in ("eps", "score") or (prediction == "flow" and path.name in ("edm", "ve"))
        self.remainder = remainder and alone

    def _scales(self, level: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        if self.remainder:
            c_skip, c_out = super()._scales(level, variance)
            return c_skip, c_out if self.prediction == "score" else -c_out
        dtype = level.dtype
        level = level.double().clamp_min(_TINY)
        c = self.path.coefficients(self.path.t_of_rho(level))
        # Beyond the ends of a path without closed form, time stops and the level is still what it is.
        c = replace(c, sigma=c.alpha * level)
        zero, one = torch.zeros_like(level), torch.ones_like(level)
        skip = convert(zero, self.prediction, "x0", c.alpha, c)
        out = convert(one, self.prediction, "x0", zero, c) * target_scale(self.prediction, c, self.sigma_data)
        return skip.to(dtype), out.to(dtype)


def target_scale(prediction: str, coefficients: Coefficients, sigma_data: float) -> Tensor:
    """Root mean square of a prediction's target for data of mean 0, (B,).

    Args:
        prediction: One of :data:`~distmatch.diffusion.predictions.PREDICTIONS`.
        coefficients: The path at the times of the samples.
        sigma_data: Standard deviation of the data.
    """
    c = coefficients
    match prediction:
        case "x0":
            return torch.full_like(c.sigma, sigma_data)
        case "eps":
            return torch.ones_like(c.sigma)
        case "score":
            return 1 / c.sigma
        case "v":
            return torch.hypot(c.alpha, c.sigma * sigma_data)
    return torch.hypot(c.d_alpha * sigma_data, c.d_sigma)
