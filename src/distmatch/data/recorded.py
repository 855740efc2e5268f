"""Statistics of samples, taken while they are written, so that no later use has to pass over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from distmatch.data.scaling import Scaling


@dataclass(frozen=True)
class Moments:
    """Extremes, mean and variance of values: of all pixels together, or of each column.

    Attributes:
        count: Values (of a column).
        low: The smallest, (D,) float64; D is 1 for pixels.
        high: The largest.
        mean: Their mean.
        deviation: The sum of their squared differences from the mean.
    """

    count: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, *, columns: bool) -> Moments:
        """Those of samples (N, ...): by their last axis, or of all values together.

        Those of bytes are exact.
        """
        if x.dtype == np.uint8 and not columns:
            counts = torch.bincount(torch.from_numpy(x).flatten(), minlength=256).tolist()
            there = [value for value, n in enumerate(counts) if n]
            total = sum(value * n for value, n in enumerate(counts))
            square = sum(value * value * n for value, n in enumerate(counts))
            mean, deviation = total / x.size, (square * x.size - total * total) / x.size
            return cls(x.size, *(np.array([float(v)]) for v in (there[0], there[-1], mean, deviation)))
        rows = x.reshape(-1, x.shape[-1] if columns else 1).astype(np.float64)
        average = rows.mean(0)
        return cls(len(rows), rows.min(0), rows.max(0), average, np.square(rows - average).sum(0))

    def with_more(self, more: Moments) -> Moments:
        """Those of both sets of values together (Chan, Golub and LeVeque 1983)."""
        count = self.count + more.count
        step = more.mean - self.mean
        return Moments(
            count,
            np.minimum(self.low, more.low),
            np.maximum(self.high, more.high),
            self.mean + step * (more.count / count),
            self.deviation + more.deviation + step**2 * (self.count * more.count / count),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without loss."""
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Moments:
        """Reads the JSON form.

        Raises:
            KeyError: A field is missing.
            ValueError: A field is not what it should be.
        """
        count = values["count"]
        arrays = [np.array(values[name], dtype=np.float64) for name in ("low", "high", "mean", "deviation")]
        shapes = {array.shape for array in arrays}
        if type(count) is not int or count < 1 or len(shapes) > 1 or arrays[0].ndim != 1:
            raise ValueError("these are no moments")
        return cls(count, *arrays)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is known of samples since they were written.

    Attributes:
        digest: A sha256 (hex) that changes with the samples and all that belongs to them.
        moments: Their raw moments, of all pixels together or of each column.
        rows: Reads the raw samples of these numbers (B,).
        decoder: Of latents, the fingerprint of their autoencoder.
    """

    digest: str
    moments: Moments
    rows: Callable[[Tensor], Tensor]
    decoder: str = ""

    def std(self, scaling: Scaling) -> float:
        """Standard deviation of all scaled values about their common mean."""
        center, half = np.array(scaling.center), np.array(scaling.half)
        mean = (self.moments.mean - center) / half
        square = self.moments.deviation / self.moments.count / half**2 + mean**2
        return math.sqrt(max(float(square.mean() - mean.mean() ** 2), 0.0))
