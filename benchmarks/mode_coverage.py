"""Which divergences find all modes? Exact teachers, exact score and exact ratio of the student, five seeds.

    python benchmarks/mode_coverage.py --out docs/coverage.md

The student is a mixture of isotropic Gaussians with learned means and widths and equal weights, sampled by
x0 = mean_k + width_k z. So its noised density, score and ratio to the teacher are closed forms: no fake score
and no discriminator stand between divergence and result; `score_difference` is the
library's own. It is too small for the teacher and starts as one blob off the center, so that it must choose.
All runs of a table are the same but for divergence and seed. A mode counts as covered when it gets at least
a quarter, or half, of its true share of the samples.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.data import toy
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.divergences import Divergence, divergence
from distmatch.losses import score_difference
from distmatch.metrics.modes import mode_counts

# Components of the student, and the largest noise level: about half the distance between neighboring modes.
CASES = {"skewed2": (2, 0.6), "grid25": (10, 0.25)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    toys: tuple[str, ...] = ("skewed2", "grid25")
    divergences: tuple[str, ...] = ("reverse_kl", "js", "kl")
    seeds: int = 5
    steps: int = 2000
    batch: int = 256
    lr: float = 3e-2
    noise_low: float = 0.02
    n: int = 20_000
    """Samples for the histogram."""
    out: Path | None = None
    """A Markdown file to write the tables to."""


def train(
    teacher: GaussianMixture, measure: Divergence, case: tuple[int, float], seed: int, o: Options
) -> Tensor:
    """Distils one student; returns ``o.n`` samples of it."""
    components, highest = case
    gen = generator(seed, "coverage")
    dims = teacher.shape[0]
    center = 0.3 * torch.randn(dims, generator=gen)
    means = (center + 0.1 * torch.randn(components, dims, generator=gen)).requires_grad_()
    log_widths = torch.full((components,), -1.5).requires_grad_()
    optimizer = torch.optim.Adam([means, log_widths], lr=o.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.steps)
    noise = Karras(o.noise_low, highest)
    equal = torch.full((components,), 1 / components)
    for _ in range(o.steps):
        k = torch.arange(o.batch) % components
        x0 = means[k] + log_widths[k, None].exp() * torch.randn(o.batch, dims, generator=gen)
        sigma = noise.sample(o.batch, gen)
        with torch.no_grad():
            x = x0 + sigma[:, None] * torch.randn(o.batch, dims, generator=gen)
            student = GaussianMixture(equal, means.detach(), (2 * log_widths.detach()).exp())
            log_r = (teacher.log_prob(x, sigma) - student.log_prob(x, sigma)).clamp(-5, 5)
            weight = measure.weight(log_r)
            weight = weight / weight.mean()
            g = score_difference(teacher(x, sigma), student(x, sigma), x0, sigma, weight)
        optimizer.zero_grad()
        x0.backward(g / g.numel())
        optimizer.step()
        schedule.step()
    final = GaussianMixture(equal, means.detach(), (2 * log_widths.detach()).exp())
    return final.sample(o.n, seed=seed)


def row(name: str, measure: str, o: Options) -> tuple[str, list[str]]:
    """A table row: means over the seeds ± standard errors."""
    teacher = toy(name)
    began = time.perf_counter()
    found: dict[str, list[float]] = {
        "quarter": [],
        "half": [],
        "kl": [],
        "reverse_kl": [],
        "high_quality": [],
    }
    for seed in range(o.seeds):
        x = train(teacher, divergence(measure), CASES[name], seed, o)
        report = mode_counts(x, teacher)
        share = report.histogram / report.histogram.sum()
        for part, least in (("quarter", 0.25), ("half", 0.5)):
            found[part].append(float((share >= least * teacher.weights).sum()))
        for key in ("kl", "reverse_kl", "high_quality"):
            found[key].append(getattr(report, key).value)
    cells = []
    for values in found.values():
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
    print(name, measure, cells, f"{time.perf_counter() - began:.0f} s", flush=True)
    return measure, cells


def main() -> None:
    """Runs all and writes the tables."""
    o = tyro.cli(Options)
    lines = []
    for name in o.toys:
        components, highest = CASES[name]
        modes = f"{len(toy(name).weights)} modes"
        lines += ["", f"**{name}** ({modes}), student of {components} components, noise up to {highest}", ""]
        lines += ["| divergence | modes ≥ ¼ share | modes ≥ ½ share | KL(p‖q) | KL(q‖p) | within 3σ |"]
        lines += ["|---|---|---|---|---|---|"]
        for measure in o.divergences:
            label, cells = row(name, measure, o)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    text = "\n".join(lines).strip() + "\n"
    print(text)
    if o.out is not None:
        page = o.out.read_text() if o.out.exists() else ""
        head = page.split("<!-- tables -->")[0].rstrip()
        o.out.write_text(f"{head}\n\n<!-- tables -->\n\n{text}" if head else text)


if __name__ == "__main__":
    main()
