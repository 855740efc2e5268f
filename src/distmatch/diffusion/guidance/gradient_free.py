"""Classifier guidance without gradients: the class that a sample is mistaken for is the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning, has_condition
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.guidance.base import (
    Guidance,
    Where,
    check_logits,
    checked_scale,
    refuse_training_mode,
)
from distmatch.diffusion.guidance.linear import check_pair
from distmatch.diffusion.wrapper import Calls, cost_of

ScaleFn = Callable[[Tensor, Tensor], Tensor]
"""(p of the requested class (B,), p of the most probable other class (B,)) to guidance scales (B,)."""


def confusion_scale(scale: float) -> ScaleFn:
    """The scale 1 + (scale - 1) p_other / (p_class + p_other): 1 where there is no confusion.

    It is half way to ``scale`` where both are equally likely, and ``scale`` where the class is ruled out.

    Args:
        scale: Scale at full confusion.

    Raises:
        UserError: It is not finite.
    """
    most = checked_scale(scale) - 1

    def scales(p_class: Tensor, p_other: Tensor) -> Tensor:
        both = (p_class + p_other).clamp_min(torch.finfo(p_class.dtype).tiny)
        return 1 + most * p_other / both

    return scales


class GradientFree(Guidance):
    """D + (w - 1) (D - D_other): away from the class that a classifier confuses the prediction with.

    After Shenoy et al. 2024, "Gradient-free classifier guidance for diffusion model sampling". A classifier
    of clean samples looks at the prediction D(x | class); its likeliest other class is the reference,
    and w grows with the confusion. The paper's own schedule of w is not the default here; pass it as
    ``scale``. No graph is built through the classifier.

    w depends on x, so the guided field is no gradient, and its derivative is not the one that autograd
    would find: a call under autograd is refused.

    Args:
        inner: A class-conditional denoiser.
        classifier: Clean samples (B, *shape) to logits (B, classes).
        scale: Scale at full confusion, for :func:`confusion_scale`, or a function of the probabilities of
            the class and of the likeliest other one.
        reference: A weaker model with the same classes to take the other class from: autoguidance besides.
        interval: (low, high): guide where low < sigma <= high only.

    Raises:
        UserError: Fewer than two classes, a classifier in training mode, a reference that does not fit, a
            bad scale or interval.
    """

    def __init__(
        self,
        inner: Denoiser,
        classifier: Callable[[Tensor], Tensor],
        scale: float | ScaleFn,
        *,
        reference: Denoiser | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(inner, interval)
        check_count("the number of classes of the teacher", inner.num_classes, 2)
        if reference is not None:
            check_pair(inner, reference)
            if reference.num_classes == 0:
                raise UserError(
                    "the reference of gradient-free guidance receives another class",
                    got="an unconditional model",
                    fix="use Guided for guidance by an unconditional model",
                )
        refuse_training_mode(classifier)
        self.classifier, self.reference = classifier, reference
        self.scales = scale if callable(scale) else confusion_scale(scale)
        self._neutral = not callable(scale) and scale == 1

    @property
    def neutral(self) -> bool:
        """At a scale of 1, given as a number."""
        return self._neutral

    def _guidable(self, conditioning: Conditioning) -> Where:
        return has_condition(conditioning)

    def _corrected(self, main: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(
                "gradient-free guidance has no derivative: its classifier is used without a graph",
                fix="call it under torch.no_grad(), or use ClassifierGuided",
            )
        if conditioning.label is None:
            return main
        other, scale = self._confusion(main, conditioning.label)
        model = self.inner if self.reference is None else self.reference
        return main + expand(scale - 1, x) * (main - model(x, sigma, other))

    @torch.no_grad()
    def _confusion(self, main: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest other class (B,), and the scale (B,) in the dtype of ``main``."""
        logits = self.classifier(main.detach())
        check_logits(logits, len(main), self.num_classes)
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        asked = labels.clamp_min(0)[:, None]
        p_other, other = p.scatter(1, asked, -1.0).max(1)
        return other, self.scales(p.gather(1, asked)[:, 0], p_other).to(main)

    def _cost(self, inner: Calls, sigma: Tensor, conditioning: Conditioning) -> Calls:
        second = inner if self.reference is None else cost_of(self.reference, sigma, conditioning)
        return inner + second.as_reference + Calls(classifier=1)
