"""Notes on a table of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import COMPARED, TRAINED_ON
from distmatch.data.columns import is_coded
from distmatch.data.dataset import Dataset
from distmatch.metrics.features import Features

SMALL_BLOCK = 200
"""Samples in a block below which the metrics are rough, and so are their errors."""
WEAK_CLASSIFIER = 0.9
"""The share of held-out real samples named rightly below which a classifier's features are doubtful."""


def notes_on(reference: Dataset, space: Features, n: int) -> list[str]:
    """Remarks for below the table, as sentences; empty if there are none.

    Args:
        reference: The real data.
        space: The feature space.
        n: Samples in a block.
    """
    found = []
    if is_coded(reference.columns):
        found.append(
            "samples were evaluated as rows of the table, as sample --out x.csv writes them: the "
            "largest element of a word counts, and whole numbers are rounded"
        )
    if n < SMALL_BLOCK:
        found.append(
            f"blocks of {n} samples are small: values are biased and rough, and so are their errors. Compare "
            f"only with the floor; use {2 * SMALL_BLOCK} samples or more on either side if available"
        )
    right = space.heldout_accuracy
    if right is not None and right.value < WEAK_CLASSIFIER:
        found.append(
            f"the feature classifier is correct on only {right.value:.0%} of {right.n} held-out real "
            f"samples: "
            "its features and label_accuracy are doubtful. Use --features pixels too"
        )
    return found


def marked(metrics: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a model, with a warning on those in features that its method was trained on.

    Args:
        metrics: Estimates by key, and other entries.
        about: What the student records of its training.
    """
    space, mark = TRAINED_ON.get(str(about.get(COMPARED)), ("", ""))
    found = dict(metrics)
    for key, value in metrics.items():
        if space and isinstance(value, Estimate) and value.features == space:
            found[key] = replace(value, warning="; ".join(filter(None, [value.warning, mark])))
    return found
