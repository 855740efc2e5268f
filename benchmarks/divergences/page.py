"""Tables and picture of docs/when-it-matters.md, from the results of the blocks that are done.

python benchmarks/divergences/page.py --results benchmarks/divergences/results
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot as plt
from scipy import stats

from distmatch.training.comparison.stats import holm

PAGE, PICTURE = Path("docs/when-it-matters.md"), Path("docs/pictures/when-it-matters.svg")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = ("kl", "reverse_kl", "rare", "precision", "recall", "coverage", "fd")
HEADS = ("KL(p‖q)", "KL(q‖p)", "rare modes", "precision", "recall", "coverage", "fd")
TESTED = ("kl", "precision", "recall", "rare")
BASE = "reverse_kl"
BLUE, VERMILION = "#0072B2", "#D55E00"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the results are."""

    results: Path = Path("benchmarks/divergences/results")


@dataclass(frozen=True)
class Found:
    """The rows of a block: its floor, and the runs by divergence and step, in the order of their seeds."""

    name: str
    modes: float
    floor: dict[str, float]
    judge: float
    steps: int
    runs: dict[str, dict[int, list[dict[str, Any]]]]

    def last(self, divergence: str, column: str, part: float = 1.0) -> list[float]:
        """The values of a measure over seeds, at a part of the length."""
        return [row[column] for row in self.runs[divergence][round(self.steps * part)]]


def read(path: Path) -> Found:
    first, *rows = (json.loads(line) for line in path.read_text().splitlines())
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        runs.setdefault(row["divergence"], {}).setdefault(row["step"], []).append(row)
    name = f"{first['task']}, {first['block']}"
    return Found(name, first["floor"]["modes"], first["floor"], first["judge"], rows[0]["steps"], runs)


def _cell(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    digits = 3 if max(abs(value) for value in values) > 0.1 else 4
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def _paired(found: Found, divergence: str, column: str) -> tuple[float, float, float]:
    """Mean, standard error and p-value of the differences to reverse KL with the same seed."""
    pairs = zip(found.last(divergence, column), found.last(BASE, column), strict=True)
    differences = [a - b for a, b in pairs]
    spread = statistics.stdev(differences)
    mean = statistics.mean(differences)
    if spread == 0:
        return mean, 0.0, 1.0
    return mean, spread / math.sqrt(len(differences)), float(stats.ttest_1samp(differences, 0).pvalue)


def table(found: Found) -> list[str]:
    """The end values, what has changed over the last half, and the differences that can be told."""
    lines = [f"**{found.name}** ({found.steps} steps)", ""]
    lines += ["| divergence | modes | " + " | ".join(HEADS) + " |", "|---" * (2 + len(HEADS)) + "|"]
    for divergence in found.runs:
        cells = [_cell(found.last(divergence, column)) for column in COLUMNS]
        modes = statistics.mean(found.last(divergence, "modes"))
        lines.append(f"| `{divergence}` | {modes:.1f} | " + " | ".join(cells) + " |")
    floor = " | ".join(f"{found.floor[column]:.2g}" for column in COLUMNS)
    lines += [f"| *the teacher again* | {found.modes:.0f} | {floor} |", ""]
    tests = [(d, c, *_paired(found, d, c)) for d in found.runs if d != BASE for c in TESTED]
    adjusted = holm([p for *_, p in tests])
    told = [
        f"`{d}` {HEADS[COLUMNS.index(c)]} {mean:+.3f} ± {error:.3f} (p {p:.2g})"
        for (d, c, mean, error, _), p in zip(tests, adjusted, strict=True)
        if p < 0.05
    ]
    said = "; ".join(told) if told else f"none of {len(tests)}"
    lines += [f"Differences to reverse KL that can be told (paired by seed, Holm at 5 %): {said}.", ""]
    halves = [
        f"`{d}` {statistics.mean(found.last(d, 'fd', 0.5)):.2g} → {statistics.mean(found.last(d, 'fd')):.2g}"
        for d in found.runs
    ]
    return [*lines, f"fd from half of the steps to all: {', '.join(halves)}.", ""]


def draw(blocks: list[Found]) -> None:
    """KL against reverse KL in each block: differences with their standard errors."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distmatch", "font.size": 9})
    figure, axes = plt.subplots(1, 3, figsize=(9, 0.9 + 0.32 * len(blocks)), sharey=True)
    titles = {"kl": "KL(p‖q)\n(left of 0 is better)", "recall": "recall\n(right of 0 is better)"}
    titles["precision"] = "precision\n(right of 0 is better)"
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        axis.axvline(0, color="grey", linewidth=0.8)
        for row, found in enumerate(reversed(blocks)):
            for divergence, color, shift in (("js", BLUE, 0.13), ("kl", VERMILION, -0.13)):
                mean, error, _ = _paired(found, divergence, column)
                axis.errorbar(mean, row + shift, xerr=2 * error, color=color, marker="o", markersize=4)
        axis.set_title(title)
    axes[0].set_yticks(range(len(blocks)), [found.name for found in reversed(blocks)])
    axes[0].plot([], [], color=BLUE, marker="o", label="JS")
    axes[0].plot([], [], color=VERMILION, marker="o", label="KL")
    figure.legend(loc="upper right", ncols=2, frameon=False)
    figure.suptitle("Difference to reverse KL, five seeds, two standard errors", x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main(o: Options) -> None:
    blocks = [read(path) for path in sorted(o.results.glob("*.jsonl"))]
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    lines = [line for found in blocks for line in table(found)]
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, END + rest.split(END)[1]]))
    draw(blocks)


if __name__ == "__main__":
    main(tyro.cli(Options))
