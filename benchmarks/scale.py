"""Step time, memory and communication of a distillation on 1 to 1,024 GPUs, predicted.

    python benchmarks/scale.py                                  # the tables and the figure of docs/scale.md
    python benchmarks/scale.py --flops 2e14 --between 1.25e10   # other devices, another network

What a step computes, sends and keeps is counted, not assumed: passes, optimizer steps and small messages in
a cycle of f-distill on a small transformer, operations of the larger ones from their shapes, memory by
``distmatch.training.memory``. What devices and networks do is assumed: the options of this script, each with
its default. ``scale_check.py`` holds the same sums against runs of 1, 2 and 4 processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot as plt
from scale_counts import Cycle, Network, network, observed
from sections import replace_section

from distmatch.base.ranks import _BUCKET

SIZES = ((768, 12), (1536, 24), (3072, 40), (4608, 52))
MODES = ("ddp", "fsdp2", "hybrid", "lora")
PAGE, PICTURE = Path("docs/scale.md"), Path("docs/pictures/predicted-scale.svg")


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is assumed of devices and of the network between them."""

    flops: float = 4e14
    """Operations a second that a device reaches in the passes, in bfloat16: about 40 % of an H100's peak."""
    memory_rate: float = 2.5e12
    """Bytes a second of the device's own memory, which bounds optimizers and averages."""
    memory: float = 80e9
    """Bytes of a device's memory."""
    per_node: int = 8
    """Devices in a machine."""
    within: float = 3e11
    """Bytes a second that a device sends to the others of its machine."""
    between: float = 4e10
    """Bytes a second that a device sends to other machines."""
    latency: float = 1e-5
    """Seconds a message takes at least, for each doubling of the number of devices."""
    overlap: float = 0.9
    """Share of the gathering of weights that is hidden behind computation, under fsdp2 and hybrid."""
    batch: int = 8
    """Samples on each device."""

    def seconds(self, message: Message) -> float:
        """A ring: each device sends its share n - 1 times, for a sum of whole tensors twice."""
        n = message.group
        if n == 1:
            return 0.0
        rate = self.between if message.across or n > self.per_node else self.within
        turns = 2 if message.kind == "all_reduce" else 1
        once = turns * (message.bytes * (n - 1) / n / rate + math.log2(n) * self.latency)
        return message.count * once


@dataclass(frozen=True)
class Message:
    """A collective operation.

    Attributes:
        kind: Which.
        bytes: Of the whole tensor.
        group: How many processes take part.
        count: How often, in a step.
        across: Whether they are on different machines.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    bytes: float
    group: int
    count: float = 1.0
    across: bool = False


class Link(Protocol):
    """What knows how long messages take."""

    def seconds(self, message: Message) -> float:
        """All times that it is sent in a step."""
        ...


def summed(gradients: dict[str, float], cycle: Cycle, n: int) -> list[Message]:
    """The messages of a step in which whole gradients are averaged, in buckets, after the backward passes."""
    found = [Message("all_reduce", 1024, n, cycle.small / cycle.steps)]
    for name, size in gradients.items():
        buckets = max(1, math.ceil(size / _BUCKET))
        found.append(Message("all_reduce", size / buckets, n, buckets * cycle.moves[name] / cycle.steps))
    return found


@dataclass(frozen=True)
class Predicted:
    """A step on one of n devices: seconds, bytes sent, bytes of memory, and the share of time in passes."""

    seconds: float
    sent: float
    memory: float
    efficiency: float


def predict(net: Network, cycle: Cycle, mode: str, n: int, assumed: Assumed) -> Predicted:
    """The prediction; see the page for each term."""
    shard = {"fsdp2": n, "hybrid": min(n, assumed.per_node)}.get(mode, 1)
    passes = cycle.units / cycle.steps * net.work * assumed.batch / assumed.flops
    touched = 7 * (cycle.moves["student"] + cycle.moves["fake"]) + 3 * cycle.moves["student"]
    updates = 4 * touched / cycle.steps * net.learned / shard / assumed.memory_rate
    gradients = {"student": net.gradients, "fake": net.gradients}
    messages = summed({name: size / shard for name, size in gradients.items()}, cycle, n // shard)
    messages = [replace(m, across=shard > 1) for m in messages]
    hidden = 0.0
    if shard > 1:
        gathers, scatters = (net.blocks * c / cycle.steps for c in (cycle.gathers, cycle.scatters))
        blocks = [
            Message("all_gather", net.weights / net.blocks, shard, gathers),
            Message("reduce_scatter", net.gradients / net.blocks, shard, scatters),
        ]
        messages = [*messages, *blocks, Message("all_reduce", 1024, n, cycle.small / cycle.steps)]
        hidden = min(sum(map(assumed.seconds, blocks)), passes) * assumed.overlap
    seconds = passes + updates + sum(map(assumed.seconds, messages)) - hidden
    sent = sum(
        m.count * m.bytes * (m.group - 1) / m.group * (2 if m.kind == "all_reduce" else 1) for m in messages
    )
    gathered = 2 * net.weights / net.blocks if shard > 1 else 0.0
    memory = (net.kept + net.gradients) / shard + gathered + net.activations * assumed.batch
    return Predicted(seconds, sent, memory, passes / seconds)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to predict, and where it goes."""

    assumed: Assumed = field(default_factory=Assumed)
    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    write: bool = False
    """Write the tables and the figure of docs/scale.md."""


