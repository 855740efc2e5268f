"""What does the Fokker-Planck residual in a teacher's loss do to samples of ODE and SDE solvers?

    python benchmarks/fokker_planck.py

Teachers of ``skewed2`` by a small MLP with 0, 0.1 and 1 times the residual (``--fokker-planck``), the same
otherwise. Their residual, and the energy distances between samples of the probability flow ODE, of the SDE,
and of the data.

The claim (arXiv 2311.15996): the residual bounds the distance between ODE and SDE. Training with it brings
them together, and samples of the SDE can become worse.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

import distmatch as dm
from distmatch.data import toy
from distmatch.diffusion.geometry.fokker_planck import score_residual
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve
from distmatch.discrepancies import energy_distance


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    weights: tuple[float, ...] = (0.0, 0.1, 1.0)
    seeds: int = 3
    steps: int = 1500
    batch: int = 128
    n: int = 4000
    calls: int = 100


def measure(weight: float, seed: int, o: Options) -> dict[str, float]:
    """One teacher."""
    mixture, began = toy("skewed2"), time.process_time()
    settings = {"net": "mlp", "width": 64, "depth": 2, "batch": o.batch, "noise_mean": -0.7}
    teacher = dm.train("skewed2", steps=o.steps, seed=seed, fokker_planck=weight, quiet=True, **settings)
    seconds = (time.process_time() - began) / o.steps
    gen = torch.Generator().manual_seed(seed)
    sigma = torch.exp(-0.7 + 1.2 * torch.randn(1000, generator=gen))
    y = mixture.sample(1000, seed=seed) + sigma[:, None] * torch.randn(1000, 2, generator=gen)
    residual = score_residual(teacher, y, sigma).residual[0]
    start = 80.0 * torch.randn(o.n, 2, generator=gen)
    levels = grid("karras", o.calls, 0.002, 80.0)
    ode = solve(teacher, start, levels, "heun").y
    sde = solve(teacher, start, levels, "ddim:1", noise=SampleNoise(seed, torch.arange(o.n), (2,), "cpu")).y
    truth = mixture.sample(o.n, seed=100 + seed)

    def apart(a: Tensor, b: Tensor) -> float:
        return float(energy_distance(a, b).value)

    return {
        "residual": float((sigma[:, None].double() ** 2 * residual).square().mean()),
        "ODE to SDE": apart(ode, sde),
        "ODE to data": apart(ode, truth),
        "SDE to data": apart(sde, truth),
        "ms a step": 1e3 * seconds,
    }


def main(o: Options) -> None:
    torch.set_num_threads(1)
    rows: dict[float, list[dict[str, float]]] = {weight: [] for weight in o.weights}
    for seed in range(o.seeds):
        for weight in o.weights:
            rows[weight].append(measure(weight, seed, o))
    names = list(next(iter(rows.values()))[0])
    print("| weight | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for weight, found in rows.items():
        cells = []
        for name in names:
            values = [row[name] for row in found]
            cells.append(
                f"{statistics.mean(values):.2g} ± {statistics.stdev(values) / len(values) ** 0.5:.1g}"
            )
        print(f"| {weight:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options))
