"""The one model contract: D(x, sigma, condition) in the variance-exploding frame x = x0 + sigma eps."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """Posterior mean E[x0 | x] of clean data, given ``x = x0 + sigma eps``.

    Attributes:
        shape: Shape of one sample, for example ``(1, 8, 8)`` or ``(2,)``.
        num_classes: Number of classes it can be conditioned on; 0 when unconditional.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level it is meant for.
        sigma_max: Largest noise level; sampling starts there.
    """

    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float
    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """Denoises ``x`` (B, *shape) at levels ``sigma`` (B,); ``condition`` (B,) int64, -1 for none."""
        ...


@runtime_checkable
class FeatureDenoiser(Denoiser, Protocol):
    """A denoiser that lends its inner activations, in the same pass."""

    def with_features(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the denoised ``x`` and a list of feature tensors, (B, C) or (B, C, H, W)."""
        ...


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshapes ``sigma`` (B,) so that it broadcasts over ``x`` (B, ...)."""
    return sigma.reshape(-1, *([1] * (x.ndim - 1)))


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
    """The score (D(x) - x) / sigma^2 of the noised distribution."""
    return (denoiser(x, sigma, condition) - x) / expand(sigma, x) ** 2
