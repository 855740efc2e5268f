"""Regression on pairs of noise and teacher sample, which holds a student to all modes (arXiv 2311.18828).

A deterministic solver takes each noise to one sample. A student that is also asked to give that sample for
that noise cannot leave a mode out, at the price of being tied to the teacher's map. DMD compares the two by
LPIPS, whose network has to be downloaded; here they are compared by their values, pixel by pixel, which
punishes detail that is only displaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.base.seeds import generator, initial_noise, stream_seed
from distmatch.data.batches import Batch, Pool
from distmatch.data.classes import checked_conditioning
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.conditioning import LABEL, Conditioning, for_model, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.solvers import default_grid, snap_grid, solve
from distmatch.losses import pair_regression_loss
from distmatch.methods.context import GUIDANCE, Context, Info
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.state import DistillState


@dataclass(frozen=True)
class Pairs:
    """What the teacher makes of given noise.

    Attributes:
        noise: Unit normal noise, (n, *shape) float32 on the CPU. Teacher and student both start from it, each
            scaled to its own first level.
        samples: The teacher's samples, (n, *shape).
        conditioning: What the samples of numbers (B,) are conditioned on. Of prompts, numbers alone are kept.
    """

    noise: Tensor
    samples: Tensor
    conditioning: Callable[[Tensor], Conditioning]


def make_pairs(
    teacher: Denoiser,
    n: int,
    *,
    steps: int,
    seed: int,
    device: torch.device | str,
    batch: int = 1024,
    pool: Pool | None = None,
    guidance_range: tuple[float, ...] = (),
) -> Pairs:
    """Samples a teacher with Heun's method and keeps the noise.

    Args:
        teacher: The teacher; guided, if the student shall be.
        n: Number of pairs.
        steps: Steps of the solver, from ``sigma_max`` to 0.
        seed: Seed of noise and conditioning: the same seed gives the same pairs, whatever ``batch`` is.
        device: Where to compute.
        batch: Samples at a time.
        pool: What the conditioning is drawn from, for teachers that take more than labels.
        guidance_range: As the setting.

    Raises:
        UserError: A teacher that takes more than labels, without a pool.
    """
    conditioning = _conditioning(teacher, n, seed, pool, guidance_range)
    noise = initial_noise(n, teacher.shape, seed)
    levels = _levels(teacher, steps)
    samples = []
    with progress(n, desc="pairs of the teacher", delay=5.0) as bar:
        for rows in torch.arange(n).split(batch):
            start = noise[rows].to(device) * levels[0]
            samples.append(solve(teacher, start, levels, conditioning=conditioning(rows).to(device)).y.cpu())
            bar.update(len(rows))
    return Pairs(noise, torch.cat(samples), conditioning)


def about_pairs(own: DMDSettings) -> str:
    """What pairs cost, for people."""
    return (
        f"{own.pairs:,} pairs of noise and teacher sample are made before the first step, in "
        f"{own.pair_calls:,} network calls; --pairs and --pair-steps make them fewer"
    )


def _levels(teacher: Denoiser, steps: int) -> list[float]:
    """The levels of the teacher's own sampler."""
    model = teacher.inner if isinstance(teacher, Guided) else teacher
    with no_dispatch():  # numbers, even where tensors are fake
        levels = default_grid(teacher, steps)
        if isinstance(model, PredictionDenoiser) and model.levels == "snap":
            levels = snap_grid(levels, model.path)
        found: list[float] = levels.tolist()
    return found


def _conditioning(
    teacher: Denoiser, n: int, seed: int, pool: Pool | None, guidance_range: tuple[float, ...]
) -> Callable[[Tensor], Conditioning]:
    """What each of n pairs is conditioned on: rows of the pool, or drawn labels."""
    if not set(spec_of(teacher)) - {LABEL}:
        return checked_conditioning(None, n, teacher, seed).index
    if pool is None:
        raise UserError(
            "pairs of noise and sample need the prompts that they are drawn from",
            got="batches without them",
            fix="pass them with each batch: Batch(x, conditioning, pool=Pool(size, conditioning_of_numbers))",
        )
    rows = torch.randint(pool.size, (n,), generator=generator(seed, "prompts"))
    scales = torch.rand(n, generator=generator(seed, "guidance"))

    def of(chosen: Tensor) -> Conditioning:
        found = for_model(teacher, pool.conditioning(rows[chosen]))
        if not guidance_range:
            return found
        low, high = guidance_range
        return Conditioning({**found, GUIDANCE: low + (high - low) * scales[chosen]})

    return of


def require_one_step(steps: int, method: str) -> None:
    """Refuses pairs for a student of several steps.

    Raises:
        UserError: It has several.
    """
    if steps != 1:
        raise UserError(
            "pairs assign one noise to one sample, and a few-step student draws more noise between its steps",
            got=f"{steps} steps with --method {method}",
            fix="leave --num-steps and --student-times out, or use --method dmd2",
        )


@dataclass
class PairRegression:
    """The regression as a further loss of a student of one call.

    The pairs are no part of the state: they are made when they are first needed, again after resuming, and
    are the same again.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[DMDSettings]
    needs_data: bool = False
    _seed: int = field(default=0, init=False, repr=False)
    _made: Pairs | None = field(default=None, init=False, repr=False)
    _seconds: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        require_one_step(len(self.context.sigmas), self.context.method.name)

    @property
    def config(self) -> DMDSettings:
        """The settings of the method."""
        return self.context.settings

    def prepare(self, state: DistillState, seed: int) -> None:
        """Remembers the seed of the run."""
        self._seed, self._made = stream_seed(seed, "pairs"), None

    def pairs(self, batch: Batch | None = None) -> Pairs:
        """All pairs; made at the first call, as many at a time as in a part of the batch, if there is one."""
        if self._made is None:
            context, began = self.context, time.perf_counter()
            self._made = make_pairs(
                context.guided(),
                self.config.pairs,
                steps=self.config.pair_steps,
                seed=self._seed,
                device=context.device,
                **self._like(batch),
            )
            self._seconds = time.perf_counter() - began
        return self._made

    def seconds_of(self, pairs: int) -> float:
        """What so many pairs take, by those that were made; 0 before."""
        return self._seconds * pairs / self.config.pairs

    def _like(self, batch: Batch | None) -> dict[str, Any]:
        if batch is None or not set(spec_of(self.context.teacher)) - {LABEL}:
            return {}
        size = max(part.stop - part.start for part in self.context.parts(len(batch.x)))
        return {"batch": size, "pool": batch.pool, "guidance_range": self.config.guidance_range}

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient on as many pairs as the batch has samples, drawn anew at each step."""
        recorded, context, student = self.pairs(batch), self.context, state.student
        n = len(batch.x)
        gen = generator(self._seed, f"step/{state.step}")
        rows = len(recorded.noise)
        chosen = state.ranks.draw(n, lambda m: torch.randint(rows, (m,), generator=gen))
        z = recorded.noise[chosen].to(context.device)
        target = recorded.samples[chosen].to(context.device)
        cond = recorded.conditioning(chosen).to(context.device)
        c, unit = self.config.pair_c * context.teacher.sigma_data, context.unit
        total = torch.zeros((), device=context.device)
        for part in context.parts(n):
            with context.autocast():
                made_of = student.call(student.start(z[part]), 0, cond.index(part)).float()
            made, wanted = made_of / unit, target[part] / unit
            loss = pair_regression_loss(made, wanted, kind=self.config.pair_loss, c=c / unit).sum() / n
            (self.config.pair_weight * loss).backward()
            total = total + loss.detach()
        return {"loss_pairs": total}
