"""What the metrics need of a reference set, and random orders that keep the shares of the labels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.errors import UserError


class Reference(Protocol):
    """Labeled or unlabeled samples in model space."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """Int64 (len,), or None."""
        ...

    @property
    def content_hash(self) -> str:
        """Identifies samples and labels."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Samples (B, *shape) float32 in [-1, 1] and their labels."""
        ...


def stratified_order(labels: Tensor | None, n: int, generator: torch.Generator) -> Tensor:
    """A random order of ``n`` samples; with labels, every slice holds each label in about its overall share.

    Sample number i of a class with m members (in random order within the class) comes at the place (i + u) /
    m with u uniform in [0, 1), so that a prefix never has more than about one sample too many or too few of a
    class.

    Args:
        labels: Int64 (n,) on the CPU, or None for a plain random order.
        n: Number of samples.
        generator: A CPU stream.

    Returns:
        Int64 (n,), a permutation.
    """
    shuffled = torch.randperm(n, generator=generator)
    if labels is None:
        return shuffled
    _, classes, sizes = torch.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_class = torch.argsort(classes, stable=True)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty(n, dtype=torch.float64)
    rank[by_class] = (torch.arange(n) - first[classes[by_class]]).double()
    place = (rank + torch.rand(n, generator=generator, dtype=torch.float64)) / sizes[classes]
    return shuffled[torch.argsort(place)]


def reference_rows(reference: Reference | Tensor, count: int, seed: int, *, stratified: bool) -> Tensor:
    """Rows of the reference without repetition, int64 (count,), in the order of the evaluation.

    Args:
        reference: The reference set, or its samples.
        count: At most the size of the reference.
        seed: Chooses the samples.
        stratified: Whether every slice holds the labels in the shares of the reference.
    """
    stream = seeds.generator(seed, "evaluate/reference")
    labels = None if isinstance(reference, Tensor) or not stratified else reference.labels
    return stratified_order(None if labels is None else labels.cpu(), len(reference), stream)[:count]


def reference_labels(reference: Reference, count: int, *, seed: int = 0) -> Tensor:
    """Labels to ask a conditional model for: in random order, every slice in the shares of the reference.

    Args:
        reference: A labeled reference.
        count: How many; beyond the size of the reference they repeat.
        seed: Of the order.

    Returns:
        Int64 (count,) on the CPU.

    Raises:
        UserError: The reference has no labels.
    """
    if reference.labels is None:
        raise UserError("the reference has no labels", fix="sample without labels")
    labels = reference.labels.cpu()
    order = stratified_order(labels, len(labels), seeds.generator(seed, "evaluate/labels"))
    return labels[order[torch.arange(count) % len(order)]]


def labels_of_rows(reference: Reference | Tensor, rows: Tensor) -> Tensor | None:
    """The labels of some samples, int64 on the CPU; None without labels."""
    labels = None if isinstance(reference, Tensor) else reference.labels
    return None if labels is None else labels.cpu()[rows]
