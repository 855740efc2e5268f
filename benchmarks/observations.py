"""Can digits be learned from observations alone, and how near does that come to training on clean ones?

    python benchmarks/observations.py

Class-conditional teachers of the digits, the same but for what they are trained on: the clean digits; digits
of which half of the pixels are hidden, others in each; digits that are blurred and noisy. Observations are
either completed by the model itself (``--observe``), or taken as if they were the data ("naive": hidden
pixels are grey). Samples of each are compared with the clean digits.

Stated beforehand: the naive teachers sample observations, and not digits. Completed observations come near
the clean digits, but stay behind them: half of the pixels are gone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib import pyplot as plt
from torch import Tensor

import distmatch as dm
from distmatch.data import Dataset, load_data
from distmatch.diffusion.solvers import sample_teacher
from distmatch.training.observations import observe
from distmatch.training.options import TeacherConfig

CASES: dict[str, dict[str, Any]] = {
    "half hidden": {"observe": "mask:0.5"},
    "blurred, noisy": {"observe": "blur:0.6", "observe_noise": 0.1},
}
SAID = ("fd", "coverage", "label_accuracy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    seeds: int = 1
    steps: int = 1500
    every: int = 300
    batch: int = 128
    width: int = 256
    depth: int = 3
    picture: Path | None = None
    """Where to write a picture of observations and samples."""


def measure(
    data: Dataset, clean: Dataset, seed: int, o: Options, **how: Any
) -> tuple[Tensor, dict[str, float]]:
    """Samples of a teacher, one for each digit, and what they are worth."""
    began = time.process_time()
    settings = {"net": "mlp", "width": o.width, "depth": o.depth, "batch": o.batch, "ema_half_life": 50.0}
    teacher: Any = dm.train(data, steps=o.steps, seed=seed, quiet=True, device="cpu", **settings, **how)
    seconds = time.process_time() - began
    x = sample_teacher(teacher, len(clean), conditioning=clean.labels, seed=seed)
    found = dm.evaluate(x, clean, labels=clean.labels)
    return x, {**{name: float(found[name].value) for name in SAID}, "s": seconds}


def _cell(values: list[float]) -> str:
    mean = statistics.mean(values)
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1g}" if len(values) > 1 else ""
    return f"{mean:.3g}{error}"


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """Two of each class, observations and samples, a row each."""
    figure, rows = plt.subplots(len(pictures), 1, figsize=(9, 0.62 * len(pictures)))
    for axes, (name, x) in zip(rows, sorted(pictures.items()), strict=True):
        axes.imshow(x[:, 0].clamp(-1, 1).permute(1, 0, 2).reshape(8, -1), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(name, x=-0.01, y=0.2, ha="right", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(o: Options) -> None:
    torch.set_num_threads(1)
    clean = load_data("digits")
    labels: Any = clean.labels
    first = torch.cat([(labels == k).nonzero()[:2, 0] for k in range(10)])
    rows: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, Tensor] = {}
    for seed in range(o.seeds):
        shown = {name: observe(clean, TeacherConfig(**how), seed)[0] for name, how in CASES.items()}
        todo: dict[str, tuple[Dataset, dict[str, Any]]] = {"clean digits": (clean, {})}
        for name, how in CASES.items():
            todo[f"{name}: completed"] = (clean, {**how, "observe_every": o.every})
            todo[f"{name}: naive"] = (shown[name], {})
        for name, (data, how) in todo.items():
            x, found = measure(data, clean, seed, o, **how)
            rows.setdefault(name, []).append(found)
            pictures.setdefault(name, x[first])
            print(seed, name, {key: round(value, 3) for key, value in found.items()}, flush=True)
        for name, data in shown.items():
            pictures.setdefault(f"{name}: seen", data.batch(first)[0])
    print("| trained on | " + " | ".join((*SAID, "s")) + " |\n" + "|---" * (len(SAID) + 2) + "|")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(_cell([row[key] for row in found]) for key in (*SAID, "s")) + " |")
    if o.picture is not None:
        draw(pictures, o.picture)


if __name__ == "__main__":
    main(tyro.cli(Options))
