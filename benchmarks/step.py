"""Time and peak memory of a step of every method against the bare network calls that it makes.

    python benchmarks/step.py                         # all methods, MLP and UNet, on this machine's device
    python benchmarks/step.py --methods sid,rcm --net unet --batch 64 --device cuda --precision bf16 --compile

A cycle, in the middle of a run, is K steps for a method whose student moves at every K-th, else one step. Its
network calls are listened to once, and made again on ready inputs: the same networks in the same order and
precision, forward and backward to what they reached, without optimizers, averages, noise, ratios or losses.
The updates that any training must make, Adam's and the moving average's, are timed on their own; `beyond` is
the overhead without them. All sides run in one process, in turns; figures are the median over the rounds of
the ratio of neighboring runs, and the ratio of the smallest times. On a CPU times are those of the
processor, which other processes disturb less.

Memory is what a cycle takes at its peak beyond what is held between steps (weights, averages, optimizer
moments, kept tensors), by the allocator's own count.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import tyro
from network_calls import counted, recorded, replay
from torch import Tensor, nn

from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.batches import Batch
from distmatch.divergences import divergence
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context, Distiller
from distmatch.methods.state import DistillState
from distmatch.methods.table import METHODS, resolve_method
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.optim import clipped_step
from distmatch.training.devices import compile_network, pick_device

SHORT = {
    "pairs": 256,
    "pair_steps": 2,
    "ratio_warmup": 0,
    "backtrack_degrade_steps": 1,
    "backtrack_interval": 100,
    "bank": 16,
    "bank_steps": 2,
    "cell_draws": 1,
}
"""What comes before the usual step (pairs, recorded copies, a warm-up) is cut short."""

TOTAL = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    methods: str = "all"
    """Names with commas, or all."""
    net: Literal["mlp", "unet", "both"] = "both"
    batch: int | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    rounds: int = 15
    width: int = 64
    """Width of the UNet."""
    accumulate: int = 1
    """Parts in which networks see a batch."""


@dataclass(frozen=True)
class Case:
    """One network on one kind of data."""

    name: str
    net: NetConfig
    shape: tuple[int, ...]
    batch: int


def cases(options: Options) -> list[Case]:
    """The networks to time."""
    mlp = Case("mlp 4x256, 8x8 grey", MLPConfig(), (1, 8, 8), options.batch or 256)
    unet_config = UNetConfig(width=options.width, multipliers=(1, 2, 2))
    unet = Case(f"unet {options.width}, 32x32 color", unet_config, (3, 32, 32), options.batch or 16)
    return {"mlp": [mlp], "unet": [unet], "both": [mlp, unet]}[options.net]


def chosen_methods(names: str) -> list[str]:
    """The methods asked for."""
    return list(METHODS) if names == "all" else [name.strip() for name in names.split(",")]


def build(
    name: str, teacher: EDMDenoiser, options: Options, device: torch.device, ranks: Ranks = ALONE
) -> tuple[Distiller, int]:
    """A method with its own settings and the number of steps in a cycle of it."""
    method, measure = resolve_method(name, None)
    # ctm draws the number of its solver's steps anew each time; with one, all steps do the same work.
    short = {
        **SHORT,
        "accumulate": options.accumulate,
        "lr_rampup": 0,
        "backtrack": 2 if name == "disback" else 0,
        "solver_steps": 1,
    }
    settings = method.settings(**{key: value for key, value in short.items() if key in method.options()})
    context = Context(
        teacher=teacher,
        method=method,
        divergence=divergence(measure),
        settings=settings,
        total_steps=TOTAL,
        device=device,
        bf16=options.precision == "bf16",
        ranks=ranks,
    )
    return build_method(context), getattr(settings, "fake_score_steps", 1)


def networks_of(teacher: EDMDenoiser, state: DistillState) -> dict[str, nn.Module]:
    """All networks that a step may call."""
    return {"teacher": teacher, **{k: v for k, v in state.modules().items() if k != "average"}}


def updates_of(state: DistillState, cycle: Callable[[], None]) -> Callable[[], None]:
    """The moves of optimizers and of the average in a cycle, made again on gradients like those of it."""
    moves: Counter[str] = Counter()
    before = state.updates
    handles = [
        optimizer.register_step_post_hook(lambda *_, key=key: moves.update([key]))
        for key, optimizer in state.optimizers.items()
    ]
    cycle()
    for handle in handles:
        handle.remove()
    averages = state.updates - before
    parameters = {k: [p for g in o.param_groups for p in g["params"]] for k, o in state.optimizers.items()}
    # Gradients of their own, which a step does not clear, and no change to what is trained.
    gradients = {key: [torch.full_like(p, 1e-3) for p in found] for key, found in parameters.items()}

    def again() -> None:
        for key, count in moves.items():
            for group in state.optimizers[key].param_groups:
                group["lr"] = 0.0
            for _ in range(count):
                for parameter, gradient in zip(parameters[key], gradients[key], strict=True):
                    parameter.grad = gradient
                clipped_step(state.optimizers[key], 0.0)
        for _ in range(averages):
            state.ema.update(state.student.denoiser, 1.0)

    return again


def timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the device's work included; on a CPU those of all its threads."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def peak(action: Callable[[], None], device: torch.device) -> float:
    """MiB that a call takes at its peak beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as seen:
        action()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def held(teacher: EDMDenoiser, state: DistillState) -> float:
    """MiB of everything that is kept between steps."""
    tensors: list[Tensor] = [*teacher.parameters(), *state.memory.values()]
    for module in state.modules().values():
        tensors += [*module.parameters(), *module.buffers()]
    for optimizer in state.optimizers.values():
        for moments in optimizer.state.values():
            tensors += [v for v in moments.values() if isinstance(v, Tensor)]
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(unique.values()) / 2**20


