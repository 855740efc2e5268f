"""Guidance: wrappers that take a denoiser and return a denoiser, and a counter of what they cost.

Weak-to-strong reflection, which needs a solver, is in :mod:`distmatch.diffusion.guidance.reflection`.
"""

from distmatch.diffusion.guidance.classifier import ClassifierGuided
from distmatch.diffusion.guidance.gradient_free import GradientFree, confusion_scale
from distmatch.diffusion.guidance.linear import Guided, guided, require_null_class
from distmatch.diffusion.guidance.minority import QuantileClasses, minority_guided, minority_score
from distmatch.diffusion.guidance.noisy_classifier import (
    NoisyClassifier,
    classifier_loss,
    fit_noisy_classifier,
)
from distmatch.diffusion.wrapper import CallCounter, Calls, Wrapper, at_step, cost_of, regime_of

__all__ = [
    "CallCounter",
    "Calls",
    "ClassifierGuided",
    "GradientFree",
    "Guided",
    "NoisyClassifier",
    "QuantileClasses",
    "Wrapper",
    "at_step",
    "classifier_loss",
    "confusion_scale",
    "cost_of",
    "fit_noisy_classifier",
    "guided",
    "minority_guided",
    "minority_score",
    "regime_of",
    "require_null_class",
]
