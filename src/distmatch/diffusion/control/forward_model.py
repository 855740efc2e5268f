"""Sampling through a known forward model: guidance by how well its output fits what was observed.

TSDiff's observation guidance (Kollovieh et al. 2023) for any differentiable f: the score gets scale times
-grad_y loss(observed, f(D(y, sigma))), that is D' = D - scale sigma^2 grad. With the squared error and scale
1 / variance it is the likelihood of f(x0) = observed as if D were x0 itself, so it is an approximation, one
that gets better as sigma falls; for linear f :class:`~distmatch.diffusion.control.inverse.LinearPosterior`
counts the spread of x0 too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_number, check_one_each
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand, is_diffused, require_score
from distmatch.diffusion.geometry.jacobian import (
    connected,
    denoise_for_gradient,
    refuse_random_layers,
    slopes,
)
from distmatch.diffusion.guidance import Calls, Wrapper, cost_of

Loss = Callable[[Tensor, Tensor], Tensor]


def squared_error(predicted: Tensor, observed: Tensor) -> Tensor:
    """Half the sum of squares over each sample, (B,): -log N(observed; predicted, 1) but for a constant."""
    return 0.5 * (predicted - observed).flatten(1).square().sum(1)


def quantile_loss(levels: Tensor) -> Loss:
    """The pinball loss, summed over each sample: sample i is drawn to the quantile ``levels[i]``.

    Args:
        levels: Quantile of each sample in a call, (B,), in (0, 1); see :func:`spread_quantiles`.

    Raises:
        UserError: A level is outside (0, 1).
    """
    if levels.ndim != 1 or not bool(((levels > 0) & (levels < 1)).all()):
        raise UserError("quantile levels lie between 0 and 1, one per sample", got=levels.tolist()[:6])

    def loss(predicted: Tensor, observed: Tensor) -> Tensor:
        check_one_each("quantile", levels, len(predicted))
        error = (observed - predicted).flatten(1)
        q = levels.to(error)[:, None]
        return torch.maximum(q * error, (q - 1) * error).sum(1)

    return loss


def spread_quantiles(n: int) -> Tensor:
    """(1, ..., n) / (n + 1): the quantiles that n samples of one observation are spread over."""
    return torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)


class ObservationGuided(Wrapper):
    """A denoiser drawn to samples whose image under a forward model fits an observation.

    Args:
        inner: The model, differentiable with respect to its input.
        forward_model: f, from clean samples (B, *shape) to predictions (B, ...), differentiable.
        observed: What f should give, of the shape of one prediction, or (B, ...).
        scale: Strength; 0 is the model itself, without a backward pass.
        loss: From predictions and observations (B, ...) to (B,); by default :func:`squared_error`.

    Raises:
        UserError: A negative scale, or a model without a score.
    """

    def __init__(
        self,
        inner: Denoiser,
        forward_model: Callable[[Tensor], Tensor],
        observed: Tensor,
        scale: float,
        loss: Loss = squared_error,
    ) -> None:
        require_score(inner, "guidance by observations")
        refuse_random_layers(inner)
        super().__init__(inner)
        check_number("the scale of a guidance by observations", scale, "[0, inf)")
        self.forward_model, self.observed, self.scale, self.loss = forward_model, observed, scale, loss

    @property
    def diffused(self) -> bool:
        """Whether the scores at all levels are those of one noised density: only at scale 0."""
        return self.scale == 0 and is_diffused(self.inner)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """The guided prediction, (B, *shape)."""
        if self.scale == 0:
            return self.inner(x, sigma, conditioning)
        out, leaf = denoise_for_gradient(self.inner, x, sigma, conditioning)
        with torch.enable_grad():
            value = connected(self._misfit(out), out, self._misfit, "the loss of an observation")
            (slope,) = slopes(value, (leaf,))
        level = expand(sigma.to(slope).reshape(-1).expand(len(x)), slope)
        return out.detach() - self.scale * level**2 * slope

    def _misfit(self, clean: Tensor) -> Tensor:
        """The loss of predictions of the clean samples, (B,)."""
        predicted = self.forward_model(clean)
        observed = self.observed.to(predicted)
        if observed.shape not in (predicted.shape, predicted.shape[1:]):
            raise UserError(
                "the observation does not have the shape of the forward model's output",
                got=tuple(observed.shape),
                expected=f"{tuple(predicted.shape[1:])} or {tuple(predicted.shape)}",
            )
        value = self.loss(predicted, observed.expand_as(predicted))
        check_one_each("differentiable loss of an observation", value, len(clean))
        return value

    def cost(self, sigma: Tensor, conditioning: ConditioningLike = None) -> Calls:
        """One call of the model and, unless the scale is 0, a backward pass."""
        return cost_of(self.inner, sigma, conditioning) + Calls(backward=int(self.scale != 0))
