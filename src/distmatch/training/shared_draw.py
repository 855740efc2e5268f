"""Sets of samples that several processes draw together, and that need not fit into memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distmatch.base.files import guard
from distmatch.base.ranks import ALONE, Ranks
from distmatch.data import Dataset
from distmatch.diffusion.conditioning import Conditioning
from distmatch.metrics import resolve_features
from distmatch.metrics.features import Features
from distmatch.metrics.spaces import FeatureChoice
from distmatch.training.sampling import SampleResult

_IN_MEMORY = 2**28  # bytes of samples from which on they are in a file
_NUMBERS = 2**22  # numbers that are drawn at a time


def draw_shared(
    draw: Callable[..., SampleResult],
    n: int,
    asked: Conditioning,
    shape: Sequence[int],
    *,
    batch: int,
    ranks: Ranks = ALONE,
    place: Path | None = None,
) -> SampleResult:
    """Draws samples, all processes together; everyone then has all of them.

    Args:
        draw: Draws (count, conditioning, first=...).
        n: Number of samples.
        asked: What they are conditioned on.
        shape: Shape of a sample.
        batch: Samples at a time.
        ranks: The processes.
        place: A folder that all of them see.

    Returns:
        The samples, with the seconds of all processes together.
    """
    calls, seconds = 0, 0.0

    def part(first: int, count: int) -> Tensor:
        nonlocal calls, seconds
        drawn = draw(count, asked.index(slice(first, first + count)), first=first)
        calls, seconds = max(calls, drawn.nfe), seconds + drawn.seconds_per_1000 * count
        return drawn.x

    x = filled(n, shape, part, batch=batch, ranks=ranks, place=place)
    total = ranks.sum(torch.tensor(seconds, dtype=torch.float64))
    return SampleResult(x, asked, ranks.largest(calls), float(total) / n)


def filled(
    n: int,
    shape: Sequence[int],
    part: Callable[[int, int], Tensor],
    *,
    batch: int,
    ranks: Ranks = ALONE,
    place: Path | None = None,
) -> Tensor:
    """Samples (n, *shape) float32 made in parts: in memory where they are few, else in a mapped file.

    The file is removed at once; the system keeps it as long as it is mapped.

    Args:
        n: Number of samples.
        shape: Shape of a sample.
        part: Makes the samples (first, count).
        batch: Parts begin at multiples of it.
        ranks: The processes, which make a share each.
        place: Folder of the file, which all of them see.

    Raises:
        UserError: The file cannot be written.
    """
    numbers = math.prod(shape)
    if ranks.size == 1 and 4 * n * numbers <= _IN_MEMORY:
        return part(0, n)
    folder = place or Path(tempfile.gettempdir())
    file = folder / f".samples-{ranks.largest(os.getpid() if ranks.main else 0)}.tmp"
    batches = -(-n // batch)
    begin, end = (min(n, batch * (batches * k // ranks.size)) for k in (ranks.index, ranks.index + 1))
    step = batch * max(1, _NUMBERS // (batch * numbers))

    def write() -> None:
        with open(file, "r+b") as handle:
            handle.seek(4 * begin * numbers)
            for first in range(begin, end, step):
                x = part(first, min(step, end - first)).float().cpu().contiguous()
                handle.write(x.numpy().tobytes())
            handle.flush()
            os.fsync(handle.fileno())

    try:
        if ranks.main:
            guard(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
            guard(lambda: _make(file, 4 * n * numbers), file)
        ranks.wait()
        guard(write, file)
        ranks.wait()
        x = torch.from_file(str(file), shared=False, size=n * numbers, dtype=torch.float32)
        ranks.wait()
    finally:
        if ranks.main:
            file.unlink(missing_ok=True)
    return x.view(n, *shape)


def _make(file: Path, size: int) -> None:
    with open(file, "wb") as handle:
        handle.truncate(size)


def shared_features(features: FeatureChoice, data: Dataset, ranks: Ranks, weights: str = "") -> Features:
    """The feature space, which the first process makes and the others then find in its cache.

    Args:
        features: As in :func:`distmatch.metrics.evaluate`.
        data: The reference.
        ranks: The processes.
        weights: As in :func:`distmatch.metrics.resolve_features`.
    """
    if not ranks.main:
        ranks.wait()
    try:
        return resolve_features(features, data, weights)
    finally:
        if ranks.main:
            ranks.wait()
