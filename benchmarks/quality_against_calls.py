"""How good samples are for the network calls they cost, solver by solver; and which solvers blow up.

    python benchmarks/quality_against_calls.py --teacher runs/teacher
    python benchmarks/quality_against_calls.py --teacher runs/fashion --n 1000 --out fashion

Every solver starts from the same latents with the same labels. `fd` is the Frechet distance on the features
of the classifier that `distmatch evaluate` uses, between generated and real blocks of n samples; between two
blocks of real samples it is the `floor`. The number to beat is that of Heun's method at 35 calls, times 1.25.

Under strong guidance a sample counts as divergent when it is not finite, or when its root mean square
distance from the same sample solved finely (Heun, `--fine` steps) is above 0.5; data lie in [-1, 1]. Strong
guidance drives values out of range by itself, so `out of range`, more than a tenth of the values beyond 1.5,
is counted beside it. Solvers with momentum stand below the method that they are built on, at the same
evaluations of the guided teacher, each of which is two network calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import tyro
from matplotlib import pyplot as plt
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.data import Dataset, load_data
from distmatch.diffusion.solvers import find_solver
from distmatch.metrics import evaluate, reference_floor, reference_labels, resolve_features
from distmatch.training.models import Model, open_model
from distmatch.training.sampling import Sampling

SOLVERS = ("heun", "ddim", "dpmpp-2m", "tab:2", "tab:3", "ipndm:3", "ghvb:2.5", "ddim:1")
# Each method and those with momentum on it, as many velocities.
STABILIZED = {
    "dpmpp-2m": ("hb-2m:0.8",),
    "ipndm:2": ("ghvb:1.8", "ghvb:1.5", "hb:0.8:2"),
    "ipndm:3": ("ghvb:2.5", "ghvb:2.1"),
    "ipndm:4": ("ghvb:3.5", "ghvb:3.1"),
}
BAR = 1.25
# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    teacher: str
    """A run folder or anything else that `distmatch sample` takes."""
    data: str = ""
    """Real data; empty takes those of the teacher."""
    n: int = 800
    """Samples in a block; two blocks are drawn for each solver."""
    calls: tuple[int, ...] = (5, 7, 10, 15, 20, 35)
    """Network calls at which solvers are compared, without guidance."""
    solvers: tuple[str, ...] = SOLVERS
    guidance: float = 5.0
    """Scale of the second part; 1 leaves it out."""
    evaluations: int = 10
    """Evaluations of the guided teacher in the second part."""
    guided: int = 500
    """Samples in the second part."""
    fine: int = 40
    """Steps of the fine solve."""
    seed: int = 0
    device: str = "auto"
    out: str = "quality"
    """Where to write: OUT.json and, with two numbers of calls or more, OUT.svg."""


def settings(solver: str, calls: int, guidance: float = 1.0) -> Sampling | None:
    """The longest run of a solver on EDM's levels within so many calls; None where it cannot use so few."""
    chosen = find_solver(solver)
    for steps in range(calls, chosen.least_steps - 1, -1):
        cost = chosen.calls(tuple(range(steps, -1, -1)))
        if cost is not None and cost <= calls:
            return Sampling(solver=solver, steps=steps, guidance=guidance)
    return None


def quality(o: Options, model: Model, data: Dataset) -> tuple[dict[str, dict[int, Estimate]], Estimate]:
    """The fd of every solver at every number of calls, and the floor."""
    space = resolve_features("auto", data)
    labels = reference_labels(data, 2 * o.n, seed=o.seed) if model.num_classes else None
    floor = reference_floor(data, features=space, n=o.n, seed=o.seed, stratified=labels is not None)["fd"]
    found: dict[str, dict[int, Estimate]] = {}
    for solver in o.solvers:
        for calls in sorted({*o.calls, 35} if solver == "heun" else o.calls):
            how = settings(solver, calls)
            if how is None:
                continue
            drawn = model.draw(2 * o.n, labels, o.seed, how, device=o.device, quiet=True)
            if not bool(torch.isfinite(drawn.x).all()):
                continue
            value = evaluate(drawn.x, data, labels=labels, features=space, n=o.n, seed=o.seed)["fd"]
            found.setdefault(solver, {})[drawn.nfe] = value
            print(
                f"  {solver:10} {drawn.nfe:3} calls   fd {value.value:8.3f} +- {value.stderr:.3f}", flush=True
            )
    return found, floor


