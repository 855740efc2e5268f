"""Images as the noises that a model would have needed to make them, and translation by another model.

DPM-Encoder and CycleDiffusion (Wu and De la Torre 2023). With eta in (0, 1] and a step from level s to s',
c = eta s' sqrt(1 - s'^2 / s^2), a state is drawn from the true posterior given x0 and the state before,

    y' = x0 + sqrt(s'^2 - c^2) / s (y - x0) + c z,

and its code is e = (y' - mean) / c, where the mean is the same with D(y) for x0. Decoding runs the
stochastic sampler with the codes for noise: with the model that encoded it gives x0 back, with another one a
translation. The step to level 0 has no noise; its code is what D is off, x0 - D(y).

Codes are not the unit normals that the sampler draws. With k = sqrt(s'^2 - c^2) / s they are e = z + (1 -
k) / c (x0 - D(y)), so that E e^2 = 1 + ((1 - k) / c)^2 Var[x0 | y] for a model's own samples. For a short
step, d = 1 - s'/s, the excess is (1 + eta^2)^2 / (2 eta^2) d Var[x0 | y] / s^2: it goes to 0 as steps
shrink, and the smaller eta is, the more of them that takes. The codes of one sample share its x0, so that
they are never independent: a translation keeps what the two domains share, and its samples do not have
exactly the distribution of the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.checks import check_batch, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, conditioning_for
from distmatch.diffusion.denoiser import Denoiser, levels_like, require_score
from distmatch.diffusion.latents import Decoder, decoder_of, require_same_samples
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers.grids import checked_levels


@dataclass(frozen=True)
class Code:
    """A batch of samples as the noises of a sampler.

    Attributes:
        start: State at the first level, (B, *shape) float64.
        noises: Codes of the steps, (steps, B, *shape) float64; the last is the residual at level 0.
        levels: The levels, the last one 0.
        eta: Share of noise in the sampler.
        decoder: Whose latents the samples were; None where they were no latents.
    """

    start: Tensor
    noises: Tensor
    levels: tuple[float, ...]
    eta: float
    decoder: Decoder | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.start.shape[1:])


def _mean_and_spread(clean: Tensor, y: Tensor, now: float, after: float, eta: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of the step from ``now`` to ``after`` if x0 were ``clean``."""
    spread = eta * after * math.sqrt(1 - (after / now) ** 2)
    kept = math.sqrt(after**2 - spread**2) / now
    return clean + kept * (y - clean), spread


def _denoise(
    denoiser: Denoiser, y: Tensor, level: float, dtype: torch.dtype, conditioning: ConditioningLike
) -> Tensor:
    return denoiser(y.to(dtype), levels_like(y, level, dtype), conditioning).double()


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor | Sequence[float],
    noise: SampleNoise,
    *,
    eta: float = 0.1,
    conditioning: ConditioningLike = None,
) -> Code:
    """Encodes samples: one call a step.

    Args:
        denoiser: The model of the domain that ``x`` comes from.
        x: Clean samples, (B, *shape).
        grid: Decreasing levels that end at 0.
        noise: Noise of the samples.
        eta: Share of noise, above 0 and at most 1; small values stay closer to ``x`` in a translation.
        conditioning: Labels (B,), -1 for none.

    Raises:
        UserError: ``eta`` is out of range, the grid does not end at 0, or shapes do not fit.
    """
    require_score(denoiser, "an encoder by posterior noise")
    levels = checked_levels(grid, stochastic=True)
    if levels[-1] != 0:
        raise UserError("an encoding must end at sigma 0", got=levels[-1], fix="use to_zero=True in grid()")
    check_number("eta", eta, "(0, 1]", fix="without noise, invert with solve() on an increasing grid")
    check_batch("the samples of this model", x, denoiser.shape)
    noise.check(x)
    conditioning = conditioning_for(denoiser, conditioning, len(x))
    clean = x.double()
    start = y = clean + levels[0] * noise.normal(0, 1).double()
    noises = []
    for k, (now, after) in enumerate(pairwise(levels)):
        guess = _denoise(denoiser, y, now, x.dtype, conditioning)
        if after == 0:
            noises.append(clean - guess)
            break
        drawn, spread = _mean_and_spread(clean, y, now, after, eta)
        drawn = drawn + spread * noise.normal(k).double()
        noises.append((drawn - _mean_and_spread(guess, y, now, after, eta)[0]) / spread)
        y = drawn
    return Code(start, torch.stack(noises), levels, eta, decoder_of(denoiser))


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    code: Code,
    *,
    conditioning: ConditioningLike = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Samples (B, *shape) in ``dtype`` from a code: those it was made from, if the model is the same.

    Args:
        denoiser: The model that encoded, or one of the domain to translate to.
        code: From :func:`encode`.
        conditioning: Labels (B,), -1 for none.
        dtype: In which the model is called.

    Raises:
        UserError: The model has samples of another shape or autoencoder, or no score.
    """
    require_score(denoiser, "a decoder of posterior noise")
    require_same_samples([code, denoiser], "a translation")
    conditioning = conditioning_for(denoiser, conditioning, len(code.start))
    y = code.start
    for (now, after), e in zip(pairwise(code.levels), code.noises, strict=True):
        guess = _denoise(denoiser, y, now, dtype, conditioning)
        if after == 0:
            y = guess + e
        else:
            mean, spread = _mean_and_spread(guess, y, now, after, code.eta)
            y = mean + spread * e
    return y.to(dtype)


def translate(
    source: Denoiser,
    target: Denoiser,
    x: Tensor,
    grid: Tensor | Sequence[float],
    noise: SampleNoise,
    *,
    eta: float = 0.1,
    source_condition: ConditioningLike = None,
    target_condition: ConditioningLike = None,
) -> Tensor:
    """Takes samples of one model's domain to another's: encode with the one, decode with the other.

    Args:
        source: The model that ``x`` belongs to.
        target: The model to go to; it may be the same one with another condition.
        x: Clean samples, (B, *shape).
        grid: Decreasing levels that end at 0; a start below ``sigma_max`` keeps more of ``x``.
        noise: Noise of the samples.
        eta: Share of noise.
        source_condition: Labels (B,) of ``x``.
        target_condition: Labels (B,) to go to.

    Returns:
        (B, *shape) in the dtype of ``x``.
    """
    code = encode(source, x, grid, noise, eta=eta, conditioning=source_condition)
    return decode(target, code, conditioning=target_condition, dtype=x.dtype)
