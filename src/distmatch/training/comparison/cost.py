"""What a step of a method costs in time, passes and memory, measured on a state that is thrown away."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.ranks import Ranks
from distmatch.methods.settings import FakeScoreSettings
from distmatch.training.comparison.options import Price
from distmatch.training.devices import pick_device
from distmatch.training.options import DistillOptions
from distmatch.training.runs import Job

_LEAST_STEPS = 5  # in a block
_ONCE_SECONDS, _ONCE_CALLS = 20.0, 5.0  # a first step that costs so many others makes something once
_SLOW = 2.0  # seconds of a first step after which the fewest others do, where nothing is compared
_MOMENTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of the run: some methods do other things first than later


@dataclass(frozen=True)
class Cost:
    """What a step of a method costs.

    Attributes:
        step: A step, on the average over the run. Its calls are passes, forward and backward, of batches of
            the shared size; a network with a tenth of the student's parameters counts a tenth. An exact
            teacher is a formula and has none.
        once: What is made once, at the first step; nothing for most methods.
        forward: Forward passes of a step by network, of batches of the shared size.
        backward: Backward passes, likewise.
        parameters: By network.
        memory_mib: Weights, gradients and Adam's moments; activations come on top.
    """

    step: Price
    once: Price
    forward: dict[str, float]
    backward: dict[str, float]
    parameters: dict[str, int]
    memory_mib: float

    def seconds(self, steps: int) -> float:
        """Wall-clock seconds of a run."""
        return self.once.seconds + steps * self.step.seconds

    def of_main(self, ranks: Ranks) -> Cost:
        """What the first process measured, on all of them."""
        prices = [self.step.seconds, self.step.calls, self.once.seconds, self.once.calls]
        ranks.broadcast([values := torch.tensor(prices, dtype=torch.float64)])
        found = values.tolist()
        return replace(self, step=Price(*found[:2]), once=Price(*found[2:]))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "seconds_per_step": self.step.seconds,
            "calls_per_step": self.step.calls,
            "forward_per_step": self.forward,
            "backward_per_step": self.backward,
            "seconds_once": self.once.seconds,
            "calls_once": self.once.calls,
            "parameters": self.parameters,
            "memory_mib": self.memory_mib,
        }


def measure_cost(job: Job, batch: float) -> Cost:
    """Times the steps of a job and counts the passes of its networks; the job is of no use afterwards.

    Args:
        job: A prepared distillation.
        batch: Samples that one pass is counted for.
    """
    options = job.options
    if not isinstance(options, DistillOptions):
        raise TypeError("only distillations are compared")
    period, block = _steps_to_time(options)
    device = pick_device(options.run.device)
    parameters = job.parameters()
    first, others, seconds = Passes(), Passes(), 0.0
    with count_passes(job.networks, first):
        first_seconds = _advance(job, 1, device)
    for moment in _MOMENTS:
        job.state.step = period * int(moment * options.run.steps / period)
        with count_passes(job.networks, others):
            _advance(job, block, device)
        seconds += _advance(job, block, device)
    steps = block * len(_MOMENTS)
    batch = batch / job.state.ranks.size  # that of a process, which counts its own passes
    step = Price(seconds / steps, others.calls(parameters) / (batch * steps))
    once = Price(first_seconds - step.seconds, first.calls(parameters) / batch - step.calls)
    more = _made_once(once.seconds, step.seconds) or once.calls > _ONCE_CALLS * step.calls
    return Cost(
        step=step,
        once=Price(max(0.0, once.seconds), max(0.0, once.calls)) if more else Price(0.0, 0.0),
        forward={name: others.forward[name] / (batch * steps) for name in parameters},
        backward={name: others.backward[name] / (batch * steps) for name in parameters},
        parameters=parameters,
        memory_mib=round(sum(size.bytes for size in job.sizes().values()) / 2**20, 1),
    )


def step_times(job: Job, device: torch.device, *, repeats: int = 1) -> tuple[float, float]:
    """Times a few steps of a job, which is of no use afterwards.

    Args:
        job: A prepared run.
        device: Where it runs.
        repeats: How often the same steps are timed; the shortest time counts.

    Returns:
        The seconds of what is made once, at the first step (nothing for most methods); the seconds of a step
        on the average over fake score and student steps, taken from the middle of the run.
    """
    options = job.options
    period, block = _steps_to_time(options) if isinstance(options, DistillOptions) else (1, _LEAST_STEPS)
    first = _advance(job, 1, device)
    if first > _SLOW:
        block = period
    job.state.step = period * (options.run.steps // (2 * period))
    if options.run.compile:  # the student's step is compiled when it first comes
        first += _advance(job, block, device)
        job.state.step -= block
    middle, times = job.state.step, []
    for _ in range(repeats):
        job.state.step = middle
        times.append(_advance(job, block, device) / block)
    seconds = min(times)
    return (first - seconds if _made_once(first - seconds, seconds) else 0.0), seconds


def _steps_to_time(options: DistillOptions) -> tuple[int, int]:
    """A period of fake-score and student steps, and the number of whole periods: student steps cost more."""
    own = options.settings
    period = own.fake_score_steps if isinstance(own, FakeScoreSettings) else 1
    return period, period * -(-_LEAST_STEPS // period)


def _made_once(seconds: float, step: float) -> bool:
    return seconds > _ONCE_SECONDS * step


def _advance(job: Job, steps: int, device: torch.device) -> float:
    """Makes some steps; the seconds that they took, the same on all processes."""
    began = time.perf_counter()
    for _ in range(steps):
        job.step(job.state, job.batches(job.state.step))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # How many steps are timed depends on it, and all processes have to make the same ones.
    return job.state.ranks.largest(round(1e9 * (time.perf_counter() - began))) / 1e9


@dataclass
class Passes:
    """Samples that went through each network, forward and backward."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    def calls(self, parameters: dict[str, int]) -> float:
        """All of them, each network counted by its share of the student's parameters, at most 1."""
        unit = max(parameters["student"], 1)
        both = {name: self.forward[name] + self.backward[name] for name in parameters}
        return sum(number * min(1.0, parameters[name] / unit) for name, number in both.items())


