"""How long a watch takes, for dry runs: from a few samples and the statistics alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.solvers import sample_teacher
from distmatch.interop import decode_samples
from distmatch.training.sampling import HEUN
from distmatch.training.watch import LAG_SAMPLES, Watch
from distmatch.training.watch_grid import grid_of

_HEUN_CALLS = 2 * HEUN.steps - 1


def watch_seconds(watch: Watch) -> tuple[float, float]:
    """The seconds of what a watch does once, and of each measurement; nothing is trained or written.

    A feature network that is trained for the first measurement comes on top.

    Args:
        watch: That of a prepared run.
    """
    w = watch.watched
    grid = grid_of(w.batches, w.model, *watch.options.watch_grid)
    shown, few = len(grid) * grid.seeds, min(w.chunk, grid.seeds)  # a condition is drawn at a time
    one = grid.conditioning.index(slice(0, 1))

    def seconds(draw: Callable[[], Tensor], few: int) -> float:
        """Of a sample, drawn and decoded."""
        draw()  # a first call pays for memory and threads
        began = time.perf_counter()
        decode_samples(w.model, draw(), w.chunk, device=w.device).float().cpu()
        return (time.perf_counter() - began) / few

    def one_call(teacher: Denoiser) -> Tensor:
        ends = HEUN.levels(w.model)[[0, -1]]  # one step, the last of Heun's method, which takes one call
        return sample_teacher(
            teacher, few, grid=ends, conditioning=one.expand(few), seed=w.seed, batch=few, device=w.device
        )

    size, sampler = w.state.ranks.size, w.sampler()
    samples = -(-w.against.n // size) if w.against is not None else 0
    samples += 2 * LAG_SAMPLES // size if w.fake_score is not None else 0  # two networks' passes
    many = min(w.chunk, samples)
    statistics = w.against.statistics_seconds() if w.against is not None else 0.0
    each = statistics + shown * seconds(lambda: sampler(few, one.expand(few), w.seed), few)
    if many:
        each += samples * seconds(lambda: sampler(many, one.expand(many), w.seed), many)
    taught = 0.0 if w.guided is None else _HEUN_CALLS * shown * seconds(partial(one_call, w.guided), few)
    return statistics + taught, each


def number_of_looks(watch: Watch, done: int) -> int:
    """How many measurements a run has that continues from a step.

    Args:
        watch: That of the run.
        done: The step.
    """
    steps, every = watch.watched.steps, watch.options.watch_every
    return steps // every - done // every + (steps % every > 0) + (done == 0)
