"""What a step of f-distill does on a small transformer, and sizes of large ones: counted for ``scale.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from network_calls import recorded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.batches import Batch
from distmatch.divergences import divergence
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context, Distiller
from distmatch.methods.state import DistillState
from distmatch.methods.table import resolve_method
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.work import network_work
from distmatch.training.memory import Memory, predict_memory
from distmatch.training.options import DistillOptions

SMALL, SMALL_SHAPE, CLASSES = DiTConfig(width=128, depth=4, heads=4), (4, 16, 16), 10
SHAPE, TOKENS = (4, 64, 64), 1024  # latents of images of 512 x 512, and their patches of 2 x 2


@dataclass(frozen=True)
class Cycle:
    """What a method does in a cycle of steps, at the end of which the student learns.

    Attributes:
        steps: Steps of a cycle.
        units: Operations, in those of a forward pass of the network on the batch.
        gathers: Passes, forward and backward, that need the weights of a large network.
        scatters: Backward passes that give gradients of one.
        moves: Optimizer steps by network.
        small: Messages of at most 1 KiB: norms, statistics of the ratio, and a flag for each step.
    """

    steps: int
    units: float
    gathers: int
    scatters: int
    moves: Counter[str]
    small: int


@contextmanager
def unsent() -> Iterator[list[tuple[str, int]]]:
    """A context in which messages are noted, kind and bytes, and not sent."""
    sent: list[tuple[str, int]] = []

    def reduced(tensor: Tensor, op: Any = None) -> None:
        sent.append(("all_reduce", tensor.nbytes))

    def gathered(parts: list[Tensor], own: Tensor) -> None:
        sent.append(("all_gather", own.nbytes * len(parts)))
        for part in parts:
            part.copy_(own)

    before = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = reduced, gathered
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather = before


def small_run(ranks: Ranks = ALONE, **settings: Any) -> tuple[Distiller, DistillState, EDMDenoiser, int]:
    """f-distill on a small transformer, in the middle of its run; also the steps of a cycle."""
    torch.manual_seed(0)
    net = build_net(SMALL, SMALL_SHAPE, CLASSES)
    teacher = EDMDenoiser(net, shape=SMALL_SHAPE, num_classes=CLASSES).eval().requires_grad_(False)
    method, name = resolve_method("f-distill", None)
    own = method.settings(lr_rampup=0, **settings)
    context = Context(
        teacher=teacher,
        method=method,
        divergence=divergence(name),
        settings=own,
        total_steps=1000,
        device=torch.device("cpu"),
        bf16=False,
        ranks=ranks,
    )
    distiller = build_method(context)
    state = distiller.init(0)
    state.step = 500
    return distiller, state, teacher, own.fake_score_steps


def small_batch(rows: int) -> Batch:
    return Batch(torch.randn(rows, *SMALL_SHAPE), torch.randint(CLASSES, (rows,)))


def observed(**settings: Any) -> Cycle:
    """What a cycle does, counted while it runs as the first of two processes."""
    method, state, teacher, steps = small_run(Ranks(0, 2), **settings)
    batch = small_batch(8)
    modules = {"teacher": teacher, **{k: v for k, v in state.modules().items() if k != "average"}}
    with unsent() as sent:
        for _ in range(steps):
            method.step(state, batch)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            teacher.net(batch.x, torch.zeros(8), torch.zeros(8, dtype=torch.int64))
        moves: Counter[str] = Counter()
        hooks = [
            optimizer.register_step_post_hook(lambda *_, key=key: moves.update([key]))
            for key, optimizer in state.optimizers.items()
        ]
        sent.clear()
        with FlopCounterMode(display=False) as counter:
            for _ in range(steps):
                method.step(state, batch)
        small = sum(size <= 1024 for _, size in sent)
        for hook in hooks:
            hook.remove()
        with recorded(modules) as calls:
            for _ in range(steps):
                method.step(state, batch)
    large = [call for call in calls if call.network != "ratio"]
    return Cycle(
        steps=steps,
        units=counter.get_total_flops() / forward.get_total_flops(),
        gathers=len(large) + sum(len(call.passes) for call in large),
        scatters=sum(call.to_parameters for call in large),
        moves=moves,
        small=small + steps,
    )


@dataclass(frozen=True)
class Network:
    """A transformer at its size, and a training of it.

    Attributes:
        parameters: How many it has.
        work: Operations of a forward pass on a sample.
        blocks: Its blocks.
        kept: Bytes of weights and moments of all roles.
        gradients: Bytes of the gradients of student and fake score, each.
        learned: Parameters that learn, of each of the two.
        weights: Bytes of the weights that a pass needs.
        activations: Bytes of a sample, at the peak, with checkpointing.
    """

    parameters: int
    work: float
    blocks: int
    kept: float
    gradients: float
    learned: float
    weights: float
    activations: float


def network(width: int, depth: int, **settings: Any) -> Network:
    """Sizes from shapes: those of 2 and 4 blocks are computed, and go on in a straight line."""
    config = DiTConfig(width=width, depth=depth, heads=width // 64)
    parameters, products = network_work(config, SHAPE, 1000)
    memories = {(d, b): _memory(width, d, b, settings) for d in (2, 4) for b in (8, 16)}

    def at_depth(value: Any) -> float:
        low, high = value(2), value(4)
        return float(low + (high - low) / 2 * (depth - 2))

    def size(d: int) -> Memory:
        return memories[d, 8]

    return Network(
        parameters=parameters,
        work=2.0 * (products + 2 * depth * TOKENS**2 * width),  # with the products of attention
        blocks=depth,
        kept=at_depth(lambda d: _kept(size(d))),
        gradients=at_depth(lambda d: size(d).sizes["student"].gradients),
        learned=at_depth(lambda d: size(d).sizes["student"].parameters),
        weights=at_depth(lambda d: size(d).sizes["teacher"].weights),
        activations=at_depth(lambda d: (memories[d, 16].passes - memories[d, 8].passes) / 8),
    )


def _kept(memory: Memory) -> int:
    """Bytes of all roles but the discriminator, whose few layers do not grow with the depth."""
    return sum(s.weights + s.optimizer for name, s in memory.sizes.items() if name != "ratio")


def _memory(width: int, depth: int, batch: int, settings: dict[str, Any]) -> Memory:
    options = DistillOptions.of("f-distill")
    run = replace(options.run, batch=batch, precision="bf16", device="cpu")
    options = replace(options, run=run, settings=replace(options.settings, **settings))
    with torch.device("meta"):
        net = build_net(DiTConfig(width=width, depth=depth, heads=width // 64), SHAPE, 1000)
        teacher = EDMDenoiser(net, shape=SHAPE, num_classes=1000).eval().requires_grad_(False)
    return predict_memory(options, teacher)
