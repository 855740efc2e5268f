"""How the samples of each prompt differ among themselves, and from those of a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.discrepancies.energy import energy_distance_loss
from distmatch.metrics.collapse import reduced, seed_distances, seed_vendi

LEAST = 4
"""Samples of every prompt below which nothing is measured."""


def prompt_estimates(x: Tensor, reference: Tensor, texts: Sequence[str]) -> dict[str, Estimate]:
    """Diversity of the samples of one prompt, and their distance from those of a reference on that prompt.

    The values are those of the watch (:mod:`distmatch.metrics.collapse`), as ratios of means over prompts;
    errors are those of a ratio over independent prompts.

    Args:
        x: Samples (N, *shape).
        reference: Samples (N, *shape) on the same prompts.
        texts: The prompt of each sample of both.

    Returns:
        ``prompt_diversity`` and ``prompt_vendi``, over those of the reference: 1 is best; ``prompt_energy``,
        over the reference's mean distance: 0 is best. Nothing where a prompt has fewer than four samples.
    """
    if not (rows := _rows(texts)):
        return {}
    x, reference = reduced(x.float()), reduced(reference.float())
    values = [_of_prompt(x[own], reference[own]) for own in rows]
    (ours, theirs, vendi, their_vendi, energy, spread) = torch.tensor(values, dtype=torch.float64).T
    return {
        "prompt_diversity": _ratio(ours, theirs),
        "prompt_vendi": _ratio(vendi, their_vendi),
        "prompt_energy": _ratio(energy, spread),
    }


def prompt_floor(texts: Sequence[str]) -> dict[str, Estimate]:
    """What samples that differ as those of the reference do would score: 1, by definition."""
    n = len(_rows(texts))
    return {name: Estimate(1.0, 0.0, n) for name in ("prompt_diversity", "prompt_vendi")} if n else {}


def _rows(texts: Sequence[str]) -> list[list[int]]:
    """The samples of each prompt; none where one has too few."""
    rows: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        rows.setdefault(text, []).append(i)
    return list(rows.values()) if rows and min(map(len, rows.values())) >= LEAST else []


def _of_prompt(x: Tensor, reference: Tensor) -> tuple[float, ...]:
    pair, center = torch.stack([x, reference]), reference.mean(0)
    distances, vendi = seed_distances(pair), seed_vendi(pair, torch.stack([center, center]))
    a, b = x.flatten(1).double(), reference.flatten(1).double()
    energy = float(energy_distance_loss(a, b))
    return (*distances.tolist(), *vendi.tolist(), energy, float(torch.pdist(b).mean()))


def _ratio(above: Tensor, below: Tensor) -> Estimate:
    """The ratio of two means over prompts (P,), with the error of first order."""
    mean, n = float(below.mean()), len(below)
    if mean <= 0:
        return Estimate(math.nan, math.nan, n)
    value = float(above.mean()) / mean
    stderr = float((above - value * below).std() / mean / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(value, stderr, n)