def main() -> None:
    """Prints the tables."""
    options = tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))
    settings = {"lora": {"train": "lora", "base_dtype": "bfloat16"}}
    every = {mode: {"checkpointing": True, **settings.get(mode, {})} for mode in ("full", "lora")}
    counts = {
        "full": {"checkpointing": True},
        "lora": {"checkpointing": True, "train": "lora"},
    }
    cycles = {kind: observed(**own) for kind, own in counts.items()}
    nets = {kind: [network(*size, **own) for size in SIZES] for kind, own in every.items()}
    found = {
        (mode, net.parameters, n): predict(net, cycles[kind], mode, n, options.assumed)
        for mode in MODES
        for kind in ("lora" if mode == "lora" else "full",)
        for net in nets[kind]
        for n in options.devices
    }
    text = table(found, options)
    print(text)
    for kind, cycle in cycles.items():
        print(f"{kind}: {cycle}")
    if options.write:
        replace_section(PAGE, "predicted scale", text)
        plot(found, options)


Found = dict[tuple[str, int, int], Predicted]


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2g}" if parameters < 1e9 else f"{parameters / 1e9:.1f}"


def table(found: Found, options: Options) -> str:
    """Milliseconds of a step, GB of memory and of messages, of those that fit."""
    shown = [n for n in (1, 8, 64, 1024) if n in options.devices]
    lines = [
        "| parameters (billions) | mode | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for size in dict.fromkeys(parameters for _, parameters, _ in found):
        for mode in MODES:
            cells = []
            for n in shown:
                p = found[mode, size, n]
                cell = f"{1000 * p.seconds:,.0f} ms, {p.memory / 1e9:,.0f} GB"
                cell += f", sent {p.sent / 1e9:.3g} GB" if n > 1 else ""
                cells.append(cell if p.memory <= options.assumed.memory else f"({cell})")
            lines.append(f"| {_billions(size)} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Found, options: Options) -> None:
    """Share of the time in passes, memory and messages, over the number of devices."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distmatch", "font.size": 9})
    sizes = list(dict.fromkeys(parameters for _, parameters, _ in found))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for color, mode in zip(("#0072b2", "#d55e00", "#009e73", "#cc79a7"), MODES, strict=True):
        for style, size in (("-", sizes[0]), ("--", sizes[-1])):
            rows = [(n, found[mode, size, n]) for n in options.devices]
            label = f"{mode}, {_billions(size)} billion"
            for axis, value in zip(
                axes,
                (lambda p: p.efficiency, lambda p: p.memory / 1e9, lambda p: max(p.sent / 1e9, 1e-6)),
                strict=True,
            ):
                points = [(n, value(p)) for n, p in rows if n > 1 or axis is not axes[2]]
                axis.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.3)
    axes[1].axhline(options.assumed.memory / 1e9, color="#888", linewidth=0.8)
    titles = ("Share of a step in network passes", "Memory of a GPU (GB)", "Sent by a GPU in a step (GB)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="GPUs", title=title, yscale="linear" if axis is axes[0] else "log")
        axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1024"])
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=7, frameon=False, loc="lower left")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
