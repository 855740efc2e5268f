"""What a step costs on top of its network calls in one and in two processes, what two bring, and memory.

    python benchmarks/processes.py                    # overhead, samples a second and profile
    python benchmarks/processes.py --only memory --steps 2000

Overhead. The network calls of a step are listened to once and made again on ready inputs, as in step.py. Both
sides take turns, in one process or in two at the same time, which start each turn together. With two, each
has half of the batch; the bare calls are those of half of a batch, without communication, so that gradients
that are sent and waiting are a part of the overhead.

Samples a second. One process on one thread with the whole batch, then two on one thread each with half of it,
in turns of a few steps: while one works, the two wait, and the other way round. The least time of a turn
counts. The profile has the time of a step inside of collectives, by rank, and the time of the processor: what
is left is work that both do, and cores that slow each other down. On a machine with other work only times of
the processor, in which nobody waits, say something about the overhead.

Memory. The resident set at ten points of a run of many steps; the slope is that of a line through the
second half.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from network_calls import recorded, replay
from step import TOTAL, Options, build, networks_of

from distmatch.base.ranks import Ranks
from distmatch.data.batches import Batch
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser

SHAPE = (3, 32, 32)
NETS: dict[str, NetConfig] = {
    "unet": UNetConfig(width=64, multipliers=(1, 2, 2)),
    "dit": DiTConfig(width=192, depth=6, patch=4),
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What to measure."""

    only: Literal["speed", "memory"] = "speed"
    nets: str = "unet,dit"
    methods: str = "dmd2"
    batch: int = 16
    rounds: int = 8
    """Turns of each side; the least time counts."""
    steps: int = 2000
    """Steps for the memory."""


Turn = tuple[float, float, float, int]
"""Seconds, those of the processor, those inside of collectives, and the number of these."""


class Side:
    """Steps of a method on the rows of one rank, and its bare network calls."""

    def __init__(self, net: str, name: str, batch: int, ranks: Ranks) -> None:
        torch.manual_seed(0)
        denoiser = EDMDenoiser(build_net(NETS[net], SHAPE, 10), shape=SHAPE, num_classes=10)
        teacher = denoiser.eval().requires_grad_(False)
        self.method, self.cycle = build(name, teacher, Options(), torch.device("cpu"), ranks)
        self.state = self.method.init(0)
        self.state.step = TOTAL // 2
        gen = torch.Generator().manual_seed(0)
        x, labels = torch.randn(batch, *SHAPE, generator=gen), torch.randint(10, (batch,), generator=gen)
        self.batch = Batch(x[ranks.rows(batch)], labels[ranks.rows(batch)])
        for _ in range(2):
            self.ours()
        with recorded(networks_of(teacher, self.state)) as calls:
            self.ours()
        self.bare = replay(calls)
        self.bare()

    def ours(self) -> None:
        """A cycle of steps, in which the student moves once."""
        for _ in range(self.cycle):
            self.method.step(self.state, self.batch)


@contextmanager
def collectives() -> Iterator[list[float]]:
    """Notes the seconds inside of all-reduces, with the wait for the other process."""
    spent: list[float] = []
    inner: Callable[..., Any] = dist.all_reduce

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - began)

    dist.all_reduce = timed
    try:
        yield spent
    finally:
        dist.all_reduce = inner


