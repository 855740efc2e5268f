"""How far do metrics move when the feature classifier is trained on other processors, and with other seeds?

    python benchmarks/feature_classifier.py
    python benchmarks/feature_classifier.py --data fashion.npz --n 1000

Each classifier is trained in a process of its own, without a cache, and measures the floor and a fixed set
of samples: real ones with noise. The second column is the largest difference of any metric to the first row,
in stated errors. The last rows have other random numbers: their spread is what no stated error includes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

import torch
import tyro

from distmatch.base import seeds
from distmatch.data import load_data
from distmatch.metrics import evaluate, reference_floor, resolve_features

# What torch, oneDNN, MKL and OpenMP read when they start.
MACHINES = {
    "one thread": {},
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "kernels without AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL for any processor": {"MKL_CBWR": "COMPATIBLE"},
}
SHOWN = ("fd", "recall", "vendi")
Figures = dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    data: str = "digits"
    """Labeled data."""
    n: int = 5000
    """Samples in a block, at most."""
    seeds: int = 6
    """Classifiers of other random numbers."""
    child: int = -1
    """Internal: train with these random numbers and print the figures."""


def main() -> None:
    """Trains, measures and prints a row for each classifier."""
    o = tyro.cli(Options)
    if o.child >= 0:
        print(json.dumps(_figures(o)))
        return
    print(
        "| classifier | largest difference, stated errors | " + " | ".join(f"floor {s}" for s in SHOWN) + " |"
    )
    print("|---|---|" + "---|" * len(SHOWN), flush=True)
    runs = [(name, 0, {"OMP_NUM_THREADS": "1", **env}) for name, env in MACHINES.items()]
    runs += [(f"seed {s}", s, {"OMP_NUM_THREADS": "1"}) for s in range(1, o.seeds)]
    first: Figures = {}
    by_seed: list[Figures] = []
    for name, seed, env in runs:
        found = _in_a_process(o, seed, env)
        first = first or found
        if seed or not by_seed:
            by_seed.append(found)
        moved = max(
            abs(value - first[key][0]) / error if (error := first[key][1]) else float(value != first[key][0])
            for key, (value, _) in found.items()
        )
        shown = (f"{value:.4f} ± {error:.4f}" for value, error in (found[f"floor {s}"] for s in SHOWN))
        print(f"| {name} | {moved:.2g} | {' | '.join(shown)} |", flush=True)
    for s in SHOWN:
        spread = statistics.stdev(found[f"floor {s}"][0] for found in by_seed)
        errors = spread / first[f"floor {s}"][1]
        print(f"spread of {s} over {len(by_seed)} seeds: {spread:.4f}, {errors:.1f} errors")


def _in_a_process(o: Options, seed: int, env: dict[str, str]) -> Figures:
    command = [sys.executable, __file__, "--data", o.data, "--n", str(o.n), "--child", str(seed)]
    with tempfile.TemporaryDirectory() as cache:
        given = {**os.environ, **env, "DISTMATCH_CACHE": cache}
        done = subprocess.run(command, env=given, check=True, stdout=subprocess.PIPE, text=True)
    return {key: (value, error) for key, (value, error) in json.loads(done.stdout).items()}


def _figures(o: Options) -> Figures:
    data = load_data(o.data)
    plain = seeds.stream_seed

    def other(seed: int, name: str) -> int:
        return plain(seed + o.child * name.startswith("classifier/"), name)

    with mock.patch.object(seeds, "stream_seed", other):
        space = resolve_features("classifier", data)
    x, labels = data.batch(torch.arange(min(len(data), 4 * o.n)))
    x = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    measured = {
        "floor": reference_floor(data, features=space, n=o.n),
        "noisy": evaluate(x, data, labels=labels, features=space, n=o.n),
    }
    return {f"{who} {k}": (e.value, e.stderr) for who, found in measured.items() for k, e in found.items()}


if __name__ == "__main__":
    main()
