"""The sums of ``scale.py`` against runs of 1, 2 and 4 processes on this machine.

    python benchmarks/scale_check.py              # measures for a minute or two, prints the tables
    python benchmarks/scale_check.py --write      # and puts them into docs/scale.md

Measured apart: the network calls of a step on the rows of one process, made again on ready inputs; the
optimizers' and the average's moves; and messages of gloo by kind and size. From these alone ``scale.py``
predicts the steps of f-distill, which are then measured in 1, 2 and 4 processes of one thread. Times are
those of the processor, of all threads of the first process, which other programs disturb less than a clock on
the wall; what a process waits for is not among them. Each is the least over the rounds.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from network_calls import recorded, replay
from scale import PAGE, Message, summed
from scale_counts import Cycle, observed, small_batch, small_run
from sections import replace_section
from step import updates_of

from distmatch.base.ranks import Ranks

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
PROCESSES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    batch: int = 8
    """Samples of all processes together."""
    rounds: int = 3
    """Times that all is measured."""
    sizes: tuple[int, ...] = (2**10, 2**16, 2**20, 2**22, 2**23)
    """Bytes of the messages."""
    write: bool = False


@dataclass(frozen=True)
class Table:
    """Measured messages: seconds by kind, processes and bytes; between sizes on a straight line."""

    times: dict[tuple[str, int], dict[int, float]]

    def seconds(self, message: Message) -> float:
        """All times that it is sent in a step."""
        if message.group == 1:
            return 0.0
        points = sorted(self.times[message.kind, message.group].items())
        size = min(max(message.bytes, points[0][0]), points[-1][0])
        for (a, first), (b, last) in pairwise(points):
            if a <= size <= b:
                return message.count * (first + (last - first) * (size - a) / (b - a))
        raise ValueError(message)


def least(action: Callable[[], None], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.process_time()
        action()
        found.append(time.process_time() - began)
    return min(found)


def message(kind: str, size: int, n: int) -> Callable[[], None]:
    """Sends a tensor of so many bytes."""
    whole = torch.zeros(max(n, size // 4 // n * n))
    part = torch.zeros(len(whole) // n)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: dist.all_gather(list(whole.chunk(n)), part)
    return lambda: dist.reduce_scatter_tensor(part, whole)


def stepper(ranks: Ranks, rows: int) -> Callable[[], None]:
    """A cycle of steps as the training loop makes them, with the question after each whether to stop."""
    method, state, _, steps = small_run(ranks)
    batch = small_batch(rows)

    def cycle() -> None:
        for _ in range(steps):
            method.step(state, batch)
            ranks.largest(0)

    cycle()
    return cycle


def process(rank: int, n: int, place: str, options: Options, result: Any) -> None:
    """One of n processes, the first of which puts the least times of all into ``result``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks = Ranks(rank, n)
    if n > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=n)
    cycle = stepper(ranks, options.batch // n)
    calls, updates = calls_alone(options.batch // n)
    found: dict[Any, float] = {}

    def take(key: Any, action: Callable[[], None], times: int) -> None:
        ranks.wait()
        found[key] = min(least(action, times), found.get(key, 1e9))

    for _ in range(options.rounds):
        if ranks.main:
            found["calls"] = min(least(calls, 2), found.get("calls", 1e9))
            found["updates"] = min(least(updates, 2), found.get("updates", 1e9))
        take("cycle", cycle, 2)
        for kind in KINDS if n > 1 else ():
            for size in options.sizes:
                take((kind, size), message(kind, size, n), 3)
    ranks.wait()
    if ranks.main:
        result.put(found)
    if n > 1:
        dist.destroy_process_group()


def together(n: int, options: Options) -> dict[Any, float]:
    """What the first of n processes measured."""
    result = mp.get_context("fork").SimpleQueue()
    print(f"{n} processes, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "store")
        running = mp.start_processes(process, (n, place, options, result), n, join=False, start_method="fork")
        found: dict[Any, float] = result.get()
        running.join()
    return found


def calls_alone(rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The network calls of a cycle on so many rows, and its updates, as functions."""
    method, state, teacher, steps = small_run()
    batch = small_batch(rows)
    modules = {"teacher": teacher, **{k: v for k, v in state.modules().items() if k != "average"}}

    def cycle() -> None:
        for _ in range(steps):
            method.step(state, batch)

    cycle()
    with recorded(modules) as calls:
        cycle()
    again, updates = replay(calls), updates_of(state, cycle)
    again()
    updates()
    return again, updates


def gradients() -> dict[str, float]:
    _, state, _, _ = small_run()
    groups = {name: optimizer.param_groups for name, optimizer in state.optimizers.items()}
    return {name: float(sum(p.nbytes for g in found for p in g["params"])) for name, found in groups.items()}


def predicted(found: dict[Any, float], n: int, cycle: Cycle) -> tuple[float, float]:
    """Seconds of a step in one of n processes, and those of them that messages take."""
    times = {(kind, n): {k[1]: t for k, t in found.items() if k[0] == kind} for kind in KINDS}
    link = Table(times)
    work = (found["calls"] + found["updates"]) / cycle.steps
    sent = sum(link.seconds(m) for m in summed(gradients(), cycle, n))
    return work + sent, sent


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    best = {n: together(n, options) for n in PROCESSES}
    cycle = observed()
    lines = [
        "| processes | network calls, ms | updates, ms | messages, ms | predicted step, ms | measured, ms | "
        "error |",
        "|" + 7 * "---|",
    ]
    for n, found in best.items():
        whole, sent = predicted(found, n, cycle)
        got = found["cycle"] / cycle.steps
        parts = (found["calls"] / cycle.steps, found["updates"] / cycle.steps, sent, whole, got)
        lines.append(f"| {n} | {' | '.join(f'{1000 * p:.1f}' for p in parts)} | {whole / got - 1:+.0%} |")
    lines += ["", f"| messages, ms | {' | '.join(_size(s) for s in options.sizes)} |"]
    lines.append("|" + (1 + len(options.sizes)) * "---|")
    for n in PROCESSES[1:]:
        for kind in KINDS:
            cells = " | ".join(f"{1000 * best[n][kind, size]:.2g}" for size in options.sizes)
            lines.append(f"| {kind}, {n} processes | {cells} |")
    text = "\n".join(lines)
    print(text)
    if options.write:
        replace_section(Path(PAGE), "checked scale", text)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


if __name__ == "__main__":
    main()
