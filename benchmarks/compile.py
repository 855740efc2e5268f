"""What compilation, bfloat16 and channels-last each bring to steps of f-distill, in one process.

    OMP_NUM_THREADS=1 python benchmarks/compile.py
    python benchmarks/compile.py --device cuda --batch 64 --modes default,reduce-overhead

A cycle is the steps of the fake score and the one of the student among them, with teacher features for the
discriminator. Variants take turns; a figure is the smallest time over the rounds, on a CPU that of the
processor. Each has networks and an optimizer of its own, from the same teacher. The first cycles, in which
graphs are made, are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from step import Options as StepOptions
from step import build, networks_of, timed

from distmatch.data.batches import Batch
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.devices import compile_network, pick_device

NETS: dict[str, NetConfig] = {
    "unet": UNetConfig(width=32, multipliers=(1, 2), blocks=1, attention=(1,)),
    "dit": DiTConfig(width=128, depth=4, heads=4, patch=2),
}
SHAPE = (3, 16, 16)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    nets: str = "unet,dit"
    """Names with commas."""
    batch: int = 16
    device: str = "auto"
    modes: str = "default"
    """Modes of --compile-mode, with commas; none leaves compilation out."""
    rounds: int = 9


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    name: str
    mode: str | None = None
    bf16: bool = False
    channels_last: bool = False


def variants(net: str, modes: list[str]) -> list[Variant]:
    """Eager and compiled, in both precisions; channels-last for convolutions."""
    plain = [
        Variant("eager"),
        *(Variant("compiled" if mode == "default" else f"compiled, {mode}", mode) for mode in modes),
        *([Variant("channels-last", channels_last=True)] if net == "unet" else []),
    ]
    return [*plain, *(replace(v, name=f"{v.name}, bf16", bf16=True) for v in plain)]


def cycle_of(variant: Variant, config: NetConfig, options: Options) -> Callable[[], None]:
    """The steps of one variant."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    teacher = EDMDenoiser(build_net(config, SHAPE, 10), shape=SHAPE, num_classes=10).to(device)
    settings = StepOptions(precision="bf16" if variant.bf16 else "fp32")
    method, steps = build("f-distill", teacher.eval().requires_grad_(False), settings, device)
    state: Any = method.init(0)
    x = torch.randn(options.batch, *SHAPE, device=device)
    if variant.channels_last:
        x = x.to(memory_format=torch.channels_last)
    batch = Batch(x, torch.randint(10, (options.batch,), device=device))
    for net in networks_of(teacher, state).values():
        if isinstance(net, EDMDenoiser):
            if variant.channels_last:
                net.to(memory_format=torch.channels_last)
            if variant.mode is not None:
                compile_network(net.net, variant.mode)

    def cycle() -> None:
        for _ in range(steps):
            if variant.mode not in (None, "default"):
                torch.compiler.cudagraph_mark_step_begin()
            method.step(state, batch)

    return cycle


def main() -> None:
    """Prints a table for each network."""
    options = tyro.cli(Options)
    device = pick_device(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}")
    for net in options.nets.split(","):
        chosen = variants(net, [mode for mode in options.modes.split(",") if mode != "none"])
        cycles = [cycle_of(variant, NETS[net], options) for variant in chosen]
        first = []
        for cycle in cycles:
            began = time.perf_counter()
            for _ in range(2):
                cycle()
            first.append(time.perf_counter() - began)
        rounds = [[timed(cycle, device) for cycle in cycles] for _ in range(options.rounds)]
        least = [1000 * min(times) for times in zip(*rounds, strict=True)]
        print(f"\n| {net} | ms a cycle | of eager | first two cycles, s |\n|---|---|---|---|")
        for variant, ms, start in zip(chosen, least, first, strict=True):
            print(f"| {variant.name} | {ms:.1f} | {ms / least[0]:.2f} | {start:.1f} |", flush=True)


if __name__ == "__main__":
    main()
