"""What every solver costs on top of the network calls that it makes.

    python benchmarks/solver_overhead.py                 # UNet, batch 64, on this machine's default device
    python benchmarks/solver_overhead.py --width 32 --threads 1

A solve and the same number of bare calls on ready inputs run in turns in one process. `overhead` is the
median of their ratio over the rounds, less one; it varies by a few percent. `own time` is what the solver
spends outside the network within one and the same solve, against the time inside: it is steady, and what to
look at. On a CPU, times are CPU seconds of this process, which other processes do not add to.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import PredictorCorrector, Solver, find_solver, grid, solve
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.devices import pick_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    net: Literal["unet", "mlp"] = "unet"
    width: int = 64
    """Width of the UNet."""
    batch: int = 64
    steps: int = 5
    rounds: int = 3
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"


class Timed:
    """Passes calls on and adds up the time inside."""

    def __init__(self, inner: EDMDenoiser, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.shape, self.num_classes, self.sigma_data = inner.shape, inner.num_classes, inner.sigma_data
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max
        self.inside = 0.0

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """A timed call."""
        began = now(self.device)
        out = self.inner(x, sigma, conditioning)
        self.inside += now(self.device) - began
        return out


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


SOLVERS: list[str | Solver] = [
    *("euler", "ddim", "heun", "dpmpp-1", "dpmpp-2m", "tab:2", "rhoab:2", "ipndm:4", "rhork:kutta3"),
    *("rhork:rk4", "hb:0.8", "hb-2m:0.8", "ghvb:1.8", "ghvb:3.8", "heun:40", "ddim:1", "dpmpp-sde"),
    *("dpmpp-2m-sde", "euler-maruyama", "reverse-diffusion", "pc", PredictorCorrector(norm="batch")),
    "rk45:1e-1:1e-1",
]


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    torch.manual_seed(0)
    shape = (3, 32, 32) if options.net == "unet" else (1, 8, 8)
    config = UNetConfig(width=options.width, multipliers=(1, 2, 2)) if options.net == "unet" else MLPConfig()
    net = (
        EDMDenoiser(build_net(config, shape, 0), shape=shape, num_classes=0)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    y = 80 * torch.randn(options.batch, *shape, device=device)
    sigma = torch.ones(options.batch, device=device)
    noise = SampleNoise(0, torch.arange(options.batch), shape, device)
    levels = grid("karras", options.steps, 0.002, 80.0)
    net(y, sigma)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}")
    print("| solver | calls | ms a call | overhead | own time |")
    print("|---|---|---|---|---|")
    for solver in SOLVERS:
        # An untrained network has no flow worth adapting to: the adaptive solver gets a short way.
        way = [1.0, 0.8] if str(solver).startswith("rk45") else levels
        ratios, own, bare_call = [], [], []
        for _ in range(options.rounds):
            timed = Timed(net, device)
            began = now(device)
            calls = solve(timed, y, way, find_solver(solver), noise=noise, path="vp").calls
            whole = now(device) - began
            began = now(device)
            for _ in range(calls):
                net(y, sigma)
            bare = now(device) - began
            ratios.append(whole / bare - 1)
            own.append((whole - timed.inside) / timed.inside)
            bare_call.append(1000 * bare / calls)
        figures = f"{min(bare_call):.1f} | {statistics.median(ratios):.1%} | {statistics.median(own):.2%}"
        label = solver if isinstance(solver, str) else 'pc, norm="batch"'
        print(f"| {label} | {calls} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
