"""A number with its uncertainty: no metric returns a bare float."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        value: The estimate, in the unit of the metric.
        stderr: Its standard error (one sigma), NaN where none can be given.
        n: The number of samples behind it.
        warning: Why the value is not to be trusted, as a sentence; None when nothing speaks against it.
        features: The feature space it was measured in, with the fingerprint of its network; '' for none.
    """

    value: float
    stderr: float
    n: int
    warning: str | None = None
    features: str = field(default="", kw_only=True)

    @property
    def reliable(self) -> bool:
        """Whether there is a value and nothing is known to speak against it."""
        return self.warning is None and not math.isnan(self.value)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The JSON form ``{"value", "stderr", "n"}``, and ``"features"``, ``"warning"`` where there are any.

        A number that is not finite becomes null.
        """
        finite = {
            k: v if math.isfinite(v) else None for k, v in (("value", self.value), ("stderr", self.stderr))
        }
        result: dict[str, float | int | str | None] = {**finite, "n": self.n}
        if self.features:
            result["features"] = self.features
        if self.warning is not None:
            result["warning"] = self.warning
        return result

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Estimate:
        """An estimate from its JSON form; NaN represents null."""
        value, stderr = (math.nan if entry.get(k) is None else float(entry[k]) for k in ("value", "stderr"))
        features = str(entry.get("features") or "")
        return cls(value, stderr, int(entry.get("n") or 0), entry.get("warning"), features=features)

    def __str__(self) -> str:
        mark = "" if self.warning is None else f" (unreliable: {self.warning})"
        if not math.isfinite(self.stderr):
            return f"{self.value:.4g} (n={self.n}){mark}"
        return f"{self.value:.4g} ± {self.stderr:.2g} (n={self.n}){mark}"


def mean_of(values: Tensor, warning: str | None = None) -> Estimate:
    """The mean of independent ``values`` (n,) and its standard error, NaN for one value."""
    n = len(values)
    stderr = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), stderr, n, warning)