def work(rank: int, store: str, pipe: Any, net: str, name: str, batch: int) -> None:
    """One of two processes, which makes what it is asked for."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    side = Side(net, name, batch, Ranks(rank, 2))
    pipe.send(side.cycle)
    while (order := pipe.recv()) != "end":
        dist.barrier()
        began, busy = time.perf_counter(), time.process_time()
        with collectives() as spent:
            side.ours() if order == "ours" else side.bare()
        pipe.send((time.perf_counter() - began, time.process_time() - busy, sum(spent), len(spent)))
    dist.destroy_process_group()


def compare(net: str, name: str, choices: Choices) -> None:
    """One row of the table."""
    torch.set_num_threads(1)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(2)]
        processes = [
            context.Process(target=work, args=(rank, f"{folder}/store", end[1], net, name, choices.batch))
            for rank, end in enumerate(ends)
        ]
        for process in processes:
            process.start()
        cycle = max(end[0].recv() for end in ends)
        one = Side(net, name, choices.batch, Ranks())

        def alone(action: Callable[[], None]) -> list[Turn]:
            began, busy = time.perf_counter(), time.process_time()
            action()
            return [(time.perf_counter() - began, time.process_time() - busy, 0.0, 0)]

        def both(order: str) -> list[Turn]:
            for end in ends:
                end[0].send(order)
            return [end[0].recv() for end in ends]

        turns: list[tuple[list[Turn], ...]] = []
        for _ in range(choices.rounds):
            turns.append((alone(one.ours), alone(one.bare), both("ours"), both("bare")))
        for end in ends:
            end[0].send("end")
        for process in processes:
            process.join()
    wall, busy = (
        [min(max(turn[kind] for turn in side) for side in sides) for sides in zip(*turns, strict=True)]
        for kind in (0, 1)
    )
    best = min((turn[2] for turn in turns), key=lambda side: max(turn[0] for turn in side))
    inside = " and ".join(f"{1000 * turn[2] / cycle:.0f}" for turn in best)
    print(
        f"| {net} | {name} | {_pair(wall, 0, cycle)} | {_pair(busy, 0, cycle)} | {_pair(wall, 2, cycle)} "
        f"| {_pair(busy, 2, cycle)} | {wall[0] / wall[2]:.2f} | {busy[0] / busy[2]:.2f} | {inside} "
        f"| {best[0][3] / cycle:.0f} |",
        flush=True,
    )


def _pair(times: list[float], first: int, cycle: int) -> str:
    """Milliseconds of a step, and how much more that is than its bare calls."""
    ours, bare = times[first : first + 2]
    return f"{1000 * ours / cycle:.0f} ({ours / bare - 1:+.1%})"


def resident() -> float:
    """MiB of the resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def memory(steps: int) -> None:
    """The resident set over a run of many steps, as the command makes it."""
    import distmatch as dm
    from distmatch.training.loop import Averages

    seen: list[tuple[int, float]] = []
    add, count = Averages.add, 0

    def counted(self: Averages, info: dict[str, torch.Tensor]) -> None:
        nonlocal count
        add(self, info)
        count += 1
        if count % max(1, steps // 40) == 0:
            seen.append((count, resident()))

    with tempfile.TemporaryDirectory() as folder:
        tiny = {"net": "mlp", "width": 64, "depth": 2, "batch": 64, "quiet": True}
        teacher = dm.train("digits", steps=20, **tiny)
        Averages.add = counted  # type: ignore[method-assign]
        try:
            dm.distill(
                teacher,
                "digits",
                method="f-distill",
                steps=steps,
                batch=64,
                checkpoint_every=max(1, steps // 20),
                out=f"{folder}/run",
                quiet=True,
            )
        finally:
            Averages.add = add  # type: ignore[method-assign]
    half = seen[len(seen) // 2 :]
    slope, _ = statistics.linear_regression([n for n, _ in half], [mib for _, mib in half])
    spread = max(mib for _, mib in half) - min(mib for _, mib in half)
    print(f"{steps} steps of f-distill with {20} checkpoints; MiB resident after steps:")
    print(", ".join(f"{mib:.1f} ({n})" for n, mib in seen[::4]))
    print(f"second half: slope {1000 * slope:+.2f} MiB per 1,000 steps, range {spread:.2f} MiB")


def main() -> None:
    """Prints what was asked for."""
    choices = tyro.cli(Choices)
    torch.set_num_threads(1)
    print(f"CPU, one thread a process, torch {torch.__version__}, batch {choices.batch}")
    if choices.only == "memory":
        memory(choices.steps)
        return
    print(
        "| network | method | 1: ms a step (over bare calls) | of the processor | 2: ms a step (over bare "
        "calls) | of the processor | times as fast | by the processor | ms in all-reduce, by rank | calls |"
    )
    print("|" + 10 * "---|")
    for net in choices.nets.split(","):
        for name in choices.methods.split(","):
            compare(net, name, choices)


if __name__ == "__main__":
    main()
