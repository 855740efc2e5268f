"""A claim of a paper, what we measured of it, and how figures become a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.95

Verdict = Literal["holds", "does not hold", "cannot be told"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a claim's test found.

    Attributes:
        differences: One for each independent repetition (seed, pair of runs, block of samples): the quantity
            that the claim is about, so signed that the claim says "greater than zero".
        unit: Of the differences, e.g. "fd" or "recall".
        figures: What stands in the table besides, by name, e.g. the means of both sides.
        alike: For claims that two things are equal: differences within this bound count as none. None for
            claims with a direction.
        note: A sentence for the reader, e.g. where theory and measurement part and why.
    """

    differences: Sequence[float]
    unit: str
    figures: dict[str, float]
    alike: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that can be tested at this scale, written down before it is.

    Attributes:
        name: Short, for the command line and the result's file.
        system: The paper's method, e.g. "f-distill".
        source: Paper and where in it.
        says: Its statement in our words.
        test: What is trained or computed here, on which data, with how many repetitions.
        measure: Does it.
    """

    name: str
    system: str
    source: str
    says: str
    test: str
    measure: Callable[[], Measured]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t, over independent repetitions."""
    values = np.asarray(differences, dtype=np.float64)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), half


def verdict(measured: Measured) -> Verdict:
    """A claim with a direction holds where the interval is above zero and fails where it is below.

    A claim of equality holds where the interval is within the bound, and fails where it is outside.
    """
    mean, half = interval(measured.differences)
    if measured.alike is not None:
        if abs(mean) + half <= measured.alike:
            return "holds"
        return "does not hold" if abs(mean) - half > measured.alike else "cannot be told"
    if mean - half > 0:
        return "holds"
    return "does not hold" if mean + half < 0 else "cannot be told"


def save(claim: Claim, measured: Measured, seconds: float) -> None:
    """Writes the result, with the words of the claim as they were when it was measured."""
    words = {name: getattr(claim, name) for name in ("name", "system", "source", "says", "test")}
    row = {**words, **asdict(measured), "processor_seconds": round(seconds)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{claim.name}.json").write_text(json.dumps(row, indent=1) + "\n")
