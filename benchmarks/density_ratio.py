"""How far are fitted density ratios off, and do the error bars of the divergences from them hold?

    python benchmarks/density_ratio.py --out table.md

First table: p = N(m, I), q = N(0, I) with KL(p || q) = 1 nat in every dimension, 2,000 samples of each. The
root mean square error of log r at fresh samples of p and of q, where the true log r has a standard deviation
of 1.41 around +-1; the KL from the ratio and 1,000 fresh samples of each (mean and spread over the seeds, and
the mean error bar); and in how many of the runs the ratio or the value carried a warning.

Second table: how often 95% intervals hold the truth over 200 repetitions, for the mass tests and divergences
from the exact ratio and from a fitted quadratic one.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.divergences import divergence, divergence_1d
from distmatch.ratio import METHODS, divergence_from_ratio, fit_ratio, mass_tests


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    dimensions: tuple[int, ...] = (1, 2, 10, 50)
    methods: tuple[str, ...] = METHODS
    seeds: int = 3
    n: int = 2000
    repetitions: int = 200
    out: Path | None = None
    """A Markdown file to write the tables to."""


def draw(n: int, d: int, seed: int, shift: float, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def accuracy_row(method: str, d: int, o: Options) -> str:
    shift = math.sqrt(2.0 / d)
    errors_p, errors_q, values, bars, warned, seconds = [], [], [], [], 0, 0.0
    for seed in range(o.seeds):
        p, q, x_p, x_q = (
            draw(n, d, 10 * seed + k, shift * (k % 2)) for k, n in ((1, o.n), (2, o.n), (3, 1000), (4, 1000))
        )
        began = time.perf_counter()
        ratio = fit_ratio(p, q, method, seed=seed)
        seconds += time.perf_counter() - began
        for errors, x in ((errors_p, x_p), (errors_q, x_q)):
            true = (shift * x - shift**2 / 2).sum(1)
            errors.append((ratio.log_ratio(x) - true).square().mean().sqrt().item())
        kl = divergence_from_ratio("kl", ratio, x_q, x_p)
        values.append(kl.value)
        bars.append(kl.stderr)
        warned += not kl.reliable
    spread = statistics.stdev(values) if o.seeds > 1 else math.nan
    return (
        f"| {d} | {method} | {statistics.mean(errors_p):.2f} | {statistics.mean(errors_q):.2f} | "
        f"{statistics.mean(values):.2f} ± {spread:.2f} | {statistics.mean(bars):.2f} | {warned}/{o.seeds} | "
        f"{seconds / o.seeds:.2f} |"
    )


def coverage_rows(o: Options) -> list[str]:
    shift, scale = 0.5, 0.9
    normal = torch.distributions.Normal
    p, q = normal(shift, scale), normal(0.0, 1.0)
    names = ("kl", "reverse_kl", "js", "hellinger", "le_cam")
    truth = {name: divergence_1d(divergence(name), p.log_prob, q.log_prob, -12, 12).item() for name in names}

    def log_r(x: Tensor) -> Tensor:
        return (p.log_prob(x) - q.log_prob(x)).sum(1)

    hits: dict[str, int] = {}

    def count(name: str, estimate: Estimate, value: float) -> None:
        hits[name] = hits.get(name, 0) + (abs(estimate.value - value) <= 1.96 * estimate.stderr)

    for seed in range(o.repetitions):
        x_p, x_q = draw(400, 1, 1000 + seed, shift, scale), draw(400, 1, 5000 + seed, 0.0)
        for name in names:
            count(f"{name}, exact ratio, samples of q", divergence_from_ratio(name, log_r, x_q), truth[name])
            count(f"{name}, exact ratio, both", divergence_from_ratio(name, log_r, x_q, x_p), truth[name])
        mass = mass_tests(log_r(x_p), log_r(x_q))
        count("E_q[r]", mass.q, 1.0)
        count("E_p[1/r]", mass.p, 1.0)
        count("balance", mass.balance, 0.0)
        fitted = fit_ratio(
            draw(2000, 1, 9000 + seed, shift, scale), draw(2000, 1, 15000 + seed, 0.0), model="quadratic"
        )
        for name in names:
            estimate = divergence_from_ratio(name, fitted, x_q, x_p)
            count(f"{name}, fitted quadratic ratio, both", estimate, truth[name])
    return [f"| {name} | {100 * k / o.repetitions:.1f}% |" for name, k in hits.items()]


def main() -> None:
    o = tyro.cli(Options)
    torch.set_num_threads(1)
    lines = [
        "| d | method | error at p | error at q | KL (true value 1) | standard error | warned | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d in o.dimensions:
        for method in o.methods:
            lines.append(accuracy_row(method, d, o))
            print(lines[-1], flush=True)
    lines += ["", "| 95% interval of | coverage |", "|---|---|", *coverage_rows(o)]
    text = "\n".join(lines) + "\n"
    print(text)
    if o.out is not None:
        o.out.write_text(text)


if __name__ == "__main__":
    main()
