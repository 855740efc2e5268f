"""How far off is each estimator? Bias and spread between Gaussians in 1, 2, 10 and 50 dimensions.

    python benchmarks/bias_of_estimators.py --out docs/estimators.md

Three pairs, q = N(0, I) always: p shifted by 1 (KL 0.5 in every dimension), p widened so that KL is 0.5, and
p shifted by 5 (KL 12.5, more than log n, where nothing that sees samples alone can work). Exact values: a
shift is one-dimensional; for the widened p, log p/q depends on the norm alone, whose law is known.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from scipy.optimize import brentq
from sections import replace_section
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.divergences import divergence, divergence_1d
from distmatch.divergences.estimators import (
    Training,
    VariationalEstimator,
    classifier_estimates,
    kl_estimate,
    kl_neighbors,
    monte_carlo,
    monte_carlo_two_sided,
)

DIMENSIONS = (1, 2, 10, 50)
TRAINING = Training(width=32, steps=150)  # of each critic


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    repetitions: int = 20
    n: int = 1000
    """Samples of p and of q."""
    out: Path | None = None
    """A Markdown file whose section "bias" is replaced."""


@dataclass(frozen=True)
class Pair:
    """p = N(shift e, scale^2 I), e a unit vector along the diagonal, against q = N(0, I) in d dimensions."""

    d: int
    shift: float
    scale: float

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Samples of p and of q, (n, d) each."""
        stream = torch.Generator().manual_seed(seed)
        x_p = torch.randn(n, self.d, generator=stream, dtype=torch.float64)
        x_q = torch.randn(n, self.d, generator=stream, dtype=torch.float64)
        return self.scale * x_p + self.shift / math.sqrt(self.d), x_q

    def log_densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both log-densities at x (n, d)."""
        constant = 0.5 * self.d * math.log(2 * math.pi)
        z = (x - self.shift / math.sqrt(self.d)) / self.scale
        log_p = -0.5 * z.square().sum(1) - constant - self.d * math.log(self.scale)
        return log_p, -0.5 * x.square().sum(1) - constant

    def truth(self, name: str) -> float:
        """The exact divergence, along the one line on which p and q differ."""
        measure = divergence(name)
        if name == "pearson" and self.scale**2 >= 2.0:
            return math.inf  # p has heavier tails than the square root of q
        if self.scale == 1.0:
            shifted, plain = Pair(1, self.shift, 1.0), Pair(1, 0.0, 1.0)
            return float(
                divergence_1d(
                    measure,
                    lambda x: shifted.log_densities(x[:, None])[0],
                    lambda x: plain.log_densities(x[:, None])[0],
                    -14.0,
                    14.0 + 2 * self.shift,
                    n=400,
                )
            )

        def log_norm(y: Tensor, scale: float) -> Tensor:
            """Log-density of log |x|^2 for x from N(0, scale^2 I)."""
            half = 0.5 * self.d
            u = torch.exp(y) / scale**2
            return half * torch.log(u) - 0.5 * u - half * math.log(2) - math.lgamma(half)

        low = math.log(self.d) - 60.0 / self.d - 3.0
        return float(
            divergence_1d(
                measure, lambda y: log_norm(y, self.scale), lambda y: log_norm(y, 1.0), low, 8.0, n=2000
            )
        )


def widened(d: int) -> Pair:
    """The pair whose p is wider, with KL(p || q) = 0.5."""
    return Pair(d, 0.0, math.sqrt(brentq(lambda v: 0.5 * d * (v - 1 - math.log(v)) - 0.5, 1.0001, 9.0)))


def estimates(pair: Pair, n: int, seed: int) -> dict[tuple[str, str], Estimate]:
    """One repetition: estimates by (divergence, estimator)."""
    x_p, x_q = pair.draw(n, seed)
    at_q, at_p = pair.log_densities(x_q), pair.log_densities(x_p)
    found: dict[tuple[str, str], Estimate] = {}
    for name in ("kl", "js", "pearson"):
        for method in ("plain", "control_variate", "self_normalized"):
            found[name, f"Monte Carlo, {method}"] = monte_carlo(name, *at_q, method=method)
        found[name, "Monte Carlo, two-sided"] = monte_carlo_two_sided(name, at_q, at_p)
    for term in ("k1", "k2", "k3"):
        found["reverse_kl", term] = kl_estimate(*at_q, term)
    found["kl", "nearest neighbors"] = kl_neighbors(x_p, x_q, seed=seed)
    single_p, single_q = x_p.float(), x_q.float()
    for name, bound in (
        ("kl", "donsker_varadhan"),
        ("kl", "nwj"),
        ("js", "js"),
        ("pearson", "chi_square"),
    ):
        label = "f-GAN bound" if bound == "js" else f"{bound} bound"
        found[name, label] = VariationalEstimator(bound, training=TRAINING).fit(single_p, single_q, seed)
    classified = classifier_estimates(
        single_p, single_q, ["kl", "js", "pearson"], seed=seed, training=TRAINING
    )
    for name, bound in classified.items():
        found[name, "classifier bound"] = bound
    return found


def short(x: float) -> str:
    return f"{x:.2g}" if abs(x) < 1e4 else f"{x:.0e}"


def cell(found: list[Estimate], truth: float) -> str:
    """Bias ± spread, and how many of the results warned."""
    values = [f.value for f in found]
    warned = sum(not f.reliable for f in found)
    spread = statistics.stdev(values) if all(math.isfinite(v) for v in values) else math.inf
    if math.isfinite(spread) and math.isinf(truth):
        text = f"finite: {short(statistics.fmean(values))} ± {short(spread)}"
    elif math.isfinite(spread):
        bias = statistics.fmean(values) - truth
        text = f"{'+' if bias >= 0 else '−'}{short(abs(bias))} ± {short(spread)}"
    else:
        text = "not finite"
    return text + (f" ⚠{warned}" if warned else "")


def table(title: str, pairs: list[Pair], o: Options) -> list[str]:
    results = {
        pair.d: [estimates(pair, o.n, 1000 * pair.d + seed) for seed in range(o.repetitions)]
        for pair in pairs
    }
    rows = [f"**{title}**", ""]
    rows += ["| divergence | estimator | " + " | ".join(f"d = {p.d}" for p in pairs) + " |"]
    rows += ["|---|---|" + "---|" * len(pairs)]
    for name in ("kl", "reverse_kl", "js", "pearson"):
        truths = {p.d: p.truth(name) for p in pairs}
        rows += [f"| {name} | *exact value* | " + " | ".join(f"*{truths[p.d]:.4g}*" for p in pairs) + " |"]
        for which, label in results[pairs[0].d][0]:
            if which == name:
                cells = (cell([r[which, label] for r in results[p.d]], truths[p.d]) for p in pairs)
                rows += [f"| {name} | {label} | " + " | ".join(cells) + " |"]
    print("\n".join(rows), flush=True)
    return [*rows, ""]


def main(o: Options) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = [
        f"n = {o.n} samples of p and of q, {o.repetitions} repetitions. Each cell: mean of the estimates "
        "less the exact value ± standard deviation of the estimates; ⚠k: k of them carried a warning.",
        "",
    ]
    rows += table("p shifted by 1", [Pair(d, 1.0, 1.0) for d in DIMENSIONS], o)
    rows += table("p wider than q", [widened(d) for d in DIMENSIONS], o)
    rows += table(
        "p shifted by 5: beyond what n samples can show", [Pair(d, 5.0, 1.0) for d in DIMENSIONS], o
    )
    print(f"{time.perf_counter() - began:.0f} s")
    if o.out is not None:
        replace_section(o.out, "bias", "\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