def measure(case: Case, name: str, options: Options) -> dict[str, Any]:
    """Times one method on one network."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    denoiser = EDMDenoiser(build_net(case.net, case.shape, 10), shape=case.shape, num_classes=10).to(device)
    teacher = denoiser.eval().requires_grad_(False)
    method, steps = build(name, teacher, options, device)
    state = method.init(0)
    state.step = TOTAL // 2  # some methods do other things first than later
    if options.compile:
        for net in networks_of(teacher, state).values():
            if isinstance(net, EDMDenoiser):
                compile_network(net.net)
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.batch, *case.shape, generator=gen, device=device)
    batch = Batch(x, torch.randint(10, (case.batch,), generator=gen, device=device))

    def ours() -> None:
        for _ in range(steps):
            method.step(state, batch)

    for _ in range(3):
        ours()
    with recorded(networks_of(teacher, state)) as calls:
        ours()
    bare, updates = replay(calls), updates_of(state, ours) if calls else lambda: None
    sides = (ours, bare, updates)
    for _ in range(2):
        for side in sides:
            side()
    rounds = [[timed(side, device) for side in sides] for _ in range(options.rounds)]
    least_ours, least_bare, _ = (min(side) for side in zip(*rounds, strict=True))
    return {
        "method": name,
        "step": 1000 * least_ours / steps,
        "bare": 1000 * least_bare / steps,
        "median": statistics.median(a / b for a, b, _ in rounds) - 1 if calls else None,
        "beyond": statistics.median((a - c) / b for a, b, c in rounds) - 1 if calls else None,
        "least": least_ours / least_bare - 1 if calls else None,
        "peaks": (peak(ours, device), peak(bare, device)),
        "held": held(teacher, state),
        "calls": counted(calls),
    }


def main() -> None:
    """Prints a table for each network."""
    options = tyro.cli(Options)
    device = pick_device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, {options.precision}, compile={options.compile}")
    for case in cases(options):
        print(f"\n{case.name}, batch {case.batch}, {options.rounds} rounds\n")
        print(
            "| method | ms | ms bare | overhead | beyond | least | MiB held | more | bare | calls a cycle |"
        )
        print("|" + 10 * "---|")
        for which in chosen_methods(options.methods):
            r = measure(case, which, options)
            ratios = " | ".join("-" if r[k] is None else f"{r[k]:.1%}" for k in ("median", "beyond", "least"))
            memory = f"{r['held']:.0f} | {r['peaks'][0]:.0f} | {r['peaks'][1]:.0f}"
            print(
                f"| {which} | {r['step']:.2f} | {r['bare']:.2f} | {ratios} | {memory} | {r['calls']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
