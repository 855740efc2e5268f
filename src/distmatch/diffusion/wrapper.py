"""What all wrappers of denoisers share: attributes, costs, the denoiser of one step, a call counter."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from distmatch.diffusion.conditioning import Conditioning, ConditioningLike, null_conditioning, spec_of
from distmatch.diffusion.denoiser import Denoiser, has_score

WrapperT = TypeVar("WrapperT", bound="Wrapper")


@dataclass(frozen=True)
class Calls:
    """What one call, or a whole solve, costs for each sample.

    Attributes:
        main: Calls of the model that is guided.
        reference: Calls of what it is guided away from: itself without the class, a weaker model.
        classifier: Forward passes of a classifier.
        backward: Backward passes, through the classifier and everything before it.
    """

    main: int = 0
    reference: int = 0
    classifier: int = 0
    backward: int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(
            self.main + other.main,
            self.reference + other.reference,
            self.classifier + other.classifier,
            self.backward + other.backward,
        )

    @property
    def total(self) -> int:
        """Calls of denoisers, which is what an NFE counts; classifiers have any size and are not counted."""
        return self.main + self.reference

    @property
    def as_reference(self) -> Calls:
        """The same, spent on a reference."""
        return replace(self, main=0, reference=self.total)


def cost_of(denoiser: Denoiser, sigma: Tensor, conditioning: ConditioningLike) -> Calls:
    """What ``denoiser(x, sigma, conditioning)`` costs a sample: its own ``cost``, or one call.

    Args:
        denoiser: Any; a wrapper that makes several calls has a method ``cost(sigma, conditioning)``.
        sigma: Noise levels (B,).
        conditioning: Labels (B,) or None.
    """
    cost = getattr(denoiser, "cost", None)
    return Calls(main=1) if cost is None else cost(sigma, conditioning)


def at_step(denoiser: Denoiser, sigma_from: float, sigma_to: float) -> Denoiser:
    """The denoiser to use in all calls of one solver step: its own ``for_step``, or itself.

    So a choice that depends on the level (guide or not) is made once for a step, from numbers: a second
    evaluation in the step cannot decide otherwise, and no step waits for the device.

    Args:
        denoiser: Any; a wrapper that depends on steps has ``for_step(sigma_from, sigma_to)``.
        sigma_from: Level at the start of the step.
        sigma_to: Level at its end.
    """
    choose = getattr(denoiser, "for_step", None)
    return denoiser if choose is None else choose(sigma_from, sigma_to)


def regime_of(denoiser: Denoiser, conditioning: ConditioningLike) -> Hashable:
    """What a denoiser has decided for a step: its own ``regime(conditioning)``, or None.

    Where it changes from one step to the next, predictions jump, and a solver with a memory starts anew.

    Args:
        denoiser: From :func:`at_step`; a wrapper whose ``for_step`` decides something has a ``regime``.
        conditioning: Labels (B,) or None.
    """
    regime = getattr(denoiser, "regime", None)
    return None if regime is None else regime(conditioning)


class Wrapper:
    """A denoiser around another one, with its attributes; other code finds that one as ``inner``.

    Args:
        inner: The denoiser.
    """

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.shape = inner.shape
        self.num_classes = inner.num_classes
        self.conditioning_spec = spec_of(inner)
        self.sigma_data = inner.sigma_data
        self.sigma_min = inner.sigma_min
        self.sigma_max = inner.sigma_max
        self.gaussian_kernel = has_score(inner)
        path: Any = getattr(inner, "path", None)
        if path is not None:
            self.path = path
        self.shift: float | None = getattr(inner, "shift", None)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """The prediction, (B, *shape)."""
        return self.inner(x, sigma, conditioning)

    def null_conditioning(self, n: int) -> Conditioning:
        """What "no condition" is for the inner denoiser."""
        return null_conditioning(self.inner, n)

    def cost(self, sigma: Tensor, conditioning: ConditioningLike = None) -> Calls:
        """What a call costs for each sample."""
        return cost_of(self.inner, sigma, conditioning)

    def regime(self, conditioning: ConditioningLike) -> Hashable:
        """What the inner denoiser has decided for the step."""
        return regime_of(self.inner, conditioning)

    def for_step(self, sigma_from: float, sigma_to: float) -> Denoiser:
        """The same wrapper around what the inner denoiser is in this step."""
        return _around(self, at_step(self.inner, sigma_from, sigma_to))


def _around(wrapper: WrapperT, inner: Denoiser) -> WrapperT:
    """A copy of ``wrapper`` around ``inner``, or itself if nothing changes."""
    if inner is wrapper.inner:
        return wrapper
    changed = copy.copy(wrapper)
    changed.inner = inner
    return changed


class CallCounter(Wrapper):
    """Counts network calls per sample, so that a reported NFE is that of the calls that were made.

    What it is in one step counts into it too.

    Attributes:
        calls: Calls of denoisers so far (batches, each sample of a batch being called once).
        spent: The same by what it was spent on, with the passes of classifiers.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.calls = 0
        self.spent = Calls()

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """Calls the inner denoiser and counts it."""
        self._add(cost_of(self.inner, sigma, conditioning))
        return self.inner(x, sigma, conditioning)

    def for_step(self, sigma_from: float, sigma_to: float) -> Denoiser:
        """What the inner denoiser is in this step, counted here."""
        inner = at_step(self.inner, sigma_from, sigma_to)
        return self if inner is self.inner else _CountedStep(self, inner)

    def _add(self, cost: Calls) -> None:
        self.calls += cost.total
        self.spent += cost


class _CountedStep(Wrapper):
    """A denoiser for one step whose calls count into a counter."""

    def __init__(self, counter: CallCounter, inner: Denoiser) -> None:
        super().__init__(inner)
        self._counter = counter

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        self._counter._add(cost_of(self.inner, sigma, conditioning))
        return self.inner(x, sigma, conditioning)
