"""Signs of a collapsed generator, from samples of a few conditions under many seeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distmatch.discrepancies.energy import energy_distance_loss
from distmatch.metrics.vendi import vendi_score

SOLID = 0.05
"""Standard deviation of the pixels of a channel, in model space [-1, 1], below which it is one color."""
MOST_VALUES = 12_288
"""Values of a sample, 64x64 pixels in three channels, beyond which :func:`reduced` shrinks it."""


def _flat(x: Tensor) -> Tensor:
    """Samples (..., S, *shape) with the seeds first: (S, D) in float64."""
    return x.flatten(1).double()


def seed_distances(x: Tensor) -> Tensor:
    """Mean distance between the samples of a condition, over all pairs of seeds.

    The distance is the root mean square difference of the values, so that it does not grow with their number.
    It is 0 for a generator that ignores its noise, does not change when a constant is added to all samples,
    and scales with them.

    Args:
        x: Samples (C, S, *shape) of C conditions, S at least 2.

    Returns:
        (C,) float64.
    """
    return torch.stack([torch.pdist(_flat(own)).mean() / own[0].numel() ** 0.5 for own in x])


def seed_vendi(x: Tensor, center: Tensor) -> Tensor:
    """The Vendi score of the samples of a condition, by the cosines of their deviations from a center.

    Between 1, for a generator that ignores its noise, and S. Without the center, images of one prompt have
    cosines near 1 whatever differs between them.

    Args:
        x: Samples (C, S, *shape) of C conditions.
        center: The center of each condition, (C, *shape): the mean of the teacher's samples.

    Returns:
        (C,) float64.
    """
    values = [vendi_score(_flat(own - mean)) for own, mean in zip(x, center, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def seed_energy(x: Tensor, y: Tensor) -> float:
    """The energy distance between two generators, a mean over conditions, relative to the spread of ``y``.

    The unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| over E|Y - Y'|: 0 in expectation for equal
    distributions, and 0.41, the root of 2 less 1, where X is the mean of a normal Y of many dimensions.

    Args:
        x: Samples (C, S, *shape), of the student.
        y: Samples (C, S, *shape), of the teacher.
    """
    pairs = [(_flat(a), _flat(b)) for a, b in zip(x, y, strict=True)]
    distance = torch.stack([energy_distance_loss(a, b) for a, b in pairs]).mean()
    return float(distance / torch.stack([torch.pdist(b).mean() for _, b in pairs]).mean())


def saturation(x: Tensor) -> Tensor:
    """The share of values at the ends of the range, those that are shown as 0 or 255.

    Args:
        x: Images (N, C, H, W) or video (N, C, T, H, W) in model space, before clipping to [-1, 1].

    Returns:
        (N,) float64.
    """
    return (x.abs() > 1 - 1 / 255).double().flatten(1).mean(1)


def solid_share(x: Tensor, bound: float = SOLID) -> Tensor:
    """The share of the frames that are one color: every channel varies by less than a bound over the pixels.

    Args:
        x: Images (N, C, H, W), of one frame each, or video (N, C, T, H, W), in model space.
        bound: Standard deviation, in units of model space.

    Returns:
        (N,) float64: 0 or 1 for images.
    """
    spread = x.clamp(-1, 1).double().flatten(-2).std(-1, correction=0)  # (N, C) or (N, C, T)
    solid = (spread.amax(1) < bound).double()
    return solid if solid.ndim == 1 else solid.mean(1)


def reduced(x: Tensor, most: int = MOST_VALUES) -> Tensor:
    """Images or video with at most ``most`` values: area averages over pixels, and of video over frames.

    Args:
        x: (N, C, H, W) or (N, C, T, H, W); samples of another kind and small ones are returned as they are.
        most: Largest number of values of a sample.
    """
    if x.ndim < 4:
        return x
    channels, *size = x.shape[1:]
    while channels * torch.Size(size).numel() > most and max(size) > 1:
        largest = size.index(max(size))
        size[largest] = (size[largest] + 1) // 2
    if size == list(x.shape[2:]):
        return x
    return F.interpolate(x, size, mode="area")
