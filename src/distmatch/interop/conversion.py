"""Comparison of a converted teacher with the original: a comparison with its original at random points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Points:
    """Where a teacher and its original are compared.

    Attributes:
        y: Noised samples in our frame, (B, *shape).
        sigma: Their noise levels, (B,).
        labels: Their classes, or None.
        x0: What the original says the clean samples are, (B, *shape).
    """

    y: Tensor
    sigma: Tensor
    labels: Tensor | None
    x0: Tensor


Reference = Callable[[int, torch.Generator], Points]


@dataclass(frozen=True)
class Conversion:
    """How far a converted teacher is from its original.

    Attributes:
        difference: Largest absolute difference of x0 at any point.
        size: Largest absolute value of the original's x0.
        points: Number of points.
    """

    difference: float
    size: float
    points: int

    @property
    def relative(self) -> float:
        """The difference in units of the largest value, or of 1 where that is larger."""
        return self.difference / max(1.0, self.size)

    def __str__(self) -> str:
        """For the command line."""
        return (
            f"largest difference from the original {self.difference:.1e} "
            f"in values up to {self.size:.3g}, at {self.points} points"
        )


@torch.no_grad()
def check_conversion(
    denoiser: Denoiser,
    reference: Reference,
    *,
    points: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
) -> Conversion:
    """Compares a converted teacher with its original at random samples, noise levels and classes.

    Args:
        denoiser: The converted teacher.
        reference: Returns points and the original's predictions there.
        points: How many.
        seed: Seed of the points.
        tolerance: Largest acceptable relative difference; None: any.

    Returns:
        The largest difference.

    Raises:
        UserError: The difference is larger than the tolerance, or not finite.
    """
    training = denoiser.training if isinstance(denoiser, nn.Module) else False
    if isinstance(denoiser, nn.Module):
        denoiser.eval()
    at = reference(points, generator(seed, "conversion"))
    ours = denoiser(at.y, at.sigma, at.labels)
    if isinstance(denoiser, nn.Module):
        denoiser.train(training)
    gap = (ours - at.x0).abs().max().item()
    found = Conversion(gap, at.x0.abs().max().item(), points)
    if tolerance is not None and not found.relative <= tolerance:
        raise UserError(
            "the converted teacher does not predict what the original predicts",
            got=str(found),
            expected=f"a relative difference below {tolerance:g}",
            fix="please report this model; check=False loads it all the same",
        )
    return found
