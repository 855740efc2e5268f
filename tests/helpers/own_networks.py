"""Small networks as other people write them, none of which knows distmatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Conv(nn.Module):
    """84 parameters, two arguments and an idle third: predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1, bias=False)
        self.level = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.last(nn.functional.silu(self.first(x) + self.level(t[:, None])[:, :, None, None]))


class Inner(nn.Module):
    """A network of ``width`` channels for samples, ``ln(sigma) / 4`` and an embedding (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.level = nn.Linear(1, width)

    def forward(self, x: Tensor, c_noise: Tensor, embedding: Tensor) -> Tensor:
        shift = self.level(c_noise[:, None]) + embedding
        return self.last(nn.functional.silu(self.first(x) + shift[:, :, None, None]))


def preconditioned(inner: Any, x: Tensor, sigma: Tensor, sigma_data: float, embedding: Tensor) -> Tensor:
    level = sigma[:, None, None, None]
    total = level**2 + sigma_data**2
    out = inner(x / total.sqrt(), sigma.log() / 4, embedding)
    return sigma_data**2 / total * x + level * sigma_data / total.sqrt() * out


class OfKDiffusion(nn.Module):
    """What k-diffusion's ``Denoiser`` looks like: the clean sample, and conditions by name."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = Inner(width), 0.5
        self.classes = nn.Embedding(11, width)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Tensor) -> Tensor:
        embedding = self.classes(kwargs["class_cond"])
        return preconditioned(self.inner_model, input, sigma, self.sigma_data, embedding)


class OfEDM(nn.Module):
    """What ``EDMPrecond`` of EDM's code looks like: the clean sample, with one-hot labels."""

    def __init__(self, label_dim: int = 10) -> None:
        super().__init__()
        self.model, self.img_resolution, self.img_channels, self.label_dim = Inner(4), 8, 1, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = 0, float("inf"), 0.5
        self.classes = nn.Linear(label_dim, 4, bias=False) if label_dim else None

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False, **_: Any
    ) -> Tensor:
        embedding = x.new_zeros(x.shape[0], 4)
        if self.classes is not None and class_labels is not None:
            embedding = self.classes(class_labels)
        return preconditioned(self.model, x, sigma, self.sigma_data, embedding)


class Velocity(nn.Module):
    """A flow from noise at 0 to data at 1, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(4)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.inner(x, t, x.new_zeros(x.shape[0], 4))


class Whole(nn.Module):
    """A denoiser that is a module itself, with distmatch's contract."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (1, 8, 8), 0, 0.5, 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(4)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return preconditioned(self.inner, x, sigma, 0.5, x.new_zeros(x.shape[0], 4))
