"""Minority guidance: towards the samples that the model itself finds hard to reconstruct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, conditioning_for
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.guidance.classifier import Classifier, ClassifierGuided
from distmatch.diffusion.noise_streams import SampleNoise

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x0, x0_hat), both (B, *shape), to distances (B,)."""


def squared_distance(x0: Tensor, denoised: Tensor) -> Tensor:
    """|x0 - x0_hat|^2, (B,)."""
    return (x0 - denoised).flatten(1).square().sum(1)


@torch.no_grad()
def minority_score(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: float,
    *,
    draws: int = 5,
    distance: Distance = squared_distance,
    conditioning: ConditioningLike = None,
    seed: int = 0,
    batch: int = 1024,
) -> Tensor:
    """E_eps d(x0, D(x0 + sigma eps)): large where the posterior mean is far, that is in thin regions.

    Um et al. 2024, "Don't play favorites: minority guidance for diffusion models", who use LPIPS, five draws
    and a noise level in the middle of the schedule. The noise of sample i depends on the seed and i alone.

    Args:
        denoiser: The model.
        x0: Clean samples (n, *shape).
        sigma: Noise level; of the order of the distance between modes.
        draws: Noises for each sample.
        distance: d.
        conditioning: Labels (n,), -1 for none.
        seed: Seed of the noise.
        batch: Samples per batch.

    Returns:
        (n,) float64 on the CPU.

    Raises:
        UserError: Samples of another shape, no draws, a level that is not positive.
    """
    require_score(denoiser, "a minority score, which adds Gaussian noise,")
    if tuple(x0.shape[1:]) != tuple(denoiser.shape) or draws < 1 or not sigma > 0 or batch < 1:
        raise UserError(
            "a minority score needs samples of the model, one draw or more, and a positive noise level",
            got=f"samples {tuple(x0.shape)}, draws={draws}, sigma={sigma}, batch={batch}",
            expected=f"samples (n, {', '.join(map(str, denoiser.shape))})",
        )
    conditioning = conditioning_for(denoiser, conditioning, len(x0))
    parts = []
    for start in range(0, len(x0), batch):
        rows = x0[start : start + batch]
        cond = conditioning.index(slice(start, start + batch))
        noise = SampleNoise(seed, torch.arange(start, start + len(rows)), tuple(denoiser.shape), rows.device)
        level = torch.full((len(rows),), sigma, dtype=rows.dtype, device=rows.device)
        total = torch.zeros(len(rows), dtype=torch.float64)
        for draw in range(draws):
            noised = rows + sigma * noise.normal(draw).to(rows)
            total += distance(rows, denoiser(noised, level, cond)).double().cpu()
        parts.append(total / draws)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class QuantileClasses:
    """Classes of a score with equal counts: 0 the smallest scores, the last one the minority.

    Attributes:
        edges: (classes - 1,) float64, between the scores of neighboring classes.
    """

    edges: Tensor

    @classmethod
    def of(cls, scores: Tensor, classes: int = 100) -> QuantileClasses:
        """Cuts ``scores`` (n,) into classes whose counts differ by one at most, where no scores are tied.

        Raises:
            UserError: Fewer than two classes, fewer scores than classes, or a score that is not finite.
        """
        if classes < 2 or scores.ndim != 1 or len(scores) < classes or not bool(scores.isfinite().all()):
            raise UserError(
                "quantile classes need two classes or more, and at least one finite score for each",
                got=f"{classes} classes of scores {tuple(scores.shape)}",
            )
        ordered = scores.double().cpu().sort().values
        first = torch.arange(1, classes) * len(ordered) // classes
        return cls((ordered[first - 1] + ordered[first]) / 2)

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.edges) + 1

    def labels(self, scores: Tensor) -> Tensor:
        """Classes (n,) int64 of ``scores`` (n,), on their device."""
        return torch.bucketize(scores.double(), self.edges.to(scores.device))


def minority_guided(
    denoiser: Denoiser,
    classifier: Classifier,
    scale: float = 3.5,
    *,
    level: int | None = None,
    num_classes: int | None = None,
    interval: tuple[float, float] | None = None,
) -> ClassifierGuided:
    """The denoiser led to one class of the minority score; its own condition stays free.

    Args:
        denoiser: The model, with or without classes.
        classifier: Noisy classifier of the score's classes, for example a fitted
            :class:`~distmatch.diffusion.guidance.noisy_classifier.NoisyClassifier`.
        scale: Factor of the gradient; 3.5 in the paper. 0 is the denoiser itself.
        level: The class to go to; by default the last, the minority.
        num_classes: Number of the score's classes, where the classifier does not say.
        interval: (low, high): guide where low < sigma <= high only.

    Raises:
        UserError: As :class:`ClassifierGuided`, or the number of the score's classes is not known.
    """
    count = num_classes or getattr(classifier, "num_classes", 0)
    if not count:
        raise UserError("the number of classes of the minority score is not known", fix="pass num_classes=")
    target = count - 1 if level is None else level
    return ClassifierGuided(denoiser, classifier, scale, target=target, num_classes=count, interval=interval)
