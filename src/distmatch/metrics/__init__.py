"""How good a generator is: estimates with standard errors, a model and fresh data under one protocol."""

from distmatch.metrics.between import Comparison, compare_datasets, compare_samples
from distmatch.metrics.distances import Measured
from distmatch.metrics.evaluate import evaluate, reference_floor
from distmatch.metrics.features import Features, classifier_features, pixels
from distmatch.metrics.frechet import frechet_distance
from distmatch.metrics.kid import cmmd, kernel_distance
from distmatch.metrics.memorization import authenticity, memorized_share
from distmatch.metrics.modes import ModeReport, mode_counts
from distmatch.metrics.prdc import PRDC, prdc
from distmatch.metrics.reference import reference_labels
from distmatch.metrics.settings import EvaluationSettings, plan
from distmatch.metrics.spaces import resolve_features
from distmatch.metrics.vendi import vendi_score

__all__ = [
    "PRDC",
    "Comparison",
    "EvaluationSettings",
    "Features",
    "Measured",
    "ModeReport",
    "authenticity",
    "classifier_features",
    "cmmd",
    "compare_datasets",
    "compare_samples",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "memorized_share",
    "mode_counts",
    "pixels",
    "plan",
    "prdc",
    "reference_floor",
    "reference_labels",
    "resolve_features",
    "vendi_score",
]
