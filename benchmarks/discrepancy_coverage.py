"""Bias, spread and error bars of the sample discrepancies on Gaussians, over many repetitions.

    python benchmarks/discrepancy_coverage.py --out docs/discrepancies.md     # ten minutes on one core

p = N(0, I) and q = N(m, I) with |m| from 0 to 1, in 1, 2, 10 and 50 dimensions; the truth is a closed form.
For distance covariance the two variables are standard normal with correlation rho. For its joint forms x and
y are, and z = rho x y + noise; their truth is a mean over larger samples. An estimate with a warning claims
no interval; the coverage is also given among those that claim one.
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
    concatenated_distance_covariance,
    conditional_cauchy_schwarz,
    distance_covariance,
    energy_distance,
    fisher_divergence,
    gaussian,
    hyvarinen,
    joint_distance_covariance,
    kernel_stein,
    mmd,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    repetitions: int = 500
    n: int = 200
    """Samples of each law."""
    dimensions: tuple[int, ...] = (1, 2, 10, 50)
    gaps: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0)
    """Distances of the means, in standard deviations."""
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
    if gap not in (0, 1):
        return  # plain means, as good at every gap
    yield Case("Fisher divergence", setting, d + 4 * gap**2, fisher)
    yield Case("Hyvärinen, sliced", setting, (gap**2 - d) / 2, sliced)


def dependence_cases(n: int) -> Iterator[Case]:
    for rho in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        inner = (
            rho * math.asin(rho)
            + math.sqrt(1 - rho**2)
            - rho * math.asin(rho / 2)
            - math.sqrt(4 - rho**2)
            + 1
        )

        def pair(n: int, i: int, rho: float = rho) -> tuple[Tensor, Tensor]:
            x, e = draw(n, 2, i).unbind(1)
            return x, rho * x + math.sqrt(1 - rho**2) * e

        yield Case(
            "distance covariance²",
            f"rho = {rho:g}",
            4 / math.pi * inner,
            lambda i, pair=pair, n=n: distance_covariance(*pair(n, i)),
        )


def joint_cases(n: int) -> Iterator[Case]:
    for rho in (0.0, 0.2, 0.4, 0.6):

        def triple(n: int, i: int, rho: float = rho) -> list[Tensor]:
            x, e, f = draw(n, 3, i).unbind(1)
            return [rho * x * e + f, x, rho * x + math.sqrt(1 - rho**2) * e]

        def about(n: int, i: int, triple: Callable[..., list[Tensor]] = triple) -> Estimate:
            return joint_distance_covariance(triple(n, i), about_first=True)

        def joint(n: int, i: int, triple: Callable[..., list[Tensor]] = triple) -> Estimate:
            return joint_distance_covariance(triple(n, i))

        def beside(n: int, i: int, triple: Callable[..., list[Tensor]] = triple) -> Estimate:
            first, *others = triple(n, i)
            return concatenated_distance_covariance(first, others)

        for name, estimate in (
            ("joint distance covariance", joint),
            ("the same, about the first", about),
            ("concatenated distance covariance", beside),
        ):
            # Twenty samples five times as large: their mean is good to a tenth of the spread at n.
            values = [estimate(5 * n, 10**6 + i).value for i in range(20)] if rho else [0.0]
            truth = sum(values) / len(values)
            yield Case(name, f"rho = {rho:g}", truth, lambda i, estimate=estimate: estimate(n, i))


def conditional_cases(n: int) -> Iterator[Case]:
    def estimate(i: int) -> Estimate:
        (x, e), (z, f) = (draw(n, 2, 2 * i + k).T[:, :, None] for k in (0, 1))
        return conditional_cauchy_schwarz(x, x + e, z, z + f, bandwidth_x=0.4, bandwidth_y=0.4)

    yield Case("conditional Cauchy-Schwarz", "equal", 0.0, estimate)


def share(hits: Tensor) -> str:
    return f"{100 * float(hits.double().mean()):.1f} %" if len(hits) else "none"


def row(case: Case, repetitions: int) -> str:
    runs = [case.estimate(i) for i in range(repetitions)]
    values = torch.tensor([r.value for r in runs], dtype=torch.float64)
    errors = torch.tensor([r.stderr for r in runs], dtype=torch.float64)
    claimed = torch.tensor([r.reliable for r in runs]) & errors.isfinite()
    held = (values - case.truth).abs() < 1.96 * errors
    numbers = (case.truth, values.mean() - case.truth, values.std(), errors.square().mean().sqrt())
    cells = [
        case.name,
        case.setting,
        *("none" if math.isnan(v) else f"{float(v):.2g}" for v in numbers),
        share(held[errors.isfinite()]),
        share(claimed),
        share(held[claimed]),
    ]
    return "| " + " | ".join(cells) + " |"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    cases = [
        case for d in options.dimensions for gap in options.gaps for case in gaussian_cases(options.n, d, gap)
    ]
    lines = [
        f"{options.repetitions} repetitions, n = {options.n} samples of each distribution.",
        "",
        "| estimator | distributions | true value | bias | standard deviation | root mean square of the "
        "standard errors | coverage, all | without a warning | coverage of these |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted(cases, key=lambda c: c.name) + [
        case for kind in (dependence_cases, joint_cases, conditional_cases) for case in kind(options.n)
    ]:
        lines.append(row(case, options.repetitions))
        print(lines[-1], flush=True)
    if options.out is not None:
        replace_section(options.out, "coverage", "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Options))
