"""Every method on exact teachers: how far the student's share of each mode is from the truth.

    python benchmarks/methods_on_toys.py --results toys.jsonl --out docs/methods.md
    python benchmarks/methods_on_toys.py --methods sid rcm --toys ring8 --seeds 1
    python benchmarks/methods_on_toys.py --methods scm rcm "rcm[dmd_weight=0]"

Every method runs with its own default settings, the same number of steps of the same batch, and the same
small network, fitted to the teacher first. KL is that of the smoothed histogram over modes, teacher against
student, in nats. `high quality` is the share of samples within three standard deviations of a mode. A run
that fails is a row of the table, with its reason. Results are kept line by line in `--results`: a second
start goes on where the first was stopped.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from sections import replace_section

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import toy
from distmatch.methods.table import METHODS
from distmatch.metrics.modes import mode_counts
from distmatch.training.comparison.options import parse_methods


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    methods: tuple[str, ...] = ()
    """Methods as for `distmatch compare`, with a divergence or settings; empty takes all."""
    toys: tuple[str, ...] = ("ring8", "grid25")
    seeds: int = 2
    steps: int = 1200
    batch: int = 256
    width: int = 64
    depth: int = 3
    fit_steps: int = 600
    """Steps that fit the first network to the teacher."""
    n: int = 20_000
    """Samples for the histogram."""
    results: Path = Path("methods_on_toys.jsonl")
    out: Path | None = None
    """A page whose section `toys` gets the table."""


def choices(o: Options) -> list[str]:
    """The methods to run; those that take any divergence run with three of them."""
    if o.methods:
        return list(o.methods)
    found: list[str] = []
    for method in METHODS.values():
        several = method.divergences == "any" and method.name in ("f-distill", "uni-instruct")
        found += (
            [f"{method.name}:{name}" for name in ("reverse_kl", "js", "kl")] if several else [method.name]
        )
    return found


def measure(choice: str, name: str, seed: int, o: Options) -> dict[str, Any]:
    """One run and what came of it."""
    (entry,) = parse_methods(choice)
    mixture = toy(name)
    key = {"method": choice, "toy": name, "seed": seed, "steps": o.steps, "batch": o.batch}
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = dm.distill(
                mixture,
                method=entry.method,
                divergence=entry.divergence,
                steps=o.steps,
                batch=o.batch,
                seed=seed,
                net="mlp",
                width=o.width,
                depth=o.depth,
                fit_steps=o.fit_steps,
                quiet=True,
                **entry.settings,
            )
        x = student.sample(o.n, seed=1000 + seed)
        seconds = time.process_time() - began
        if not bool(torch.isfinite(x).all()):
            return {**key, "failed": "samples are not finite"}
        report = mode_counts(x, mixture)
    except UserError as error:
        return {**key, "failed": str(error).splitlines()[0]}
    return {
        **key,
        "kl": report.kl.value,
        "modes": report.modes.value,
        "of": len(mixture.weights),
        "high_quality": report.high_quality.value,
        "nfe": student.nfe,
        "seconds": seconds,
    }


def mean_of(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    """Mean over the seeds, with its standard error where there are several."""
    values = [float(row[key]) for row in rows]
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


def table(rows: list[dict[str, Any]], o: Options) -> str:
    """Markdown: a row a method, the columns of each toy."""
    seeds = f"{o.seeds} seeds, mean ± error" if o.seeds > 1 else "seed 0"
    how = f"{o.steps} steps of {o.batch}, {seeds}"
    lines = [f"`python benchmarks/methods_on_toys.py`: MLP of {o.depth} blocks of {o.width}, {how}."]
    for name in o.toys:
        lines += ["", f"**{name}**", "", "| method | KL of modes | modes | high quality | calls | seconds |"]
        lines.append("|---|---|---|---|---|---|")
        for choice in choices(o):
            own = [r for r in rows if r["method"] == choice and r["toy"] == name]
            good = [r for r in own if "failed" not in r]
            if not own:
                continue
            if not good:
                lines.append(f"| `{choice}` | failed: {own[0]['failed']} | | | | |")
                continue
            lost = f" ({len(own) - len(good)} failed)" if len(good) < len(own) else ""
            cells = [mean_of(good, "kl", 3), f"{mean_of(good, 'modes', 1)} of {good[0]['of']}"]
            cells += [mean_of(good, "high_quality", 3), str(good[0]["nfe"])]
            cells.append(f"{statistics.mean(r['seconds'] for r in good):.0f}")
            lines.append(f"| `{choice}`{lost} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table, writes it."""
    o = tyro.cli(Options)
    kept = [json.loads(line) for line in o.results.read_text().splitlines()] if o.results.exists() else []
    same = [r for r in kept if (r["steps"], r["batch"]) == (o.steps, o.batch)]
    done = {(r["method"], r["toy"], r["seed"]) for r in same}
    for seed in range(o.seeds):
        for name in o.toys:
            for choice in choices(o):
                if (choice, name, seed) in done:
                    continue
                row = measure(choice, name, seed, o)
                same.append(row)
                with o.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    text = table([r for r in same if r["seed"] < o.seeds], o)
    print(text)
    if o.out is not None:
        replace_section(o.out, "toys", text)


if __name__ == "__main__":
    main()
