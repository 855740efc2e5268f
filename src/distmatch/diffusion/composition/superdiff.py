"""Several diffusion models as one: their mixture (OR), or samples that all find equally likely (AND).

SuperDiff (Skreta et al. 2025, "The superposition of diffusion models using the Ito density estimator"). In
this frame a step of the reverse SDE from level s to s' is dy = h S + sqrt(h) z with h = s^2 - s'^2, and the
log-density of each model along the way follows from its score and dy alone, see
:mod:`distmatch.diffusion.ito`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distmatch.base.checks import check_equal, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.composition.models import Conditions, Models, over_models
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.ito import ito_increment
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.priors import Prior, prior_density


@dataclass(frozen=True)
class Superposition:
    """What a superposition returns.

    Attributes:
        y: State at the last level, (B, *shape), in the dtype of the start; the sample where that is 0.
        log_q: Estimated log-density of the state at the last positive level under each model, nats,
            (M, B) float64.
        calls: Network calls for each sample, of all models together, those for the prior included.
        trajectory: (levels, B, *shape), the states at all noise levels, if requested.
    """

    y: Tensor
    log_q: Tensor
    calls: int
    trajectory: Tensor | None = None


@torch.no_grad()
def superpose(
    denoisers: Sequence[Denoiser],
    y: Tensor,
    grid: Tensor | Sequence[float],
    noise: SampleNoise,
    mode: Literal["or", "and"] = "or",
    *,
    conditions: Conditions = None,
    log_weights: Sequence[float] | Tensor | None = None,
    temperature: float = 1.0,
    curvature: bool = True,
    prior: str | Prior | Sequence[Prior] = "data",
    trajectory: bool = False,
) -> Superposition:
    """Samples from several models together, by the reverse SDE.

    ``"or"`` moves along sum_i kappa_i s_i with kappa = softmax(temperature log q_i + log_weights_i). With
    temperature 1 and the logarithms of mixture weights that is the score of the mixture, up to the error of
    the density estimates, which falls as the root of the step. ``"and"`` keeps the densities of all models
    equal, see :func:`equal_density_move`: it samples a surface, not the intersection of supports.

    Args:
        denoisers: The models, M of them, of one shape. The same one may be there with several conditions.
        y: State at level ``grid[0]``, (B, *shape): noise times that level.
        grid: Decreasing levels; the last may be 0.
        noise: Noise of the samples.
        mode: ``"or"`` or ``"and"``.
        conditions: Labels (B,) or None for each model.
        log_weights: Log mixture weights (M,), nats; they need not be normalized. Only for ``"or"``.
        temperature: Factor on the log-densities; above 1 it sharpens. Only for ``"or"``.
        curvature: For ``"and"``: include the contribution of the projected noise to the densities, with M - 1
            VJPs of each model per step, and move the samples to equal densities. False is the published form,
            whose densities are equal only where the models' Hessians agree.
        prior: Log-density of each model at ``grid[0]``: ``"data"`` is N(0, sigma^2 + sigma_data^2),
            ``"moments"`` takes mean and covariance from the model, or functions of position and labels, one
            for all or one for each model.
        trajectory: Keep the states at all levels.

    Returns:
        State, log-densities, cost.

    Raises:
        UserError: Models, conditions, weights, noise and start do not go together.
    """
    models = Models(denoisers, conditions, "a superposition of models")
    check_name("superposition", mode, ("or", "and"))
    levels = models.levels(grid, to_zero=True)
    models.check_batch(y, noise)
    offsets = _offsets(models, mode, log_weights, temperature, y)
    log_q = _log_prior(models, y, levels[0], prior)
    state = y.double()
    states = [y] if trajectory else []
    for k, (now, after) in enumerate(pairwise(levels)):
        h = (now - after) * (now + after)
        z = noise.normal(k).double() if after > 0 else torch.zeros_like(state)
        lost = None
        if mode == "and" and curvature and after > 0:
            scores, curve = models.scores_and_curvature(state, now, y.dtype)
        else:
            scores, curve = models.scores(state, now, y.dtype), None
        if mode == "or":
            weights = (temperature * log_q + offsets).softmax(0)
            moved = state + h * over_models(weights, scores) + math.sqrt(h) * z
        else:
            span = DifferenceSpan.of(scores, _rounding(state, scores, now, y.dtype))
            if curve is not None:
                lost = curve(span.axes.reshape(-1, *state.shape))
            extra = None if lost is None else 0.5 * lost - log_q / h
            moved = state + equal_density_move(scores, z, h, span=span, extra=extra)
        if after > 0:
            # The noise that was projected away is missing from Ito's term: tr(P H) where the whole noise has
            # div s, which is the deterministic case (ratio 0) within the span.
            ratio = 1.0 if lost is None else 0.0
            log_q = log_q + ito_increment(
                scores, state, moved, now, after, divergence=lost, noise_ratio=ratio
            )
        state = moved
        if trajectory:
            states.append(state.to(y.dtype))
    return Superposition(state.to(y.dtype), log_q, models.calls, torch.stack(states) if trajectory else None)


@dataclass(frozen=True)
class DifferenceSpan:
    """The span of the differences s_i - s_1 of M scores, by Gram-Schmidt.

    Attributes:
        axes: Orthonormal, (M - 1, B, D); zeros where a difference adds no direction.
        inverse: 1 / length of what each difference adds, (M - 1, B, 1); 0 where that is nothing.
        differences: s_i - s_1, (M - 1, B, D).
    """

    axes: Tensor
    inverse: Tensor
    differences: Tensor

    @classmethod
    def of(cls, scores: Tensor, rounding: Tensor | float = 0.0) -> DifferenceSpan:
        """The span for ``scores`` (M, B, *shape); parts shorter than ``rounding``, (B,), count as none."""
        points = scores.flatten(2)
        differences = points[1:] - points[0]
        least = torch.as_tensor(rounding, dtype=points.dtype, device=points.device).reshape(-1, 1) ** 2
        axes, inverse = torch.zeros_like(differences), torch.zeros_like(differences[..., :1])
        for i, rest in enumerate(differences):
            for _ in range(2):  # twice, for rounding
                for axis in axes[:i]:
                    rest = rest - axis * _dot(axis, rest)
            size = _dot(rest, rest)
            inverse[i] = torch.where(size > least, size, math.inf).rsqrt()
            axes[i] = rest * inverse[i]
        return cls(axes, inverse, differences)

    def solve(self, goals: Tensor) -> Tensor:
        """The vector v (B, D) in the span with v . (s_i - s_1) = goals_i, (M - 1, B, 1)."""
        total = torch.zeros_like(self.axes[0]) if len(self.axes) else goals.new_zeros(())
        for axis, inverse, difference, goal in zip(
            self.axes, self.inverse, self.differences, goals, strict=True
        ):
            total = total + axis * ((goal - _dot(total, difference)) * inverse)
        return total

    def without(self, z: Tensor) -> Tensor:
        """Takes ``z`` (B, D) off the span."""
        for axis in self.axes:
            z = z - axis * _dot(axis, z)
        return z


def equal_density_move(
    scores: Tensor, z: Tensor, h: float, *, span: DifferenceSpan | None = None, extra: Tensor | None = None
) -> Tensor:
    """A step of the reverse SDE along which the log-densities of all models change by the same amount.

    The mean is h times the circumcenter of the scores in their affine hull, and the noise is projected off
    the span of their differences. For two models that is the average score, and noise off s_1 - s_2. The
    weights kappa of the paper give the same step; they hold differences of 1 / h that cancel, this does not.

    Ito's rule for the projected noise has a term that the paper omits: with P the projection on the
    span and H_i the Hessian of log q_i, log q_i changes by h tr(P H_i) / 2 less than it counts. ``extra``
    takes that in.

    With three or more models whose scores are nearly on a line the circumcenter is far away, and the step
    large: equal densities are then hardly to be had.

    Args:
        scores: Scores of the models, (M, B, *shape) float64.
        z: Unit normal noise, (B, *shape).
        h: s^2 - s'^2.
        span: The span of the differences, where it is known.
        extra: (M, B): by how much more, in units of h, model i is to gain along the mean; only differences
            count. What it adds to the step is cut to the length of a unit of noise, sqrt(h), which as the
            steps shrink is no cut.

    Returns:
        The move (B, *shape).
    """
    span = DifferenceSpan.of(scores) if span is None else span
    first = scores[0].flatten(1)
    mean = h * (first + span.solve(0.5 * span.differences.square().sum(-1, keepdim=True)))
    if extra is not None:
        shift = h * span.solve((extra[1:] - extra[0])[..., None])
        length = _dot(shift, shift).sqrt()
        mean = mean + shift * (math.sqrt(h) / length.clamp_min(math.sqrt(h)))
    return (mean + math.sqrt(h) * span.without(z.flatten(1))).reshape(z.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (B, 1)."""
    return (a * b).sum(-1, keepdim=True)


