"""Time and peak memory of a distillation step against the bare network calls that it needs.

    python benchmarks/step.py                     # MLP and UNet on this machine's default device
    python benchmarks/step.py --net unet --batch 64 --device cuda --precision bf16 --compile

Both sides run in the same process, in turns: `rounds` times a whole cycle of K steps, then the bare calls of
a cycle. The bare calls are forward and backward passes of student, teacher, fake score and discriminator on
ready inputs, without optimisers, averages, noise, ratios or losses. The figure is the median over the rounds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro
from distmatch.methods.f_distill import FDistill

from distmatch.data.batches import Batch
from distmatch.divergences import divergence
from distmatch.methods.config import DistillConfig, resolve_method
from distmatch.methods.state import DistillState
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.devices import compile_network, pick_device
from distmatch.training.environment import peak_memory


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    net: Literal["mlp", "unet", "both"] = "both"
    batch: int | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    divergence: str = "js"
    rounds: int = 15
    width: int = 64
    """Width of the UNet."""
    only: Literal["", "ours", "bare"] = ""
    """Run two cycles of one side alone and print the process's peak memory in MiB (used on CPUs)."""


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
    unet = Case(f"unet {options.width}, 32x32 colour", unet_config, (3, 32, 32), options.batch or 16)
    return {"mlp": [mlp], "unet": [unet], "both": [mlp, unet]}[options.net]


def bare_cycle(method: FDistill, state: DistillState, batch: Batch, options: Options) -> Callable[[], None]:
    """The network calls of one cycle of K steps, on ready inputs."""
    k = method.config.critic_steps
    x, y = batch.x, batch.labels
    n = len(x)
    sigma = torch.full((n,), 1.0, device=x.device)
    two_x, two_sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
    two_y = torch.cat([y, y]) if y is not None else None
    teacher: Any = method.teacher
    head: Any = state.discriminator
    student, fake = state.student, state.fake

    def autocast() -> Any:
        bf16 = options.precision == "bf16"
        return torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext()

    def critic() -> None:
        with autocast():
            loss = fake(x, sigma, y).float().mean()
            with torch.no_grad():
                _, features = teacher.with_features(two_x, two_sigma, two_y)
            (loss + head(features, two_sigma, two_y).mean()).backward()

    def cycle() -> None:
        for _ in range(k - 1):
            with torch.no_grad(), autocast():
                student.call(x, 0, y)
            critic()
        with autocast():
            x0 = student.call(x, 0, y).float()
            leaf = x0.detach().requires_grad_()
            _, features = teacher.with_features(leaf, sigma, y)
            logit = head(features, sigma, y)
            with torch.no_grad():
                fake(leaf, sigma, y)
        (pull,) = torch.autograd.grad(logit.float().mean(), leaf)
        x0.backward(pull)
        critic()
        for net in (student.denoiser, fake, head):
            net.zero_grad(set_to_none=True)

    return cycle


def timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def alone(case: Case, options: Options, side: str) -> float:
    """Peak resident MiB of a fresh process that runs one side only."""
    command = [sys.executable, __file__, "--net", case.name.split()[0], "--batch", str(case.batch)]
    command += ["--device", options.device, "--precision", options.precision, "--width", str(options.width)]
    answer = subprocess.run([*command, "--only", side], capture_output=True, text=True, check=True)
    return float(answer.stdout.split()[-1])


def measure(case: Case, options: Options) -> dict[str, Any]:
    """Times one case; returns medians in milliseconds and peak memory."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    denoiser = EDMDenoiser(build_net(case.net, case.shape, 10), shape=case.shape, num_classes=10).to(device)
    teacher = denoiser.eval().requires_grad_(False)
    chosen, name, config = resolve_method("f-distill", options.divergence, DistillConfig())
    method = FDistill(
        teacher=teacher,
        method=chosen,
        divergence=divergence(name),
        config=replace(config, student_sigma=2.5),
        total_steps=1000,
        device=device,
        bf16=options.precision == "bf16",
    )
    state = method.init(0)
    if options.compile:
        for net in (teacher, state.student.denoiser, state.fake):
            compile_network(net.net)
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.batch, *case.shape, generator=gen, device=device)
    batch = Batch(x, torch.randint(10, (case.batch,), generator=gen, device=device))
    k = config.critic_steps
    bare = bare_cycle(method, state, batch, options)

    def ours() -> None:
        for _ in range(k):
            method.step(state, batch)

    if options.only:
        for _ in range(2):
            (ours if options.only == "ours" else bare)()
        return {"peak": peak_memory()["cpu"] or 0}
    for _ in range(3):
        ours()
        bare()
    pairs = [(timed(ours, device), timed(bare, device)) for _ in range(options.rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    if device.type == "cuda":
        peaks = []
        for action in (ours, bare):
            torch.cuda.reset_peak_memory_stats(device)
            action()
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device) / 2**20)
        memory = f"{peaks[0]:.0f} / {peaks[1]:.0f} MiB"
    else:
        memory = " / ".join(f"{alone(case, options, side):.0f}" for side in ("ours", "bare")) + " MiB"
    return {
        "case": case.name,
        "batch": case.batch,
        "step": 1000 * statistics.median(a for a, _ in pairs) / k,
        "bare": 1000 * statistics.median(b for _, b in pairs) / k,
        "overhead": ratio - 1,
        "memory": memory,
    }


def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options)
    if options.only:
        print(measure(cases(options)[0], options)["peak"] / 2**20)
        return
    device = pick_device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, {options.precision}, compile={options.compile}")
    print("| case | batch | ms a step | ms bare calls | overhead | peak memory (ours / bare) |")
    print("|---|---|---|---|---|---|")
    for case in cases(options):
        r = measure(case, options)
        timing = f"{r['step']:.2f} | {r['bare']:.2f} | {r['overhead']:.1%}"
        print(f"| {r['case']} | {r['batch']} | {timing} | {r['memory']} |")


if __name__ == "__main__":
    main()
