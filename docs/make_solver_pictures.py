"""Draws the pictures of docs/solvers-and-guidance.md into docs/pictures/.

Run it from the root of the repository: ``python docs/make_solver_pictures.py --teacher runs/digits``, with a
teacher from ``distmatch train --data digits --steps 1500 --out runs/digits``. Half a minute. The plot of
quality against calls is drawn by ``benchmarks/quality_against_calls.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from distmatch.diffusion.guidance import guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, sample_teacher, solve
from distmatch.report import image_grid
from distmatch.training.models import open_model
from distmatch.training.sampling import Sampling

# The palette of Okabe and Ito, which color-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "distmatch", "font.size": 9, "axes.titlesize": 9}

LINE = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.01, 0.03])
LOW, HIGH = 0.002, 20.0
CALLS = 9
COMPARED = {"ddim": 9, "heun": 5, "dpmpp-2m": 9, "tab:3": 9}  # solver: steps that cost nine calls

# Two classes of three blobs each, which touch where their rows meet; and the same seen by a weaker model.
BLOBS = [[-1.2, 0.45], [0.0, 0.3], [1.2, 0.45], [-1.2, -0.45], [0.0, -0.3], [1.2, -0.45]]
CLASSES = [0, 0, 0, 1, 1, 1]
SHARES = [0.2, 0.15, 0.15] * 2
PLANE = GaussianMixture(SHARES, BLOBS, [0.05] * 6, classes=CLASSES)
WEAK = GaussianMixture(SHARES, BLOBS, [0.12] * 6, classes=CLASSES)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw from and where to."""

    teacher: str = ""
    """A teacher of digits; empty leaves its picture out."""
    out: Path = Path("docs/pictures")
    """Folder of the pictures."""


def paths_of(solver: str, steps: int, start: Tensor) -> tuple[Tensor, Tensor, int]:
    """Levels, states at the levels and calls of a solve on the line, from ``start`` (B, 1)."""
    levels = grid("karras", steps, LOW, HIGH)
    done = solve(LINE, start, levels, solver, path="vp", trajectory=True)
    if done.trajectory is None:
        raise RuntimeError("a trajectory was asked for")
    return levels, done.trajectory[..., 0], done.calls


def trajectories(file: Path) -> None:
    """Nine calls of four solvers on one mixture, over the solution."""
    start = HIGH * torch.linspace(-1.8, 1.8, 11, dtype=torch.float64)[:, None]
    fine, exact, _ = paths_of("rhork:rk4", 400, start)
    figure, axes = plt.subplots(1, 4, figsize=(8.4, 2.6), sharey=True, constrained_layout=True)
    for ax, (solver, steps) in zip(axes, COMPARED.items(), strict=True):
        levels, states, calls = paths_of(solver, steps, start)
        _draw_paths(ax, fine, exact, "#bbbbbb", None)
        _draw_paths(ax, levels, states, BLUE, ".")
        error = (states[-1] - exact[-1]).abs().mean()
        ax.set(title=f"{solver}, {calls} calls\nmean error {error:.3f}", xscale="log", xlabel="noise level")
        ax.invert_xaxis()
        ax.set_xticks([10, 0.1, 0.001], ["10", "0.1", "0"])
        ax.minorticks_off()
    axes[0].set_ylabel("y / sqrt(1 + sigma²)")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _draw_paths(ax: Axes, levels: Tensor, states: Tensor, color: str, marker: str | None) -> None:
    """States at unit scale; level 0 is drawn at 0.001."""
    scaled = states / (1 + levels**2).sqrt()[:, None]
    step = slice(None) if marker else slice(0, None, 16)
    x = levels.clamp_min(0.001)[step]
    ax.plot(x, scaled[step], color=color, lw=1.6 if marker is None else 0.8, marker=marker, ms=4)


def guidance(file: Path) -> None:
    """Samples of one class by scale, in an interval, and guided by a weaker model."""
    n = 500
    labels = torch.zeros(n, dtype=torch.int64)
    cases = {
        "w = 1": guided(PLANE, 1.0),
        "w = 2": guided(PLANE, 2.0),
        "w = 5": guided(PLANE, 5.0),
        "w = 5 for 0.1 < σ ≤ 0.5": guided(PLANE, 5.0, interval=(0.1, 0.5)),
        "w = 2 from a weaker model": guided(PLANE, 2.0, reference=WEAK),
    }
    span = torch.linspace(-2.2, 2.2, 120)
    xx, yy = torch.meshgrid(span, span[20:-20] * 0.75, indexing="xy")
    places = torch.stack([xx, yy], dim=-1).reshape(-1, 2)
    figure, axes = plt.subplots(1, 5, figsize=(10.5, 2.2), sharex=True, sharey=True, constrained_layout=True)
    for ax, (title, denoiser) in zip(axes, cases.items(), strict=True):
        x = sample_teacher(denoiser, n, steps=30, conditioning=labels, seed=0)
        for label, color in ((1, VERMILION), (0, BLUE)):
            which = torch.full((len(places),), label)
            density = PLANE.log_prob(places, 1e-3, which).exp().reshape(xx.shape)
            ax.contour(xx, yy, density, levels=[0.02, 0.1, 0.3], colors=color, linewidths=0.6, alpha=0.6)
        ax.plot(x[:, 0], x[:, 1], ".", color=BLUE, ms=1.6, mew=0)
        right = PLANE.log_prob(x, 1e-3, labels) > PLANE.log_prob(x, 1e-3, 1 - labels)
        ax.set_title(f"{title}\n{right.double().mean():.0%} nearer to its class", fontsize=8)
        ax.set(xticks=[], yticks=[], xlim=(-2.1, 2.1), ylim=(-1.1, 1.1))
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def digits(file: Path, teacher: str) -> None:
    """The same latents and labels, drawn in several ways from one teacher."""
    model = open_model(teacher)
    labels = torch.arange(20) % 10
    cases = {
        "Heun, 35 calls": Sampling(),
        "Heun, 9 calls": Sampling(steps=5),
        "ddim, 9 calls": Sampling(solver="ddim", steps=9),
        "dpmpp-2m, 9 calls": Sampling(solver="dpmpp-2m", steps=9),
        "w = 3, 70 calls": Sampling(guidance=3.0),
        "w = 3, 0.2 < σ ≤ 2": Sampling(guidance=3.0, interval=(0.2, 2.0)),
        "w = 8, 70 calls": Sampling(guidance=8.0),
    }
    figure, axes = plt.subplots(len(cases), 1, figsize=(6.4, 3.2), constrained_layout=True)
    for ax, (title, how) in zip(axes, cases.items(), strict=True):
        drawn = model.draw(20, labels, 1, how, quiet=True)
        ax.imshow(np.asarray(image_grid(model.scaling.export(drawn.x), 20).convert("RGB")))
        ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_visible(False)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(o: Options) -> None:
    """Draws all pictures."""
    plt.rcParams.update(STYLE)
    o.out.mkdir(parents=True, exist_ok=True)
    trajectories(o.out / "solver-paths.svg")
    guidance(o.out / "guidance-plane.png")
    if o.teacher:
        digits(o.out / "solver-digits.png", o.teacher)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
