"""The order in which samples are visited, as a function of the step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed


class BatchOrder:
    """Consecutive batches of an endless sequence of permutations, one for each epoch.

    Batches may straddle epochs, and a batch may be larger than the data. ``indices(step)`` depends on nothing
    but the seed and the step, so the position in the data is the step number and resuming needs no state.

    The permutation of an epoch is the rank order of 64-bit Philox numbers keyed by (seed, epoch). We sort raw
    bits because NumPy promises their stream for good, which it does not for ``Generator.permutation``.

    Args:
        n: Number of samples.
        batch: Samples in a batch.
        seed: Seed of the run.

    Raises:
        UserError: ``n`` or ``batch`` is not positive.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if n < 1 or batch < 1:
            raise UserError(
                "batches need at least one sample",
                got=f"{n} samples and a batch of {batch}",
                expected="1 or more of both",
                fix="set --batch to a positive number",
            )
        self.n, self.batch = n, batch
        self._key = stream_seed(seed, "batch order")
        self._epochs: dict[int, np.ndarray] = {}

    def _permutation(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([self._key, epoch], dtype=np.uint64)).random_raw(self.n)
        return np.argsort(bits, kind="stable")

    def indices(self, step: int) -> Tensor:
        """The samples of batch ``step`` (counted from 0), (batch,) int64 on the CPU.

        Raises:
            UserError: ``step`` is negative.
        """
        check_count("the number of a step", step, 0)
        position = np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)
        epoch = position // self.n
        first, last = int(epoch[0]), int(epoch[-1])
        kept = self._epochs
        # Only what this batch touches is kept: one permutation, two where it straddles epochs.
        epochs = {e: kept[e] if e in kept else self._permutation(e) for e in range(first, last + 1)}
        self._epochs = epochs  # a name of our own, as several threads may draw
        table = np.stack(list(epochs.values()))
        return torch.from_numpy(table[epoch - first, position % self.n])
