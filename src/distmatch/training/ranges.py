"""Samples outside the range of the training data: their share, and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distmatch.base.errors import UserError
from distmatch.data.columns import columns_of, element_names


@dataclass(frozen=True)
class Range:
    """The smallest and largest value of each column of the training data.

    Attributes:
        low: (D,) float64.
        high: (D,) float64.
        names: Name of the column of each element; None for a part of a word encoded one-hot, whose values
            are not counted.
    """

    low: np.ndarray
    high: np.ndarray
    names: tuple[str | None, ...]

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Range | None:
        """The range that a saved model describes, or None when it does not."""
        try:
            low, high = (np.array(about[key], dtype=np.float64) for key in ("minimum", "maximum"))
        except (KeyError, TypeError, ValueError):
            return None
        if low.ndim != 1 or low.shape != high.shape or not low.size:
            return None
        return cls(low, high, tuple(element_names(columns_of(about, len(low)))))

    def outside(self, x: np.ndarray) -> dict[str, Any]:
        """The values outside.

        Args:
            x: Vectors (n, D) in the units of the data.

        Returns:
            ``outside_range``, the share of the values in columns that are not constant, and
            ``below_zero``: for each column that was never negative in the training data, the share of its
            values that are, where there are any.
        """
        counted = np.array([name is not None for name in self.names])
        varied = counted & (self.low < self.high)
        beyond = (x < self.low) | (x > self.high)
        negative = ((x < 0) & (self.low >= 0) & counted).mean(0)
        return {
            "outside_range": float(beyond[:, varied].mean()) if varied.any() else 0.0,
            "below_zero": {str(self.names[k]): float(negative[k]) for k in np.flatnonzero(negative)},
        }

    def clip(self, x: np.ndarray) -> np.ndarray:
        """Values outside moved to the nearest value that the training data had; of the type of ``x``."""
        return np.clip(x, self.low.astype(x.dtype), self.high.astype(x.dtype))


def require_range(about: Mapping[str, Any]) -> Range:
    """The range of a model that is to be clipped to it.

    Raises:
        UserError: The model does not record it.
    """
    found = Range.of(about)
    if found is None:
        raise UserError(
            "--clip needs the range of the training data, which the model does not record",
            expected="a model of vectors that was trained here; images are always in their range",
            fix="leave it out",
        )
    return found
