"""Bias, spread and error bars of the sample discrepancies on Gaussians, over 200 repetitions.

    python benchmarks/discrepancy_coverage.py --out docs/discrepancies.md

p = N(0, I) and q = N(m, I) with |m| = 0 or 1, in 1, 2, 10 and 50 dimensions; the truth is a closed form.
For distance covariance the two variables are standard normal with correlation rho.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from scipy.special import gammaln, hyp1f1
from sections import replace_section
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.discrepancies import (
    cauchy_schwarz,
    distance_covariance,
    energy_distance,
    fisher_divergence,
    gaussian,
    hyvarinen,
    kernel_stein,
    mmd,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    repetitions: int = 200
    n: int = 200
    """Samples of each law."""
    dimensions: tuple[int, ...] = (1, 2, 10, 50)
    out: Path | None = None
    """A Markdown file whose section "coverage" is replaced."""


@dataclass(frozen=True)
class Case:
    """An estimator on one pair of laws."""

    name: str
    setting: str
    truth: float
    estimate: Callable[[int], Estimate]


def draw(n: int, d: int, seed: int, gap: float = 0.0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=stream, dtype=torch.float64) + gap / math.sqrt(d)


def mean_norm(d: int, gap: float, variance: float) -> float:
    """E|Z| for Z ~ N(gap, variance I)."""
    scale = math.sqrt(2 * variance) * math.exp(gammaln((d + 1) / 2) - gammaln(d / 2))
    return scale * float(hyp1f1(-0.5, d / 2, -(gap**2) / (2 * variance)))


def gaussian_cases(n: int, d: int, gap: float) -> Iterator[Case]:
    s = math.sqrt(d)
    inner = (1 + 2 / s**2) ** (-d / 2)
    kernel_truth = 2 * inner * (1 - math.exp(-(gap**2) / (2 * (2 + s**2))))
    setting = f"d = {d}, gap {gap:g}"

    def pair(i: int) -> tuple[Tensor, Tensor]:
        return draw(n, d, 2 * i), draw(n, d, 2 * i + 1, gap)

    for estimator in ("unbiased", "block", "linear"):
        yield Case(
            f"MMD², {estimator}",
            setting,
            kernel_truth,
            lambda i, estimator=estimator: mmd(*pair(i), gaussian(s), estimator=estimator),
        )
    energy_truth = 2 * (mean_norm(d, gap, 2) - mean_norm(d, 0, 2))
    yield Case("energy distance", setting, energy_truth, lambda i: energy_distance(*pair(i)))
    h = 0.4 * s
    yield Case(
        "Cauchy-Schwarz, h = 0.4 √d",
        setting,
        gap**2 / (2 * (1 + h**2)),
        lambda i: cauchy_schwarz(*pair(i), bandwidth=h),
    )

    def stein(i: int) -> Estimate:
        x = draw(n, d, i, gap)
        return kernel_stein(x, -x, kernel="gaussian", bandwidth=s)

    def fisher(i: int) -> Estimate:
        # Unequal scales, so that the terms vary: s_q = -2 (x - m).
        x = draw(n, d, i)
        return fisher_divergence(-x, -2 * (x - gap / math.sqrt(d)))

    def sliced(i: int) -> Estimate:
        stream = torch.Generator().manual_seed(i + 10**6)
        return hyvarinen(lambda z: -(z - gap / s), draw(n, d, i), projections=1, generator=stream)

    yield Case("kernel Stein²", setting, gap**2 * inner, stein)
    yield Case("Fisher divergence", setting, d + 4 * gap**2, fisher)
    yield Case("Hyvärinen, sliced", setting, (gap**2 - d) / 2, sliced)


def dependence_cases(n: int) -> Iterator[Case]:
    for rho in (0.0, 0.1, 0.2, 0.3, 0.6):
        inner = (
            rho * math.asin(rho)
            + math.sqrt(1 - rho**2)
            - rho * math.asin(rho / 2)
            - math.sqrt(4 - rho**2)
            + 1
        )

        def estimate(i: int, rho: float = rho) -> Estimate:
            x, e = draw(n, 2, i).unbind(1)
            return distance_covariance(x, rho * x + math.sqrt(1 - rho**2) * e)

        yield Case("distance covariance²", f"rho = {rho:g}", 4 / math.pi * inner, estimate)


def row(case: Case, repetitions: int) -> str:
    runs = [case.estimate(i) for i in range(repetitions)]
    values = torch.tensor([r.value for r in runs], dtype=torch.float64)
    errors = torch.tensor([r.stderr for r in runs], dtype=torch.float64)
    held = ((values - case.truth).abs() < 1.96 * errors).double().mean()
    warned = sum(r.warning is not None for r in runs)
    numbers = (case.truth, values.mean() - case.truth, values.std(), errors.mean())
    cells = [
        case.name,
        case.setting,
        *(f"{float(v):.2g}" for v in numbers),
        f"{100 * float(held):.0f} %",
        f"{warned}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    cases = [
        case for d in options.dimensions for gap in (0.0, 1.0) for case in gaussian_cases(options.n, d, gap)
    ]
    lines = [
        f"{options.repetitions} repetitions, n = {options.n} samples of each law.",
        "",
        "| estimator | laws | truth | bias | spread (sd) | mean stderr | 95 % interval holds it | warnings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted(cases, key=lambda c: c.name) + list(dependence_cases(options.n)):
        lines.append(row(case, options.repetitions))
        print(lines[-1], flush=True)
    if options.out is not None:
        replace_section(options.out, "coverage", "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Options))
