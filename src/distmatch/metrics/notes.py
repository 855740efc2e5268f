"""Notes on a table of metrics."""

from __future__ import annotations

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
