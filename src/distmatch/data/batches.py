"""Batches as a pure function of the step, so that the data position is the step number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset
from distmatch.data.order import BatchOrder
from distmatch.diffusion.conditioning import Conditioning, ConditioningLike, as_conditioning, for_model


@dataclass(frozen=True)
class Pool:
    """All that a run conditions on: its prompts, or the conditions of its data.

    Attributes:
        size: How many there are.
        conditioning: Those of numbers (B,) from 0 to ``size - 1``.
        texts: The prompt or caption of each, in the order of their file, where known.
    """

    size: int
    conditioning: Callable[[Tensor], Conditioning]
    texts: Sequence[str] = ()


ALL = slice(None)
"""All rows of a batch."""


class BatchOf(Protocol):
    """The batch of a step number, or some rows of it: those of one of several processes."""

    def __call__(self, step: int, rows: slice = ALL, /) -> Batch:
        """The batch, a function of the step alone."""
        ...


class Batch:
    """One training batch.

    Args:
        x: Clean samples in model space, (B, *shape) float32.
        conditioning: What they are conditioned on: class labels (B,), a conditioning, or None.
        noise: Standard deviation of the noise in each sample, (B,) float32, for data that are not clean.
        texts: The prompt or caption of each sample, where known; for people to read.
        pool: What the conditioning was drawn from, for methods that draw more of it (DMD's pairs).
        items: Which samples of the data these are, (B,) int64, where known.
    """

    def __init__(
        self,
        x: Tensor,
        conditioning: ConditioningLike = None,
        noise: Tensor | None = None,
        texts: Sequence[str] = (),
        pool: Pool | None = None,
        items: Tensor | None = None,
    ) -> None:
        self.x = x
        self.conditioning = as_conditioning(conditioning)
        self.noise = noise
        self.texts = texts
        self.pool = pool
        self.items = items

    def on(self, device: torch.device | str) -> Batch:
        """The same on a device. A GPU copies it from pinned memory, for which this thread does not wait."""
        gpu = torch.device(device).type == "cuda"

        def moved(values: Tensor) -> Tensor:
            pinned = values.pin_memory() if gpu and values.device.type == "cpu" else values
            return pinned.to(device, non_blocking=gpu)

        noise, items = (None if part is None else moved(part) for part in (self.noise, self.items))
        conditioning = Conditioning({name: moved(value) for name, value in self.conditioning.items()})
        return Batch(moved(self.x), conditioning, noise, self.texts, self.pool, items)

    def taken_by(self, model: Any) -> Batch:
        """The same samples with the part of their conditioning that a denoiser takes."""
        conditioning = for_model(model, self.conditioning)
        return Batch(self.x, conditioning, self.noise, self.texts, self.pool, self.items)


@dataclass
class Batches:
    """Draws batch number ``step`` of a data set; the same number gives the same batch.

    Attributes:
        data: The data set.
        size: Samples a batch.
        seed: Seed of order and flips.
        flip: Whether images are mirrored left-right with probability one half.
        device: Where the batches go.
        noise: Standard deviation of the noise in each sample of ``data``, (N,), for data that are not clean.
    """

    data: Dataset
    size: int
    seed: int
    flip: bool = False
    device: torch.device | str = "cpu"
    noise: Tensor | None = None
    _order: BatchOrder = field(init=False)

    def __post_init__(self) -> None:
        self._order = BatchOrder(len(self.data), self.size, self.seed)

    def __call__(self, step: int, rows: slice = ALL) -> Batch:
        """The batch of this step, or some rows of it."""
        mask = None
        if self.flip and self.data.scaling.kind == "image":
            mask = torch.rand(self.size, generator=generator(self.seed, f"flip/{step}"))[rows] < 0.5
        indices = self._order.indices(step)[rows]
        x, _ = self.data.batch(indices, flip=mask)
        noise = None if self.noise is None else self.noise[indices]
        texts = [self.data.captions[i] for i in indices.tolist()] if self.data.captions else ()
        pool = Pool(len(self.data), self.data.conditioning, self.data.captions)
        return Batch(x, self.data.conditioning(indices), noise, texts, pool, indices).on(self.device)
