"""Long-tailed versions of data with classes, for the question whether a student keeps rare classes."""

from __future__ import annotations

from dataclasses import replace

import torch

from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset

RATIO = 100.0
"""How many times the most frequent class is as frequent as the rarest."""


def long_tailed(data: Dataset) -> Dataset:
    """Data whose class shares fall geometrically from the first class to the last, 100 : 1.

    As long-tailed CIFAR (Cui et al. 2019, arXiv 1901.05555), but of as many samples as before: those of each
    class are drawn with replacement, with a fixed seed. Its last class has few different samples then.

    Args:
        data: Data with labels.
    """
    if data.labels is None:
        raise RuntimeError(f"{data.name} has no classes")
    exponent = torch.arange(data.num_classes, dtype=torch.float64) / (data.num_classes - 1)
    shares = RATIO**-exponent
    counts = (shares / shares.sum() * len(data)).round().long().clamp_min(1)
    gen = generator(0, "long-tail")
    rows = []
    for k, count in enumerate(counts.tolist()):
        found = (data.labels == k).nonzero()[:, 0]
        rows.append(found[torch.randint(len(found), (count,), generator=gen)])
    chosen = torch.cat(rows)
    return replace(data, raw=data.raw[chosen], labels=data.labels[chosen], name=f"{data.name}:long-tail")
