"""Discrepancies against POT, geomloss, dcor and scikit-learn: time at equal inputs and result; peak memory.

    pip install POT geomloss dcor
    python benchmarks/discrepancies.py                        # everything, ten minutes on two cores
    python benchmarks/discrepancies.py --parts sliced --sizes 2000

All contenders of a quantity run in one process, on the same inputs, in turns; a figure is the median over the
rounds. An error is relative to a reference value: for Sinkhorn ours in float64 at a tolerance of 1e-8, which
the tests hold against both packages, otherwise the other package's. The last column divides a contender's
time by that of the fastest setting of ours whose error is no larger, or below 1e-6 (the rounding of float32).
With `--threads 1` times are those of the processor, which other processes disturb less.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from distmatch.discrepancies import (
    distance_covariance_loss,
    gaussian,
    gaussian_sinkhorn,
    mmd_loss,
    random_directions,
    sinkhorn_divergence,
    sinkhorn_estimate,
    sliced_wasserstein,
)
from distmatch.training.environment import peak_memory

Contenders = dict[str, Callable[[], float]]
Part = Literal["sinkhorn", "sliced", "dcov", "mmd", "memory", "coverage"]
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    parts: tuple[Part, ...] = ("sinkhorn", "sliced", "dcov", "mmd", "memory", "coverage")
    sizes: tuple[int, ...] = (2000, 10_000)
    rounds: int = 3
    threads: int = 0
    """CPU threads of torch; 0 leaves its choice."""
    d: int = 5
    """Dimension of the samples."""


@dataclass(frozen=True)
class Race:
    """Contenders for one quantity on one input."""

    title: str
    reference: float
    contenders: Contenders


def samples(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (0.7 * y + 0.5).to(dtype)


def pot_sinkhorn(x: np.ndarray, y: np.ndarray, eps: float, tol: float) -> float:
    """POT's fastest solver, which is not stabilized; a tolerance in L1 is about tol / sqrt n in its L2."""
    import ot

    def one(u: np.ndarray, v: np.ndarray) -> float:
        a, b = (np.full(len(z), 1 / len(z), z.dtype) for z in (u, v))
        cost = ot.dist(u, v) / 2
        _, log = ot.sinkhorn(
            a, b, cost, eps, method="sinkhorn", stopThr=tol / math.sqrt(len(u)), numItermax=5000, log=True
        )
        return eps * float(a @ np.log(log["u"] / a) + b @ np.log(log["v"] / b))

    return one(x, y) - one(x, x) / 2 - one(y, y) / 2


def sinkhorn_races(options: Options) -> Iterator[Race]:
    import ot  # noqa: F401  (so that no contender pays for the import)
    from geomloss import SamplesLoss

    for n in options.sizes:
        wide = samples(n, options.d, torch.float64)
        exact = sinkhorn_divergence(*wide, tol=1e-8)
        eps = exact.epsilon
        for dtype in (torch.float32, torch.float64):
            x, y = samples(n, options.d, dtype)

            def ours(tol: float, x: Tensor = x, y: Tensor = y, eps: float = eps) -> float:
                return float(sinkhorn_divergence(x, y, epsilon=eps, tol=tol).value)

            def lossy(scaling: float, x: Tensor = x, y: Tensor = y, eps: float = eps) -> float:
                loss = SamplesLoss(
                    "sinkhorn", p=2, blur=math.sqrt(eps), scaling=scaling, backend="tensorized"
                )
                with torch.no_grad():
                    return float(loss(x, y))

            def pot(tol: float, x: Tensor = x, y: Tensor = y, eps: float = eps) -> float:
                return pot_sinkhorn(x.numpy(), y.numpy(), eps, tol)

            # Settings that take minutes, and geomloss in float64 (six matrices), only run on the small size.
            small = n <= 5000
            tols, scalings = (1e-1, 1e-2, 1e-5), (0.5, 0.9) if small else (0.5,)
            contenders: Contenders = {f"distmatch, tol {t:g}": partial(ours, t) for t in tols}
            if small or dtype == torch.float32:
                contenders |= {f"geomloss, scaling {s:g}": partial(lossy, s) for s in scalings}
            if small or dtype == torch.float64:
                contenders |= {
                    f"POT, tol {t:g}": partial(pot, t) for t in ((1e-2, 1e-5) if small else (1e-2,))
                }
            yield Race(f"Sinkhorn divergence, {name(dtype)}, n = {n}", float(exact.value), contenders)


