"""Guidance in general: a prediction, a corrected prediction, and at which levels the second one is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.base.ranks import may_branch_on
from distmatch.diffusion.conditioning import Conditioning, ConditioningLike, as_conditioning, for_model
from distmatch.diffusion.denoiser import (
    Denoiser,
    Features,
    ReturnFeatures,
    expand,
    has_features,
    is_diffused,
)
from distmatch.diffusion.geometry.jacobian import refuse_random_layers
from distmatch.diffusion.solvers.sampling import SamplingMixin
from distmatch.diffusion.wrapper import Calls, Wrapper, at_step, cost_of, regime_of

Pass = Callable[[Tensor, Tensor, Conditioning], tuple[Tensor, Features]]
"""One network pass: (x, sigma, conditioning) to the prediction and the features, none if not requested."""

Where = bool | Tensor
"""Which samples of a batch are guided: all, none, or a mask (B,)."""


class Guidance(SamplingMixin, Wrapper):
    """A denoiser that corrects the prediction of ``inner``. Subclasses define the guidance and its samples.

    Samples that are not guided keep the prediction of ``inner``; a call in which none is guided is that of
    ``inner``, bit for bit. (Beside guided samples they are part of a larger batch, which kernels may round in
    another way.) In a solver the interval is decided once per step, by the higher of its two noise levels,
    where the step starts; so a second evaluation uses the same decision, a step outside has the cost of
    ``inner``, and inversion makes the same decisions as sampling. In a call by itself each sample's own level
    decides.

    Args:
        inner: The denoiser to guide.
        interval: (low, high): guide where low < sigma <= high only. None guides everywhere.

    Attributes:
        reference: Another model that the prediction is led away from; None for kinds without one.

    Raises:
        UserError: Not ``0 <= low < high``.
    """

    reference: Denoiser | None = None

    def __init__(self, inner: Denoiser, interval: tuple[float, float] | None = None) -> None:
        super().__init__(inner)
        self.interval = None if interval is None else checked_interval(interval)
        self._outside = False  # in a step outside the interval

    @property
    def neutral(self) -> bool:
        """Whether the correction is none at every level: ``inner`` is called alone."""
        return False

    @property
    def diffused(self) -> bool:
        """Whether the scores at all levels are those of one noised density; guided ones are not."""
        return self.neutral and is_diffused(self.inner)

    @property
    def has_features(self) -> bool:
        """Whether ``inner`` has features."""
        return has_features(self.inner)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: ConditioningLike = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Any:
        """The guided prediction, (B, *shape); samples with nothing to guide them are not guided.

        Features are those of the main pass, not of the reference; ``"only"`` they make neither the pass of
        the reference nor what comes behind them.

        Raises:
            UserError: Features of an inner denoiser that has none.
        """
        inner, conditioning = self.inner, as_conditioning(conditioning)
        if not return_features:
            return self._run(lambda *inputs: (inner(*inputs), []), x, sigma, conditioning)[0]
        if not has_features(inner):
            raise UserError("this teacher has no features to return", fix="use --ratio-features own")
        if return_features == "only":
            return inner(x, sigma, self._main_condition(conditioning), return_features="only")
        return self._run(lambda *inputs: inner(*inputs, return_features=True), x, sigma, conditioning)

    def _run(
        self, forward: Pass, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Features]:
        where = self._where(sigma, conditioning)
        if where is False:
            return forward(x, sigma, self._main_condition(conditioning))
        main, guided, features = self._guided(forward, x, sigma, conditioning)
        if isinstance(where, Tensor):
            guided = torch.where(expand(where, x), guided, main)
        return guided, features

    def _guided(
        self, forward: Pass, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Features]:
        """Prediction of ``inner``, guided prediction, features."""
        main, features = forward(x, sigma, self._main_condition(conditioning))
        return main, self._corrected(main, x, sigma, conditioning), features

    def _corrected(self, main: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided prediction of all samples."""
        raise NotImplementedError

    def _main_condition(self, conditioning: Conditioning) -> Conditioning:
        """What ``inner`` is conditioned on."""
        return conditioning

    def _guidable(self, conditioning: Conditioning) -> Where:
        """Which samples have something to be guided by."""
        return bool(conditioning)

    def _where(self, sigma: Tensor, conditioning: Conditioning) -> Where:
        guidable = False if self.neutral or self._outside else self._guidable(conditioning)
        if guidable is False or self.interval is None:
            return guidable
        inside = (sigma > self.interval[0]) & (sigma <= self.interval[1])
        if may_branch_on(inside):
            if not bool(inside.any()):
                return False
            if bool(inside.all()):
                return guidable
        return inside & guidable

    def cost(self, sigma: Tensor, conditioning: ConditioningLike = None) -> Calls:
        """What a call costs for each sample."""
        conditioning = as_conditioning(conditioning)
        inner = cost_of(self.inner, sigma, self._main_condition(conditioning))
        if self._where(sigma, conditioning) is False:
            return inner
        return self._cost(inner, sigma, conditioning)

    def _cost(self, inner: Calls, sigma: Tensor, conditioning: Conditioning) -> Calls:
        """The cost of a guided call, where that of the inner denoiser is ``inner``."""
        raise NotImplementedError

    def regime(self, conditioning: ConditioningLike) -> Hashable:
        """Whether the step is guided, and what the denoisers that it calls have decided."""
        conditioning = as_conditioning(conditioning)
        inner = regime_of(self.inner, self._main_condition(conditioning))
        if self.neutral or self._outside or self._guidable(conditioning) is False:
            return inner, None
        other = self.reference
        if other is None:
            return inner, "guided"
        return inner, ("guided", regime_of(other, for_model(other, conditioning)))

    def for_step(self, sigma_from: float, sigma_to: float) -> Denoiser:
        """The guided or the plain denoiser, as the interval has it for the higher level of the step.

        The reference is what it is in this step, too.
        """
        changed = copy.copy(self)
        changed.inner = at_step(self.inner, sigma_from, sigma_to)
        if self.reference is not None:
            changed.reference = at_step(self.reference, sigma_from, sigma_to)
        if self.interval is not None:
            changed._outside = not self.interval[0] < max(sigma_from, sigma_to) <= self.interval[1]
            changed.interval = None
        return changed


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval as two numbers.

    Raises:
        UserError: Not ``0 <= low < high``.
    """
    low, high = (float(level) for level in interval)
    if not 0 <= low < high:
        raise UserError(
            "a guidance interval must satisfy 0 <= low < high, in noise levels sigma",
            got=f"low={low:g}, high={high:g}",
            fix="give the lower level first; high may be inf",
        )
    return low, high


def refuse_training_mode(classifier: object) -> None:
    """Refuses a classifier whose answer changes from call to call or with the batch.

    Raises:
        UserError: It holds dropout or batch normalization in training mode.
    """
    try:
        refuse_random_layers(classifier)
    except UserError as error:
        raise UserError(
            "the classifier of a guidance must be a fixed function",
            got="dropout or batch normalization in training mode",
            fix="call .eval() on it",
        ) from error


def checked_scale(scale: float) -> float:
    """The scale as a number.

    Raises:
        UserError: It is not finite.
    """
    check_number("a guidance scale", scale)
    return float(scale)


def check_logits(logits: Tensor, n: int, classes: int) -> None:
    """Checks what a classifier returned for ``n`` samples.

    Raises:
        UserError: It has another shape than (n, classes).
    """
    if logits.shape != (n, classes):
        raise UserError(
            "a classifier must return one logit for each class",
            got=tuple(logits.shape),
            expected=(n, classes),
        )
