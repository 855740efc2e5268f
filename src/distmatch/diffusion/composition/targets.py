"""Targets made of several models: powers of their densities, times the exponential of a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_equal, check_one_each
from distmatch.base.errors import UserError
from distmatch.diffusion.composition.models import Conditions
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.geometry.jacobian import connected, slopes
from distmatch.diffusion.noise_streams import SampleNoise

Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """prod_i q_i^powers_i exp(b r), up to its normalizer.

    Attributes:
        denoisers: The models, of one shape; the same one may be there with several conditions.
        powers: beta_i of each; their sum must be positive.
        conditions: Labels (B,) or None for each model.
        reward: r: from states (B, *shape) to nats (B,), differentiable; it sees noised states.
        strength: b as a function of the noise level. By default it rises from 0 at the first level to 1 at
            the last with sigma_data^2 / (sigma^2 + sigma_data^2), which keeps the shift that a linear reward
            makes about the same at all levels.
    """

    denoisers: Sequence[Denoiser]
    powers: Sequence[float]
    conditions: Conditions = None
    reward: Reward | None = None
    strength: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        check_equal("the numbers of models and of their powers", len(self.denoisers), len(self.powers))
        if not all(math.isfinite(p) for p in self.powers) or not sum(self.powers) > 0:
            raise UserError(
                "the powers of a target must have a positive sum, or it has no density at the first "
                "noise level",
                got=list(self.powers),
            )
        if self.strength is not None and self.reward is None:
            raise UserError("a strength without a reward has no effect", fix="pass reward too")


def annealed(denoiser: Denoiser, beta: float, conditioning: ConditioningLike = None) -> Target:
    """q^beta: sharper for beta above 1, flatter below."""
    return Target([denoiser], [beta], [conditioning])


def product(
    denoisers: Sequence[Denoiser], powers: Sequence[float] | None = None, conditions: Conditions = None
) -> Target:
    """The product of the densities of several models: samples that all of them find likely."""
    return Target(denoisers, [1.0] * len(denoisers) if powers is None else powers, conditions)


def geometric(
    conditional: Denoiser,
    reference: Denoiser,
    scale: float,
    conditioning: ConditioningLike = None,
    reference_condition: ConditioningLike = None,
) -> Target:
    """What guidance by ``scale`` claims to sample: q_conditional^scale q_reference^(1 - scale)."""
    return Target([conditional, reference], [scale, 1 - scale], [conditioning, reference_condition])


def annealed_prior(target: Target, sigma: float, noise: SampleNoise, mean: Tensor | float = 0.0) -> Tensor:
    """Samples of the target at a noise level that hides the data: normals whose precision is a weighted sum.

    Args:
        target: Models and powers; the reward is omitted, as its strength there is 0.
        sigma: The level.
        noise: Noise of the samples; its draw 1 of step 0 is used, a run uses draws 0.
        mean: Mean of the data, where it is known, (*shape).

    Returns:
        (B, *shape) float64.

    Raises:
        UserError: The powers leave no positive precision.
    """
    precision = sum(
        beta / (sigma**2 + d.sigma_data**2) for beta, d in zip(target.powers, target.denoisers, strict=True)
    )
    if not precision > 0:
        raise UserError(
            "the target has no density at this noise level",
            got=f"precision {precision:.3g} from powers {list(target.powers)}",
            fix="start at a higher noise level, or use smaller powers",
        )
    return mean + noise.normal(0, 1).double() / math.sqrt(precision)


def reward_and_slope(reward: Reward, state: Tensor) -> tuple[Tensor, Tensor]:
    """The reward r (B,) and its gradient (B, *shape), float64.

    Raises:
        UserError: The reward is not one differentiable number for each sample.
    """
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        value = reward(leaf)
        check_one_each("differentiable number of the reward", value, len(state))
        (slope,) = slopes(connected(value, leaf, reward, "this reward"), (leaf,))
    return value.detach().double(), slope.double()


def strengths(target: Target, levels: tuple[float, ...]) -> list[float]:
    """The strength b of the reward at each level."""
    if target.strength is not None:
        return [float(target.strength(s)) for s in levels]
    width = max(d.sigma_data for d in target.denoisers) ** 2
    raw = [width / (s**2 + width) for s in levels]
    return [(r - raw[0]) / (raw[-1] - raw[0]) for r in raw]
