"""Batches that are made while the step before is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from distmatch.data.batches import Batch
from distmatch.data.dataset import Dataset


def ahead(
    batches: Callable[[int], Batch], device: torch.device, data: Dataset | None
) -> Callable[[int], Batch]:
    """The batches, made ahead where that saves time: for a GPU, and of data that are read from a disk.

    Args:
        batches: The batch of a step.
        device: Where the batches go.
        data: What they are drawn from.
    """
    stored = data is not None and data.recorded is not None
    return Ahead(batches) if stored or device.type == "cuda" else batches


class Ahead:
    """The batches of another function, each made in a thread once the one before was taken.

    They are the same: a batch is a function of its step alone.

    Args:
        batches: The batch of a step, for this thread alone.
    """

    def __init__(self, batches: Callable[[int], Batch]) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of this step."""
        step_ahead, future = self._next or (step, self._thread.submit(self._batches, step))
        if step_ahead != step:
            future = self._thread.submit(self._batches, step)
        batch = future.result()
        self._next = step + 1, self._thread.submit(self._batches, step + 1)
        return batch
