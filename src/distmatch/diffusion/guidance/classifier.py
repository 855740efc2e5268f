"""Classifier guidance: the gradient of log p(class | x) is added to the score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning, has_condition, label_spec
from distmatch.diffusion.denoiser import Denoiser, expand, require_score
from distmatch.diffusion.geometry.jacobian import connected, slopes
from distmatch.diffusion.guidance.base import (
    Features,
    Guidance,
    Pass,
    Where,
    check_logits,
    checked_scale,
    refuse_training_mode,
)
from distmatch.diffusion.wrapper import Calls

Classifier = Callable[[Tensor, Tensor], Tensor]
"""(x (B, *shape), sigma (B,)) to the logits (B, classes) of the classes of x at these levels."""


class ClassifierGuided(Guidance):
    """D + scale sigma^2 grad_x log p(class | x), that is score + scale grad log p (Dhariwal and Nichol 2021).

    On an unconditional model, scale 1 is Bayes' rule, and with the exact posterior every scale is
    classifier-free guidance of that scale; on a conditional one it is that of scale + 1. Scale 0 is none.

    Args:
        inner: The denoiser; its noise must be Gaussian.
        classifier: ``(x, sigma) -> logits`` (B, classes). Its training mode must be off.
        scale: Factor of the gradient, any finite number; below 0 it leads away from the class.
        target: One class to guide all samples to, while the condition goes to the denoiser. None: guide each
            sample to its condition; -1 is not guided.
        conditional: The denoiser receives the conditioning too. None: only where there is a target.
        on: What the classifier sees. "noisy": the noised x. "clean": the prediction D(x), for classifiers
            of clean data; the gradient then goes through the denoiser too.
        num_classes: Number of classes; by default the classifier's ``num_classes``, else the denoiser's.
        interval: (low, high): guide where low < sigma <= high only.

    Raises:
        UserError: Noise that is not Gaussian, an unknown number of classes, a classifier in training mode, a
            bad scale, target or interval.
    """

    def __init__(
        self,
        inner: Denoiser,
        classifier: Classifier,
        scale: float,
        *,
        target: int | None = None,
        conditional: bool | None = None,
        on: str = "noisy",
        num_classes: int | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(inner, interval)
        require_score(inner, "classifier guidance")
        check_name("input of a classifier", on, ("noisy", "clean"))
        refuse_training_mode(classifier)
        self.classifier, self.scale, self.on, self.target = classifier, checked_scale(scale), on, target
        known = getattr(classifier, "num_classes", None) or inner.num_classes
        self.classes = num_classes or known
        if self.classes == 0:
            raise UserError("the number of classes is not known", fix="pass num_classes=")
        if target is not None and not 0 <= target < self.classes:
            raise UserError(
                "the target of a classifier guidance is no class",
                got=target,
                expected=f"0 to {self.classes - 1}",
            )
        self.conditional = target is not None if conditional is None else conditional
        if self.conditional and target is None and inner.num_classes != self.classes:
            raise UserError(
                "denoiser and classifier have other classes",
                got=f"{inner.num_classes} and {self.classes}",
                fix="guide an unconditional denoiser (conditional=False)",
            )
        if target is None:
            self.num_classes, self.conditioning_spec = self.classes, label_spec(self.classes)

    @property
    def neutral(self) -> bool:
        """At scale 0."""
        return self.scale == 0

    def _main_condition(self, conditioning: Conditioning) -> Conditioning:
        return conditioning if self.conditional else UNCONDITIONAL

    def _guidable(self, conditioning: Conditioning) -> Where:
        return True if self.target is not None else has_condition(conditioning)

    def _guided(
        self, forward: Pass, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Features]:
        cond = self._main_condition(conditioning)
        # A caller that differentiates this prediction gets the gradient's own derivative too.
        again = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            leaf = x if again else x.detach().requires_grad_()
            if self.on == "clean":
                main, features = forward(leaf, sigma, cond)
                main = connected(main, leaf, lambda moved: forward(moved, sigma, cond)[0])
                slope = self._slope(main, leaf, sigma, conditioning.label, again)
            else:
                slope = self._slope(leaf, leaf, sigma, conditioning.label, again)
        if self.on == "noisy":
            main, features = forward(x, sigma, cond)
        elif not again:
            main, features = main.detach(), [f.detach() for f in features]
        return main, main + self.scale * expand(sigma, x).to(x) ** 2 * slope, features

    def _slope(self, seen: Tensor, leaf: Tensor, sigma: Tensor, labels: Tensor | None, again: bool) -> Tensor:
        """The gradient of log p(class | seen) with respect to ``leaf``, (B, *shape)."""
        logits = connected(
            self.classifier(seen, sigma), seen, lambda moved: self.classifier(moved, sigma), "the classifier"
        )
        check_logits(logits, len(leaf), self.classes)
        if self.target is not None or labels is None:
            chosen = logits.log_softmax(1)[:, self.target or 0]
        else:
            chosen = logits.log_softmax(1).gather(1, labels.clamp_min(0)[:, None])
        return slopes(chosen, (leaf,), create_graph=again)[0]

    def _cost(self, inner: Calls, sigma: Tensor, conditioning: Conditioning) -> Calls:
        return inner + Calls(classifier=1, backward=1)
