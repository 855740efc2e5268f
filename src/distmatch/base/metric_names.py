"""Keys of metrics in one of several feature spaces, and the names that a metric may bear in a space."""

from __future__ import annotations

_AT = "@"
INCEPTION = "inception-2015-12-05"
"""The features whose Frechet distance is called FID."""
CLIP = "clip-vit-l-14-336"
"""The features whose discrepancy is called CMMD."""
_PUBLISHED = {("fd", INCEPTION): "FID", ("mmd", CLIP): "CMMD"}

COMPARED = "mmd_features"
"""Where a student records what its method compared."""
TRAINED_ON = {"samples": ("pixels", "the method was trained on these features: they favor it")}
"""What `mmd` compared, the feature space that it is, and how the values of its students are marked."""
PRETRAINED = ("efficientnet-lite0", "inception", "clip", "dinov2")
"""Pretrained networks, by the names of their feature spaces."""
SPACES = ("auto", "classifier", "pixels", *PRETRAINED)
"""All names of feature spaces."""


def key_in(metric: str, space: str) -> str:
    """The key of a metric in a further feature space, ``fd@NAME``; in the first one, ``""``, its own name."""
    return f"{metric}{_AT}{space}" if space else metric


def metric_of(key: str) -> str:
    """The metric of a key, without its feature space."""
    return key.partition(_AT)[0]


def space_of(key: str) -> str:
    """The feature space of a key; '' for the first one."""
    return key.partition(_AT)[2]


def published_name(key: str, features: str) -> str | None:
    """The name that a value has in the literature: FID and CMMD stand for exact networks; None otherwise.

    Args:
        key: Of the metric.
        features: The features that it was measured in, as in :class:`~distmatch.base.estimate.Estimate`.
    """
    return _PUBLISHED.get((metric_of(key), features.partition(" ")[0]))
