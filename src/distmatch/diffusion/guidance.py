"""Wrappers that take a denoiser and return a denoiser: classifier-free guidance and a call counter."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, FeatureDenoiser


class _Wrapper:
    """Passes the attributes of the inner denoiser through."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.shape = inner.shape
        self.num_classes = inner.num_classes
        self.sigma_data = inner.sigma_data
        self.sigma_min = inner.sigma_min
        self.sigma_max = inner.sigma_max


class Guided(_Wrapper):
    """Classifier-free guidance: D_none + scale (D_condition - D_none); scale 1 is no guidance.

    Both predictions come from one batch of twice the size. Costs two network calls a sample.

    Args:
        inner: A class-conditional denoiser that was trained with label dropout.
        scale: Guidance scale w.

    Raises:
        UserError: The denoiser has no classes.
    """

    def __init__(self, inner: Denoiser, scale: float) -> None:
        super().__init__(inner)
        if inner.num_classes == 0:
            raise UserError(
                "guidance needs a class-conditional teacher",
                got="an unconditional one",
                fix="train the teacher on labelled data, or leave --guidance at 1",
            )
        self.scale = scale

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """The guided prediction; samples without a condition are not guided."""
        if condition is None or self.scale == 1:
            return self.inner(x, sigma, condition)
        both = self.inner(*_doubled(x, sigma, condition))
        return self._mix(*both.chunk(2))

    def with_features(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The guided prediction and the features of the conditional pass."""
        if not isinstance(self.inner, FeatureDenoiser):
            raise UserError("this teacher does not lend features", fix="use --ratio-features own")
        if condition is None or self.scale == 1:
            return self.inner.with_features(x, sigma, condition)
        both, features = self.inner.with_features(*_doubled(x, sigma, condition))
        return self._mix(*both.chunk(2)), [f[: len(x)] for f in features]

    def _mix(self, main: Tensor, reference: Tensor) -> Tensor:
        return reference + self.scale * (main - reference)


def _doubled(x: Tensor, sigma: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch once with its condition and once without."""
    none = torch.full_like(condition, -1)
    return torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([condition, none])


class CallCounter(_Wrapper):
    """Counts network calls per sample, so that a reported NFE is measured and not assumed.

    Attributes:
        calls: Calls so far (batches, each sample of a batch being called once).
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """Calls the inner denoiser and counts it."""
        doubled = isinstance(self.inner, Guided) and self.inner.scale != 1 and condition is not None
        self.calls += 2 if doubled else 1
        return self.inner(x, sigma, condition)
