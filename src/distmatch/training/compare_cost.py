"""What a step of a method costs in time, passes and memory, measured on a state that is thrown away."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.methods.table import resolve_method
from distmatch.training.devices import pick_device
from distmatch.training.options import DistillOptions
from distmatch.training.runs import Job

_LEAST_STEPS = 5  # in a block
_MOMENTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of the run: some methods do other things first than later


@dataclass(frozen=True)
class Cost:
    """What a step of a method costs.

    Attributes:
        seconds: Wall-clock time of a step.
        calls: Passes of a step, forward and backward, of batches of the shared size; a network with a tenth
            of the student's parameters counts a tenth. An exact teacher is a formula and has none.
        forward: Forward passes of a step by network, of batches of the shared size.
        backward: Backward passes, likewise.
        parameters: By network.
        memory_mib: Weights, gradients and Adam's moments; activations come on top.
    """

    seconds: float
    calls: float
    forward: dict[str, float]
    backward: dict[str, float]
    parameters: dict[str, int]
    memory_mib: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; what is of a single step says so."""
        parts = asdict(self)
        per_step = ("seconds", "calls", "forward", "backward")
        return {f"{key}_per_step" if key in per_step else key: value for key, value in parts.items()}


def measure_cost(job: Job, batch: int) -> Cost:
    """Times the steps of a job and counts the passes of its networks; the job is of no use afterwards.

    Args:
        job: A prepared distillation.
        batch: Samples that one pass is counted for.
    """
    options = job.options
    if not isinstance(options, DistillOptions):
        raise TypeError("only distillations are compared")
    method, _, config = resolve_method(options.method, options.divergence, options.distill)
    period = config.critic_steps if method.critic else 1
    block = period * -(-_LEAST_STEPS // period)  # whole periods: a step that moves the student costs more
    device = pick_device(options.run.device)
    passes, seconds = Passes(Counter(), Counter()), 0.0
    _advance(job, 1, device)  # what is made once, at the first step, is no part of a step
    for moment in _MOMENTS:
        job.state.step = period * int(moment * options.run.steps / period)
        with count_passes(job.networks, passes):
            _advance(job, block, device)
        began = time.perf_counter()
        _advance(job, block, device)
        seconds += time.perf_counter() - began
    steps = block * len(_MOMENTS)
    parameters = job.parameters()
    forward = {name: passes.forward[name] / (batch * steps) for name in parameters}
    backward = {name: passes.backward[name] / (batch * steps) for name in parameters}
    unit = max(parameters["student"], 1)
    trained = sum(p.numel() for net in job.networks.values() for p in net.parameters() if p.requires_grad)
    return Cost(
        seconds=seconds / steps,
        calls=sum((forward[k] + backward[k]) * min(1.0, parameters[k] / unit) for k in parameters),
        forward=forward,
        backward=backward,
        parameters=parameters,
        memory_mib=round((4 * sum(parameters.values()) + 12 * trained) / 2**20, 1),
    )


def _advance(job: Job, steps: int, device: torch.device) -> None:
    for _ in range(steps):
        job.step(job.state, job.batches(job.state.step))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Passes:
    """Samples that went through each network, forward and backward."""

    forward: Counter[str]
    backward: Counter[str]


@contextmanager
def count_passes(networks: dict[str, nn.Module], passes: Passes) -> Iterator[None]:
    """Counts the samples that pass through networks, whichever of their methods is called.

    The layers are what is watched: a network may be entered through `forward` or for its features. What
    counts is the median over the layers that hold parameters, so that a pass that ends early counts where it
    saw most of the network. A layer that two networks share belongs to the first.

    Args:
        networks: By name.
        passes: What is counted is added to it when the block has ended.
    """
    counts: dict[str, list[Counter[str]]] = {name: [] for name in networks}
    seen: set[int] = set()
    handles = []
    for name, network in networks.items():
        for layer in network.modules():
            if id(layer) in seen or not any(True for _ in layer.parameters(recurse=False)):
                continue
            seen.add(id(layer))
            own: Counter[str] = Counter()
            counts[name].append(own)
            handles.append(layer.register_forward_hook(_Watch(own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layers in counts.items():
            for kind, total in (("forward", passes.forward), ("backward", passes.backward)):
                total[name] += round(statistics.median(own[kind] for own in layers)) if layers else 0


class _Watch:
    """A forward hook that counts the samples of a layer, and of the gradients that come back through it."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim == 0:
            return
        samples = len(output)
        self.counts["forward"] += samples
        if output.requires_grad:
            output.register_hook(lambda grad: self._back(samples))

    def _back(self, samples: int) -> None:
        self.counts["backward"] += samples


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