def sliced_races(options: Options) -> Iterator[Race]:
    import ot

    for n in options.sizes:
        for title, m, weighted in (
            ("", n, False),
            (", m = 0.8 n", n * 4 // 5, False),
            (", weights", n, True),
        ):
            x, y = samples(n, options.d, torch.float64)
            y = y[:m]
            a, b = (torch.arange(1.0, len(z) + 1, dtype=torch.float64) for z in (x, y))
            given: dict[str, Any] = {"a": a / a.sum(), "b": b / b.sum()} if weighted else {}
            rows = random_directions(options.d, 100, generator=torch.Generator().manual_seed(1))
            arrays = {k: v.numpy() for k, v in given.items()}

            def ours(x: Tensor = x, y: Tensor = y, rows: Tensor = rows, given: Any = given) -> float:
                return sliced_wasserstein(x, y, directions=rows, **given).value

            def pot(x: Tensor = x, y: Tensor = y, rows: Tensor = rows, given: Any = arrays) -> float:
                value = ot.sliced_wasserstein_distance(
                    x.numpy(), y.numpy(), projections=rows.T.numpy(), p=2, **given
                )
                return float(value)

            yield Race(
                f"sliced W2, 100 directions, float64, n = {n}{title}", pot(), {"distmatch": ours, "POT": pot}
            )


def dcov_races(options: Options) -> Iterator[Race]:
    import dcor

    for n in options.sizes:
        for d in (1, options.d):
            x, noise = samples(n, d, torch.float64)
            y = x.square() + noise

            def ours(x: Tensor = x, y: Tensor = y) -> float:
                return float(distance_covariance_loss(x, y))

            def theirs(x: Tensor = x, y: Tensor = y) -> float:
                return float(dcor.u_distance_covariance_sqr(x.numpy(), y.numpy()))

            theirs()  # compiled on the first call
            yield Race(
                f"distance covariance, float64, d = {d}, n = {n}",
                theirs(),
                {"distmatch": ours, "dcor": theirs},
            )


def mmd_races(options: Options) -> Iterator[Race]:
    from sklearn.metrics.pairwise import rbf_kernel

    for n in options.sizes:
        x, y = samples(n, options.d, torch.float64)

        def ours(x: Tensor = x, y: Tensor = y) -> float:
            return float(mmd_loss(x, y, gaussian(1.5), estimator="biased"))

        def theirs(x: Tensor = x, y: Tensor = y) -> float:
            u, v = x.numpy(), y.numpy()
            gamma = 1 / (2 * 1.5**2)
            within = rbf_kernel(u, u, gamma).mean() + rbf_kernel(v, v, gamma).mean()
            return float(within - 2 * rbf_kernel(u, v, gamma).mean())

        yield Race(
            f"MMD^2, Gaussian kernel, float64, n = {n}", theirs(), {"distmatch": ours, "scikit-learn": theirs}
        )


RACES: dict[str, Callable[[Options], Iterator[Race]]] = {
    "sinkhorn": sinkhorn_races,
    "sliced": sliced_races,
    "dcov": dcov_races,
    "mmd": mmd_races,
}

MEMORY = """
import time, torch
from distmatch.discrepancies import mmd, sinkhorn_divergence
from distmatch.training.environment import peak_memory
x, y = torch.randn({n}, 5), torch.randn({n}, 5) + 0.5
before, began = peak_memory()["cpu"], time.perf_counter()
{call}
print(peak_memory()["cpu"], before, time.perf_counter() - began)
"""


def memory_rows() -> Iterator[str]:
    """Peak resident memory of fresh processes."""
    yield "\n| quantity | n = m | peak memory | of which before the call | seconds |\n|---|---|---|---|---|"
    for title, n, call in (
        ("MMD^2 with its error bar", 50_000, "mmd(x, y, 'gaussian')"),
        (
            "OT_eps, one iteration after cooling",
            50_000,
            "sinkhorn_divergence(x, y, debias=False, max_iter=1)",
        ),
    ):
        code = MEMORY.format(n=n, call=call)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        peak, before, seconds = (float(word) for word in out.split())
        yield f"| {title} | {n} | {peak / 2**20:.0f} MiB | {before / 2**20:.0f} MiB | {seconds:.1f} |"


COVERAGE = ((1, 200, 0.05), (2, 200, 0.05), (2, 500, 0.05), (10, 200, 0.05), (10, 200, 0.5), (10, 200, 2.0))
"""Dimension, samples, epsilon relative to the total variance."""


def coverage_rows(repetitions: int = 200) -> Iterator[str]:
    """How often the 95% interval of the Sinkhorn divergence covers the closed form between two Gaussians."""
    yield (
        "\n| d | n | epsilon / total variance | true value | remaining bias | standard deviation | mean "
        "standard error | warned | coverage of the others |\n|" + "---|" * 9
    )
    for d, n, share in COVERAGE:
        shift = torch.full((d,), 1 / math.sqrt(d))
        eps = share * d * 1.2
        truth = float(gaussian_sinkhorn(torch.zeros(d), torch.eye(d), shift, 0.49 * torch.eye(d), eps))
        found = []
        for seed in range(repetitions):
            generator = torch.Generator().manual_seed(seed)
            x, y = torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)
            found.append(sinkhorn_estimate(x, 0.7 * y + shift, epsilon=eps, tol=1e-2))
        values, bars = (torch.tensor([getattr(e, k) for e in found]).double() for k in ("value", "stderr"))
        hits = ((values - truth).abs() <= 1.96 * bars).double()
        claimed = torch.tensor([e.reliable for e in found])
        covered = f"{hits[claimed].mean():.1%}" if claimed.any() else "–"
        yield (
            f"| {d} | {n} | {share:g} | {truth:.4f} | {values.mean() - truth:+.4f} | {values.std():.4f} "
            f"| {bars.mean():.4f} | {1 - claimed.double().mean():.0%} | {covered} |"
        )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(race: Race, rounds: int, threads: int) -> Iterator[str]:
    """The lines of one race."""
    clock = time.process_time if threads == 1 else time.perf_counter
    if threads:
        torch.set_num_threads(threads)  # again: importing numba, as dcor does, puts torch back to all cores
    seconds: dict[str, list[float]] = {who: [] for who in race.contenders}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for who, call in race.contenders.items():
            began = clock()
            value = call()
            seconds[who].append(clock() - began)
            errors[who] = abs(value - race.reference) / abs(race.reference)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    for who, median in medians.items():
        ratio = ""
        if not who.startswith("distmatch"):
            allowed = max(errors[who], NEGLIGIBLE)
            ours = [t for w, t in medians.items() if w.startswith("distmatch") and errors[w] <= allowed]
            ratio = f"{median / min(ours):.1f}" if ours else "none as exact"
        yield f"| {race.title} | {who} | {median:.3g} | {errors[who]:.0e} | {ratio} |"


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="ot")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds\n"
    )
    # First of all: the peak of a fresh process begins at that of the one that started it.
    for line in memory_rows() if "memory" in options.parts else ():
        print(line, flush=True)
    if any(part in RACES for part in options.parts):
        print("\n| quantity | contender | seconds | relative error | time over ours |\n|---|---|---|---|---|")
    for part in options.parts:
        for race in RACES[part](options) if part in RACES else ():
            for line in run(race, options.rounds, options.threads):
                print(line, flush=True)
    for line in coverage_rows() if "coverage" in options.parts else ():
        print(line, flush=True)
    print(f"\nThis process peaked at {(peak_memory()['cpu'] or 0) / 2**30:.1f} GiB.")
    print("Repeat: `python benchmarks/discrepancies.py " + " ".join(sys.argv[1:]) + "`")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