def divergent(x: Tensor, fine: Tensor) -> Tensor:
    """Which samples (B, ...) are far from where a fine solve takes the same latents, (B,) bool."""
    distance = (x - fine).flatten(1).square().mean(dim=1).sqrt()
    return ~(distance <= 0.5)  # NaN is not


def out_of_range(x: Tensor) -> Tensor:
    """Which samples (B, ...) have many values that no data have, (B,) bool."""
    return (~(x.flatten(1).abs() <= 1.5)).double().mean(dim=1) > 0.1


def stability(o: Options, model: Model) -> dict[str, dict[str, int]]:
    """Divergent samples and samples out of range, of each solver, under guidance."""
    labels = torch.arange(o.guided) % model.num_classes

    def drawn(how: Sampling) -> Tensor:
        return model.draw(o.guided, labels, o.seed, how, device=o.device, quiet=True).x

    fine = drawn(Sampling(steps=o.fine, guidance=o.guidance))
    counts = {f"heun, {o.fine} steps": {"divergent": 0, "out of range": int(out_of_range(fine).sum())}}
    names = [name for base, others in STABILIZED.items() for name in (base, *others)]
    for solver in ("ddim", *names):
        how = settings(solver, o.evaluations, o.guidance)
        if how is not None:
            x = drawn(how)
            counts[solver] = {
                "divergent": int(divergent(x, fine).sum()),
                "out of range": int(out_of_range(x).sum()),
            }
    return counts


def plot(path: Path, found: dict[str, dict[int, Estimate]], floor: Estimate, bar: float) -> None:
    """Draws fd against calls, one line a solver."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distmatch", "font.size": 9})
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for index, (solver, values) in enumerate(found.items()):
        color, style = COLORS[index % len(COLORS)], "--" if index % 2 else "-"
        x, y = list(values), [v.value for v in values.values()]
        bars = [1.96 * v.stderr for v in values.values()]
        axes.errorbar(x, y, yerr=bars, color=color, ls=style, marker="o", ms=3, lw=1.2, label=solver)
    axes.axhline(bar, color="#888888", lw=0.8, ls=":", label=f"{BAR} x Heun at 35")
    axes.axhline(floor.value, color="#888888", lw=0.8, label="real data")
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="fd")
    ticks = sorted({calls for values in found.values() for calls in values})
    ticks = [t for t in ticks if t in (5, 7, 10, 15, 20, 35)]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(o: Options) -> None:
    """Measures, prints and writes."""
    model = open_model(o.teacher)
    data = load_data(o.data or model.data, labels=model.num_classes > 0)
    print(f"{o.teacher}, {2 * o.n} samples a solver, blocks of {o.n}, seed {o.seed}")
    found, floor = quality(o, model, data)
    heun = found["heun"][35].value if 35 in found.get("heun", {}) else float("nan")
    print(f"\nfloor {floor.value:.3f}   heun at 35 calls {heun:.3f}   bar {BAR * heun:.3f}\n")
    calls = sorted({count for values in found.values() for count in values})
    print("| solver |" + "".join(f" {count} |" for count in calls) + "\n|---|" + "---|" * len(calls))
    for solver, values in found.items():
        cells = (f" {values[c].value:.2f} |" if c in values else " |" for c in calls)
        print(f"| `{solver}` |" + "".join(cells))
    counts: dict[str, dict[str, int]] = {}
    if o.guidance != 1 and model.num_classes:
        counts = stability(o, model)
        print(f"\nguidance {o.guidance:g}, {o.evaluations} evaluations, {o.guided} samples\n")
        print("| solver | divergent | out of range |\n|---|---|---|")
        for solver, count in counts.items():
            print(f"| `{solver}` | {count['divergent']} | {count['out of range']} |")
    result = {
        "teacher": o.teacher,
        "n": o.n,
        "floor": floor.to_dict(),
        "fd": {s: {c: v.to_dict() for c, v in values.items()} for s, values in found.items()},
        "divergent": counts,
        "of": o.guided,
        "guidance": o.guidance,
    }
    Path(f"{o.out}.json").write_text(json.dumps(result, indent=1))
    if len(calls) > 1:
        plot(Path(f"{o.out}.svg"), found, floor, BAR * heun)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