@contextmanager
def count_passes(networks: dict[str, nn.Module], passes: Passes) -> Iterator[None]:
    """Counts the samples that pass through networks, whichever of their methods is called.

    The layers are what is watched: a network may be entered through `forward` or for its features. What
    counts is the mean over the layers that hold parameters, each by how many, so that a pass that ends early
    counts for the share of the network that it saw. A layer that two networks share belongs to the first.

    Args:
        networks: By name.
        passes: What is counted is added to it when the block has ended.
    """
    counts: dict[str, list[tuple[int, Counter[str]]]] = {name: [] for name in networks}
    seen: set[int] = set()
    handles = []
    for name, network in networks.items():
        for layer in network.modules():
            size = sum(p.numel() for p in layer.parameters(recurse=False))
            if id(layer) in seen or size == 0:
                continue
            seen.add(id(layer))
            own: Counter[str] = Counter()
            counts[name].append((size, own))
            handles.append(layer.register_forward_hook(partial(_count, own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layers in counts.items():
            for kind, total in (("forward", passes.forward), ("backward", passes.backward)):
                samples = sum(size * own[kind] for size, own in layers)
                total[name] += round(samples / max(1, sum(size for size, _ in layers)))


def _count(counts: Counter[str], layer: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that counts the samples of a layer, and of the gradients that come back through it."""
    if not isinstance(output, Tensor) or output.ndim == 0:
        return
    samples = len(output)
    counts["forward"] += samples
    if output.requires_grad:
        output.register_hook(lambda grad: counts.update(backward=samples))


class PeakMemory:
    """The most memory that something took, from its start on, above what the process held before.

    On an accelerator this is what tensors took. On Linux it is the peak of the resident set, which the kernel
    sets back on request; elsewhere the peak of one part of a process is not known. The resident set also
    holds what the allocator keeps of earlier runs, so that small figures are rough.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _resident("VmRSS") if _reset_peak() else None

    def bytes(self) -> int | None:
        """Peak so far above the start, or None where it is not known."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _reset_peak() -> bool:
    """Gives back what the allocator keeps of earlier runs, and starts a new peak."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _resident(key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None
