"""Samples that are measured, read some at a time: what is kept of them are features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.dataset import Dataset
from distmatch.metrics.features import BATCH
from distmatch.metrics.reference import Reference

_NUMBERS = 2**26  # of large samples that are in memory at a time


@dataclass(frozen=True)
class Chosen:
    """Rows of a set of samples.

    Attributes:
        source: The set: samples in model space in memory, or what reads them.
        rows: The rows in the order in which they are measured, int64 (n,) on the CPU.
        check: Called with samples before they are used.
        like: Data whose tables samples are written as, see :meth:`~distmatch.data.Dataset.as_rows`.
        ranks: The processes that share the work. All of them have the same set.
    """

    source: Reference | Tensor
    rows: Tensor
    check: Callable[[Tensor], None]
    like: Reference | Tensor | None = None
    ranks: Ranks = ALONE

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def part(self, begin: int, end: int) -> Tensor:
        """Samples by their places among the chosen ones."""
        rows = self.rows[begin:end]
        x = (
            self.source[rows.to(self.device)]
            if isinstance(self.source, Tensor)
            else self.source.batch(rows)[0]
        )
        self.check(x)
        return self.like.as_rows(x) if isinstance(self.like, Dataset) else x

    def all(self) -> Tensor:
        """All of them at once."""
        return self.part(0, len(self))

    def map(self, function: Callable[[Tensor, int], Tensor]) -> Tensor:
        """A function of samples, one row each, in the order of the samples.

        Args:
            function: Called with parts of the samples and the place of the first one.
        """
        shape = self.source.shape[1:] if isinstance(self.source, Tensor) else self.source.shape
        step = max(1, min(BATCH, _NUMBERS // max(1, math.prod(shape))))
        size, parts = self.ranks.size, -(-len(self) // step)
        ends = [min(step * (parts * rank // size), len(self)) for rank in range(size + 1)]
        own = range(ends[self.ranks.index], ends[self.ranks.index + 1], step)
        found = [function(self.part(k, min(k + step, len(self))), k) for k in own]
        if size == 1:
            return torch.cat(found)
        values = torch.cat(found) if found else function(self.part(0, 1), 0)[:0]
        counts = [after - before for before, after in pairwise(ends)]
        most = max(counts)
        padded = torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])])
        shares = self.ranks.gather(padded).split(most)
        return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])
