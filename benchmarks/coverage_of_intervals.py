"""Are the error bars honest? How often value ± 1.96 stderr holds the truth, over 200 repetitions.

    python benchmarks/coverage_of_intervals.py --out docs/estimators.md

p = N(0.7, 1) and q = N(0, 1) on a line, and for nearest neighbors also in the plane. The truth is the exact
divergence; for a lower bound it is the bound of the same trained critic on 200,000 fresh samples, because
that is what its interval is about. Results that carry a warning claim nothing and are counted apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sections import replace_section
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.base.seeds import generator
from distmatch.divergences import divergence, divergence_1d
from distmatch.divergences.estimators import (
    LowerBound,
    Training,
    VariationalEstimator,
    chi_square_bound,
    donsker_varadhan_bound,
    f_gan_bound,
    kl_estimate,
    kl_neighbors,
    monte_carlo,
    monte_carlo_two_sided,
    renyi_monte_carlo,
)

SHIFT = 0.7
MEASURES = ("kl", "reverse_kl", "js", "hellinger", "tv", "pearson", "neyman")
BOUNDS = ("js", "kl", "reverse_kl", "tv", "donsker_varadhan", "chi_square")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    repetitions: int = 200
    n: int = 1000
    """Samples of p and of q."""
    out: Path | None = None
    """A Markdown file whose section "coverage" is replaced."""


def log_normal(x: Tensor, mean: float = 0.0) -> Tensor:
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    stream = generator(seed, "coverage")
    return torch.randn(n, d, generator=stream, dtype=torch.float64) + shift / math.sqrt(d)


def truths() -> dict[str, float]:
    """The exact values between the two normals."""
    values = {
        name: float(
            divergence_1d(divergence(name), lambda x: log_normal(x, SHIFT), log_normal, -14.0, 15.0, n=200)
        )
        for name in MEASURES
    }
    return {**values, "renyi:0.5": 0.25 * SHIFT**2, "renyi:2": SHIFT**2}


def with_densities(n: int, seed: int) -> Iterator[tuple[str, Estimate, float]]:
    """One repetition of everything that knows the densities: name, estimate, truth."""
    truth = TRUTHS
    x_q, x_p = draw(n, 1, 2 * seed).squeeze(1), draw(n, 1, 2 * seed + 1, SHIFT).squeeze(1)
    log_p, log_q = log_normal(x_q, SHIFT), log_normal(x_q)
    at_p = (log_normal(x_p, SHIFT), log_normal(x_p))
    for name in MEASURES:
        for method in ("plain", "control_variate", "self_normalized"):
            yield (
                f"Monte Carlo, {method}: {name}",
                monte_carlo(name, log_p, log_q, method=method),
                truth[name],
            )
        yield (
            f"Monte Carlo, two-sided: {name}",
            monte_carlo_two_sided(name, (log_p, log_q), at_p),
            truth[name],
        )
    for order in (0.5, 2.0):
        for method in ("plain", "control_variate", "self_normalized"):
            found = renyi_monte_carlo(order, log_p, log_q, method=method)
            yield f"Monte Carlo, {method}: renyi:{order:g}", found, truth[f"renyi:{order:g}"]
    for term in ("k1", "k3"):
        yield f"{term}: reverse_kl", kl_estimate(log_p, log_q, term), truth["reverse_kl"]


def with_neighbors(n: int, seed: int) -> Iterator[tuple[str, Estimate, float]]:
    """One repetition of the nearest-neighbor estimates."""
    for d in (1, 2, 4):
        x_q, x_p = draw(n, d, 2 * seed), draw(n, d, 2 * seed + 1, SHIFT)
        yield f"nearest neighbors, d = {d}: kl", kl_neighbors(x_p, x_q, seed=seed), TRUTHS["kl"]


def with_critics(n: int, seed: int) -> Iterator[tuple[str, Estimate, float]]:
    """One repetition of the lower bounds: one critic, trained anew, for all of them."""
    trainer = VariationalEstimator("js", "classification", Training(width=16, steps=100, batch=128))
    critic, test_p, test_q = trainer.train(draw(n, 1, 2 * seed, SHIFT), draw(n, 1, 2 * seed + 1), seed)
    on_p, on_q = critic.at(FRESH_P), critic.at(FRESH_Q)
    for name in BOUNDS:
        found = VariationalEstimator(name).evaluate(critic, test_p, test_q)
        yield f"lower bound: {name}", found, bound_at(name, on_p, on_q).value


def bound_at(name: str, log_r_p: Tensor, log_r_q: Tensor) -> LowerBound:
    """The bound of a fake score from its log-ratios."""
    if name == "donsker_varadhan":
        return donsker_varadhan_bound(log_r_p, log_r_q)
    if name == "chi_square":
        return chi_square_bound(log_r_p.exp(), log_r_q.exp())
    return f_gan_bound(name, log_r_p, log_r_q)


def coverage(
    repetition: Callable[[int, int], Iterator[tuple[str, Estimate, float]]], o: Options
) -> list[str]:
    """Table rows of one group of estimators."""
    hits: dict[str, int] = {}
    claims: dict[str, int] = {}
    for seed in range(o.repetitions):
        for name, found, truth in repetition(o.n, seed):
            claimed = found.reliable and math.isfinite(found.stderr)
            claims[name] = claims.get(name, 0) + claimed
            hit = claimed and abs(found.value - truth) <= 1.96 * found.stderr
            hits[name] = hits.get(name, 0) + hit
    rows = []
    for name, claimed in claims.items():
        # Of a few claims no share can be told.
        share = f"{100 * hits[name] / claimed:.1f} %" if claimed >= 0.2 * o.repetitions else "-"
        rows.append(f"| {name} | {share} | {claimed} of {o.repetitions} |")
        print(rows[-1], flush=True)
    return rows


def main(o: Options) -> None:
    torch.set_num_threads(1)
    rows = [f"n = {o.n} samples of p and of q, {o.repetitions} repetitions.", ""]
    rows += ["| estimator | covers the truth | claims an interval |", "|---|---|---|"]
    began = time.perf_counter()
    for group in (with_densities, with_neighbors, with_critics):
        rows += coverage(group, o)
    print(f"{time.perf_counter() - began:.0f} s")
    if o.out is not None:
        replace_section(o.out, "coverage", "\n".join(rows))


TRUTHS = truths()
FRESH_P, FRESH_Q = draw(200_000, 1, 10**6, SHIFT), draw(200_000, 1, 10**6 + 1)

if __name__ == "__main__":
    main(tyro.cli(Options))
