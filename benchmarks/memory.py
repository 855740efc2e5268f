"""Predicted memory against measured memory, for a transformer of about 300 million parameters.

    python benchmarks/memory.py            # all rows, one process each, one after the other; up to 13 GB
    python benchmarks/memory.py --tiny     # the same for 0.3 million parameters

A row is f-distill with a discriminator on the teacher's features, by real steps on a CPU. Measured are the
allocations that torch's profiler sees in a step of fake score and student, on top of weights and moments. As
a check of both, the last column is the growth of the process's resident set by its largest, from before the
teacher was made.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import distmatch as dm
from distmatch.data.batches import Batch
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.sizes import role_sizes
from distmatch.training.memory import predict_memory
from distmatch.training.options import DistillOptions

LARGE, TINY = DiTConfig(width=1024, depth=16, heads=16), DiTConfig(width=64, depth=4, heads=4)
ROWS = [("full", False, 1), ("lora", False, 1), ("lora", True, 1), ("lora", False, 2)]
"""Training, checkpointing and accumulation."""


def teacher_of(config: DiTConfig) -> EDMDenoiser:
    """A transformer with random weights."""
    net = build_net(config, (4, 16, 16), 10)
    return EDMDenoiser(net, shape=(4, 16, 16), num_classes=10, sigma_data=0.5).eval().requires_grad_(False)


def options_of(train: str, again: bool, parts: int, batch: int) -> DistillOptions:
    """The options of a row."""
    options = DistillOptions.of("f-distill")
    settings: Any = replace(options.settings, train=train, checkpointing=again, accumulate=parts)
    run = replace(options.run, batch=batch, steps=100, device="cpu")
    return replace(options, settings=settings, run=run)


def measured(options: DistillOptions, config: DiTConfig) -> tuple[int, int]:
    """Bytes of weights and moments, and the most that steps allocate on top."""
    own: Any = options.settings
    teacher = teacher_of(config)
    named = {name: getattr(own, name) for name in ("train", "checkpointing", "accumulate")}
    method = dm.methods.build(teacher, "f-distill", total_steps=100, **named)
    state = method.init(0)
    batch = Batch(
        torch.randn(options.run.batch, *teacher.shape), torch.zeros(options.run.batch, dtype=torch.int64)
    )
    del teacher  # with full training the run has a copy
    steps = [50, 50 + own.fake_score_steps - 1]
    state.step = steps[-1]
    method.step(state, batch)  # makes all moments
    gc.collect()
    parts: Any = method
    sizes = role_sizes(
        {"teacher": parts.teacher, **state.modules()}, state.optimizers.values(), state.ema
    ).values()
    most = 0
    for state.step in steps:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            method.step(state, batch)
        most = max(most, _peak(seen))
    return sum(size.weights + size.optimizer for size in sizes), most


def _peak(seen: Any) -> int:
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def resident(key: str) -> int:
    """Bytes of this process by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def row(train: str, again: bool, parts: int, config: DiTConfig, batch: int) -> dict[str, Any]:
    """One row of the table."""
    options = options_of(train, again, parts, batch)
    with torch.device("meta"):
        shapes = teacher_of(config)
    began = time.perf_counter()
    memory = predict_memory(options, shapes)
    seconds = time.perf_counter() - began
    before = resident("VmRSS")
    held, passes = measured(options, config)
    return {
        "train": train,
        "checkpointing": again,
        "accumulate": parts,
        "parameters": sum(p.numel() for p in shapes.parameters()),
        "predicted": memory.peak,
        "measured": held + passes,
        "resident": resident("VmHWM") - before,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Prints the table; each row is measured in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--row", type=int, default=None)
    given = parser.parse_args()
    if given.row is not None:
        print(json.dumps(row(*ROWS[given.row], TINY if given.tiny else LARGE, given.batch)))
        return
    print("| train | checkpointing | accumulate | predicted | measured | predicted / measured | resident |")
    print("|---|---|---|---|---|---|---|")
    for index in range(len(ROWS)):
        command = [sys.executable, __file__, "--row", str(index), "--batch", str(given.batch)]
        found = subprocess.run(
            [*command, *(["--tiny"] if given.tiny else [])], capture_output=True, text=True, check=True
        )
        one = json.loads(found.stdout.splitlines()[-1])
        sizes = [f"{one[name] / 1e6:,.1f} MB" for name in ("predicted", "measured", "resident")]
        print(
            f"| {one['train']} | {one['checkpointing']} | {one['accumulate']} | {sizes[0]} | {sizes[1]} | "
            f"{one['predicted'] / one['measured']:.3f} | {sizes[2]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
