"""A number with its uncertainty: no metric returns a bare float."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        value: The estimate, in the unit of the metric.
        stderr: Its standard error (one sigma), NaN where none can be given.
        n: The number of samples behind it.
    """

    value: float
    stderr: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The JSON form ``{"value", "stderr", "n"}``; a value that is not finite becomes null."""
        finite = {
            k: v if math.isfinite(v) else None for k, v in (("value", self.value), ("stderr", self.stderr))
        }
        return {"value": finite["value"], "stderr": finite["stderr"], "n": self.n}

    def __str__(self) -> str:
        if not math.isfinite(self.stderr):
            return f"{self.value:.4g} (n={self.n})"
        return f"{self.value:.4g} ± {self.stderr:.2g} (n={self.n})"
