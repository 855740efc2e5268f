"""Which divergences find all modes? Exact teachers `skewed2` and `grid25`, learned ratio, five seeds.

    python benchmarks/coverage.py --out docs/coverage.md

Every run is the same but for the divergence and the seed: the same network, steps, batch and ratio settings,
and no adversarial term, so that the divergence alone decides. The student starts as one narrow Gaussian in the
middle, not as a copy of the teacher: it has to find the modes, not only to keep them. One row a divergence:
mean over seeds ± its standard error of the number of modes hit, KL(p||q) and KL(q||p) of the mode histogram,
and the share of the samples within three sigma of a mode.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import distmatch as dm
from distmatch.data import load_data, toy
from distmatch.metrics.modes import mode_counts


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    toys: tuple[str, ...] = ("skewed2", "grid25")
    divergences: tuple[str, ...] = ("reverse_kl", "js", "kl")
    seeds: int = 5
    steps: int = 2000
    batch: int = 512
    n: int = 20_000
    """Samples for the histogram."""
    out: Path | None = None
    """A Markdown file to write the table to."""


def one(name: str, measure: str, seed: int, o: Options) -> dict[str, float]:
    """Distils one student and counts its modes."""
    mixture = toy(name)
    began = time.perf_counter()
    student = dm.distill(
        mixture,
        load_data(name, labels=False),
        divergence=measure,
        steps=o.steps,
        batch=o.batch,
        seed=seed,
        quiet=True,
        width=64,
        depth=2,
        gan_weight=0.0,
        noise_low=0.02,
        noise_high=5.0,
        lr=1e-3,
        lr_critic=3e-3,
        fit_steps=0,
        lr_decay="cosine",
    )
    report = mode_counts(student.sample(o.n, seed=seed), mixture)
    row = {key: getattr(report, key).value for key in ("modes", "kl", "reverse_kl", "js", "high_quality")}
    return {**row, "seconds": time.perf_counter() - began}


def main() -> None:
    """Runs all and prints the table."""
    o = tyro.cli(Options)
    lines = []
    for name in o.toys:
        total = len(toy(name).weights)
        lines += [f"\n**{name}** ({total} modes)\n"]
        lines += ["| divergence | modes hit | KL(p‖q) | KL(q‖p) | within 3σ |", "|---|---|---|---|---|"]
        for measure in o.divergences:
            rows = [one(name, measure, seed, o) for seed in range(o.seeds)]
            print(name, measure, json.dumps(rows), flush=True)
            cells = []
            for key in ("modes", "kl", "reverse_kl", "high_quality"):
                values = [row[key] for row in rows]
                spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(text)
    if o.out is not None:
        o.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
