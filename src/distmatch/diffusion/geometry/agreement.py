"""Do two denoisers that learned from disjoint halves of the data agree? If so they learned the distribution.

After Kadkhodaie et al. 2024 (arXiv 2310.02557): models that memorize disagree, models that generalize agree,
first at high noise and last at low noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.base.seeds import initial_noise
from distmatch.diffusion.conditioning import ConditioningLike, as_conditioning, check_conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.geometry.summary import ratio_of
from distmatch.diffusion.latents import require_same_samples


@dataclass(frozen=True)
class Agreement:
    """What was measured at one noise level.

    Attributes:
        sigma: The level.
        disagreement: E|D_a - D_b|^2 over the mean of E|D_a - x0|^2 and E|D_b - x0|^2, on the same noisy
            data: 0 for equal models, 2 for models whose errors are unrelated.
        error_a: E|D_a - x0|^2 / dim, of the first model.
        error_b: The same of the second.
    """

    sigma: float
    disagreement: Estimate
    error_a: Estimate
    error_b: Estimate


def agreement(
    first: Denoiser,
    second: Denoiser,
    x0: Tensor,
    sigmas: Sequence[float],
    *,
    conditioning: ConditioningLike = None,
    seed: int = 0,
    batch: int = 1024,
) -> list[Agreement]:
    """Compares two denoisers on held-out data at several noise levels.

    Args:
        first: Trained on one part of the data.
        second: Trained on another, disjoint part.
        x0: Clean data that neither has seen, (n, *shape).
        sigmas: Levels.
        conditioning: Labels (n,), -1 for none.
        seed: Seed of the noise, which all levels share.
        batch: Samples per batch.

    Raises:
        UserError: The models are for other data, or a level is not positive.
    """
    require_same_samples([first, second], "an agreement of two models")
    if tuple(first.shape) != tuple(x0.shape[1:]) or len(x0) < 2:
        raise UserError(
            "both denoisers must be for these data",
            got=f"{tuple(first.shape)}, {tuple(second.shape)} and data {tuple(x0.shape)}",
        )
    if not all(0 < s < math.inf for s in sigmas):
        raise UserError("noise levels must be positive", got=list(sigmas))
    rows = []
    for sigma in sigmas:
        apart, a, b = _square_errors([first, second], x0, sigma, conditioning, seed, batch)
        rows.append(Agreement(sigma, ratio_of(apart, (a + b) / 2), mean_of(a), mean_of(b)))
    return rows


def generalization_gap(
    denoiser: Denoiser,
    train: Tensor,
    held_out: Tensor,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    batch: int = 1024,
) -> list[Estimate]:
    """How many dB better a denoiser is on its training data than on held-out data, at each level.

    That is the difference of the PSNR, 10 log10 of the ratio of the mean squared errors: 0 for a model that
    generalizes, positive for one that memorizes. Conditional models are called without a condition.

    Args:
        denoiser: The model.
        train: Clean data it learned from, (n, *shape).
        held_out: Clean data it did not, (m, *shape).
        sigmas: Levels.
        seed: Seed of the noise.
        batch: Samples per batch.
    """
    gaps = []
    for sigma in sigmas:
        seen, unseen = (
            mean_of(_square_errors([denoiser], x0, sigma, None, seed, batch)[0]) for x0 in (train, held_out)
        )
        stderr = math.hypot(seen.stderr / seen.value, unseen.stderr / unseen.value) * 10 / math.log(10)
        gaps.append(Estimate(10 * math.log10(unseen.value / seen.value), stderr, min(seen.n, unseen.n)))
    return gaps


@torch.no_grad()
def _square_errors(
    models: Sequence[Denoiser],
    x0: Tensor,
    sigma: float,
    conditioning: ConditioningLike,
    seed: int,
    batch: int,
) -> Tensor:
    """Mean squares over the coordinates of D_a - D_b, D_a - x0, D_b - x0, or of D_a - x0, (3 or 1, n)."""
    cond = as_conditioning(conditioning)
    check_conditioning(cond, len(x0))
    noise = initial_noise(len(x0), tuple(x0.shape[1:]), seed, "agreement")
    columns = []
    for start in range(0, len(x0), batch):
        part = slice(start, start + batch)
        x = x0[part]
        y = x + sigma * noise[part].to(x)
        level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        sides = [*(model(y, level, cond.index(part)).double() for model in models), x.double()]
        pairs = combinations(sides, 2)
        columns.append(torch.stack([(p - q).flatten(1).square().mean(1) for p, q in pairs]))
    return torch.cat(columns, dim=1).cpu()


def sample_cosine(first: Tensor, second: Tensor) -> Estimate:
    """Mean cosine between samples that two models made from the same noise, (n, *shape) each, centered alike.

    Both sets have their common mean subtracted, else the mean of the data would make any two models agree.

    Raises:
        UserError: The sets do not have the same shape.
    """
    if first.shape != second.shape or len(first) < 2:
        raise UserError(
            "cosines need pairs of samples", got=f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    a, b = first.double().flatten(1), second.double().flatten(1)
    center = torch.cat([a, b]).mean(0)
    return mean_of(torch.cosine_similarity(a - center, b - center, dim=1))


def nearest_cosine(samples: Tensor, train: Tensor, *, chunk: int = 1024) -> Tensor:
    """For each sample the largest cosine with a training example, (n,); near 1 for a copy.

    Args:
        samples: (n, *shape).
        train: (m, *shape); its mean is subtracted from both.
        chunk: Samples per batch.
    """
    center = train.flatten(1).double().mean(0)  # and differences in float64: a mean far out has few digits
    known, ours = (
        torch.nn.functional.normalize((x.flatten(1).double() - center).to(x.dtype), dim=1)
        for x in (train, samples)
    )
    return torch.cat([(part @ known.T).amax(1) for part in ours.split(chunk)])