def _rounding(state: Tensor, scores: Tensor, level: float, dtype: torch.dtype) -> Tensor:
    """How far apart two equal scores may come out, (B,): rounding of D over level^2."""
    size = state.flatten(1).norm(dim=1) / level**2 + scores.flatten(2).norm(dim=2).amax(0)
    return 32 * torch.finfo(dtype).eps * size


def _offsets(
    models: Models, mode: str, log_weights: Sequence[float] | Tensor | None, temperature: float, like: Tensor
) -> Tensor:
    """Log mixture weights (M, 1) float64; 0 where none were given."""
    if mode == "and" and (log_weights is not None or temperature != 1):
        raise UserError(
            "equal densities have no weights and no temperature", fix='leave them out, or use mode="or"'
        )
    check_number("the temperature", temperature, "[0, inf)")
    values = torch.zeros(len(models)) if log_weights is None else torch.as_tensor(log_weights)
    if values.shape != (len(models),) or bool(values.isnan().any()):
        raise UserError(
            "there must be one log weight for each model", got=values.tolist(), expected=(len(models),)
        )
    if not -math.inf < float(values.max()) < math.inf:
        raise UserError(
            "some model must have a weight, and none an infinite one",
            got=values.tolist(),
            fix="give logarithms of mixture weights; -inf excludes a model",
        )
    return values.to(device=like.device, dtype=torch.float64)[:, None]


def _log_prior(models: Models, y: Tensor, level: float, prior: str | Prior | Sequence[Prior]) -> Tensor:
    """Log-densities (M, B) float64 at the first level."""
    if isinstance(prior, str) or callable(prior):
        priors: list[str | Prior] = [prior] * len(models)
    else:
        priors = list(prior)
    check_equal("the numbers of models and of priors", len(models), len(priors))
    densities = [
        prior_density(p, denoiser, level, dtype=y.dtype)
        for p, denoiser in zip(priors, models.denoisers, strict=True)
    ]
    values = [p(y.double(), labels) for p, labels in zip(densities, models.conditions, strict=True)]
    return torch.stack(values).double()
