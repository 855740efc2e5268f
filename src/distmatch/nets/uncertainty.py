"""The learned log-variance of EDM2 (Karras et al. 2024, "Analyzing and improving", eq. 21)."""

from __future__ import annotations

from torch import Tensor, nn

from distmatch.nets.layers import fourier_features, noise_coordinate, zeroed


class LearnedUncertainty(nn.Module):
    """u(sigma), trained by :func:`~distmatch.losses.uncertainty_loss`: it comes to log E[loss] at each level.

    All noise levels then contribute equally to the gradient, for any weighting of the loss. It
    starts at 0, where nothing is changed, and is of no use after training.

    Args:
        noise_unit: Unit of the noise levels, as of :class:`~distmatch.nets.edm.EDMDenoiser`.
    """

    def __init__(self, noise_unit: float = 1.0) -> None:
        super().__init__()
        self.noise_unit = noise_unit
        self.last = zeroed(nn.Linear(64, 1))

    def forward(self, sigma: Tensor) -> Tensor:
        """The log-variance at levels ``sigma`` (B,), (B,) float32."""
        features = fourier_features(noise_coordinate(sigma.float(), self.noise_unit))
        return self.last(features.to(self.last.weight.dtype))[:, 0].float()
