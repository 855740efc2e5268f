"""Draws the pictures of docs/divergence-gallery.md into docs/pictures/ and prints its table.

Run it from the root of the repository: ``python docs/make_divergence_pictures.py [FOLDER]``. Ten seconds.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy.optimize import minimize
from torch import Tensor

from distmatch.divergences import divergence, divergence_1d

FAMILIES = {
    "kl": ["reverse_kl", "jeffreys", "kl"],
    "bounded": ["tv", "hellinger", "le_cam", "js"],
    "generalized-js": ["gjs:0.1", "js", "gjs:0.9"],
    "softened": ["softened_reverse_kl", "softened_kl"],
    "skew": ["skew_reverse_kl:0.1", "skew_reverse_kl:0.5", "skew_kl:0.5", "skew_kl:0.1"],
    "chi-square": ["neyman", "pearson"],
    "alpha": ["alpha:-1", "alpha:0", "alpha:0.5", "alpha:1", "alpha:2"],
}
# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
STYLES = ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]

# The target: 60 % at -2 with width 0.6, 40 % at 2 with width 0.8. The student starts between them.
SHARES, MEANS, WIDTHS = (0.6, 0.4), (-2.0, 2.0), (0.6, 0.8)
START = (0.5, 1.0)
LOW, HIGH, PANELS = -14.0, 14.0, 56


@dataclass(frozen=True)
class Fit:
    """The Gaussian closest to the target.

    Attributes:
        mean: Its mean.
        width: Its standard deviation.
        value: The divergence that is left, nats.
    """

    mean: float
    width: float
    value: float


def normal(x: Tensor, mean: Tensor | float, width: Tensor | float) -> Tensor:
    """The log-density of N(mean, width^2)."""
    width = torch.as_tensor(width, dtype=torch.float64)
    return -0.5 * ((x - mean) / width) ** 2 - width.log() - 0.5 * math.log(2 * math.pi)


def target(x: Tensor) -> Tensor:
    """The log-density of the two-mode target."""
    parts = [math.log(w) + normal(x, m, s) for w, m, s in zip(SHARES, MEANS, WIDTHS, strict=True)]
    return torch.logsumexp(torch.stack(parts), 0)


@cache
def fit(name: str) -> Fit:
    """The Gaussian that minimizes the exact divergence, the best of three starts (left, middle, right)."""

    def value_and_slope(at: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value = divergence_1d(
            name, target, lambda x: normal(x, parameters[0], parameters[1].exp()), LOW, HIGH, n=PANELS
        )
        (slope,) = torch.autograd.grad(value, parameters)
        return value.item(), slope.numpy()

    bounds = [(-3.0, 3.0), (math.log(0.3), math.log(2.5))]  # so that the student stays inside the interval
    runs = [
        minimize(value_and_slope, [m, math.log(s)], jac=True, method="L-BFGS-B", bounds=bounds)
        for m, s in ((-2.0, 0.7), (0.0, 2.0), (2.0, 0.7))
    ]
    best = min(runs, key=lambda run: run.fun)
    return Fit(float(best.x[0]), math.exp(best.x[1]), float(best.fun))


def push(name: str, x: Tensor) -> Tensor:
    """The velocity h(r) (s_p - s_q) that the divergence gives samples of the student at its start."""
    x = x.clone().requires_grad_()
    log_r = target(x) - normal(x, *START)
    (difference,) = torch.autograd.grad(log_r.sum(), x)
    return divergence(name).weight(log_r.detach()) * difference


def _functions(ax_f: Axes, ax_h: Axes, names: list[str]) -> None:
    log_r = torch.linspace(-3, 3, 121, dtype=torch.float64)
    for name, color, style in zip(names, COLORS, STYLES, strict=False):
        d = divergence(name)
        ax_f.plot(log_r, d.f(log_r), color=color, ls=style, label=name)
        ax_h.plot(log_r, d.weight(log_r), color=color, ls=style)
    ax_f.set(title="generator f(r)", xlabel="log r = log p - log q", ylim=(-0.1, 4))
    top = min(4.0, 1.1 * max(divergence(name).weight(log_r).max().item() for name in names))
    ax_h.set(title="weight h(r) = r² f''(r)", xlabel="log r = log p - log q", ylim=(-0.02 * top, top))
    ax_f.legend(frameon=False)


def _movement(ax_push: Axes, ax_fit: Axes, names: list[str]) -> None:
    x = torch.linspace(-5, 5, 161, dtype=torch.float64)
    for ax in (ax_push, ax_fit):
        ax.fill_between(x, target(x).exp(), color="0.85", lw=0)
    ax_push.plot(x, normal(x, *START).exp(), color="0.4", lw=1)
    inner = torch.linspace(START[0] - 2 * START[1], START[0] + 2 * START[1], 121, dtype=torch.float64)
    for name, color, style in zip(names, COLORS, STYLES, strict=False):
        if divergence(name).differentiable:
            speed = push(name, inner)
            # Only the shape counts: methods divide the weight by its mean.
            ax_push.plot(inner, 0.45 * speed / speed.abs().max(), color=color, ls=style)
        found = fit(name)
        ax_fit.plot(x, normal(x, found.mean, found.width).exp(), color=color, ls=style)
    ax_push.axhline(0, color="0.6", lw=0.6)
    ax_push.set(title="descent direction (start: grey line)", xlabel="x", ylim=(-0.5, 0.5))
    ax_fit.set(title="the Gaussian it ends at", xlabel="x", ylim=(0, 0.7))


def draw(family: str, file: Path) -> None:
    """One picture: f, h, the push at the start and the fit, for the members of a family."""
    options = {
        "font.size": 9,
        "svg.hashsalt": "distmatch",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(options):
        figure, axes = plt.subplots(1, 4, figsize=(13, 2.9), layout="constrained")
        _functions(axes[0], axes[1], FAMILIES[family])
        _movement(axes[2], axes[3], FAMILIES[family])
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)


def table() -> str:
    """The fits as a Markdown table."""
    lines = ["| divergence | mean | standard deviation | remaining value (nats) |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for names in FAMILIES.values() for name in names):
        found = fit(name)
        lines.append(f"| `{name}` | {found.mean:.2f} | {found.width:.2f} | {found.value:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        draw(family, folder / f"divergence-{family}.svg")
    print(table())
