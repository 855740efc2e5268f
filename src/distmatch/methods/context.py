"""What every method is built from, and what every method offers."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_batch
from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE, Ranks
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning, check_conditioning
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.noise import Karras, LogNormal, Truncated
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.diffusion.paths.steps import even_sigmas
from distmatch.diffusion.prompts import encode_prompts
from distmatch.divergences import Divergence
from distmatch.interop.pipelines.contract import take_exact_times
from distmatch.methods.initialization import Draw, Network, fit_to_teacher, has_network, starting_network
from distmatch.methods.method import Method
from distmatch.methods.sampler import sigmas_at, student_sigmas
from distmatch.methods.settings import (
    FakeScoreSettings,
    GuidedSettings,
    NetworkSettings,
    RoleSettings,
    Settings,
)
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.nets.blocks import recompute_blocks
from distmatch.nets.config import NetConfig
from distmatch.nets.ema import EMA, ema_decay
from distmatch.nets.jump import require_jump, taught_to_jump
from distmatch.nets.optim import adam, moments_to, scheduled_step
from distmatch.nets.shared import role_copy

S = TypeVar("S", bound=Settings, covariant=True)

GUIDANCE = "guidance"
"""The field of the conditioning in which networks receive their guidance scale."""

Info = dict[str, Tensor]
"""What a step reports: scalars to average, lists to keep. Tensors, so that a step never waits."""


@dataclass(frozen=True, kw_only=True)
class Context(Generic[S]):
    """A choice of teacher, method and settings that fit each other.

    Attributes:
        teacher: The frozen teacher, unguided.
        method: The method's entry in the table.
        divergence: For methods that take one; the others ignore it.
        settings: The method's own.
        total_steps: Length of the run, for schedules.
        device: Device of the networks.
        bf16: Whether networks run under bfloat16 autocast.
        net: Fresh network for the student. None copies the teacher's; where it has none, the shape decides.
        ranks: The processes that train together.
        hollow: Whether copies of the teacher's network have no memory until the weights are shared out, and
            then those of the teacher.
    """

    teacher: Denoiser
    method: Method
    divergence: Divergence
    settings: S
    total_steps: int
    device: torch.device
    bf16: bool = False
    net: NetConfig | None = None
    ranks: Ranks = ALONE
    hollow: bool = False

    @property
    def unit(self) -> float:
        """The length in which the data have a standard deviation of 1/2, as those of the papers have.

        Losses are computed in it, so that their constants are the published ones and gradients by parameters
        are the same for data in any unit.
        """
        return 2 * self.teacher.sigma_data

    @property
    def first_sigma(self) -> float:
        """Where the student starts; a default above the teacher's range is reduced to it.

        By default it is the largest level for teachers with a sampler of their own (``shift``), so that the
        student's samples are those of that sampler.
        """
        own, highest = self.settings, self.teacher.sigma_max
        if self.times:
            return sigmas_at(self.teacher, self.times)[0]
        chosen = own.student_sigma * self.teacher.sigma_data or highest
        if own.student_sigma != type(own).student_sigma:
            return chosen
        return highest if self.follows_sampler else min(chosen, highest)

    @property
    def times(self) -> tuple[float, ...]:
        """The explicit times of the student's steps; empty without."""
        return self.settings.student_times if isinstance(self.settings, NetworkSettings) else ()

    @property
    def follows_sampler(self) -> bool:
        """Whether steps and levels are spaced as in the teacher's own sampler, in the time of its path."""
        own = isinstance(self.settings, NetworkSettings)
        return own and getattr(self.teacher, "shift", None) is not None

    @property
    def compared_sigmas(self: Context[FakeScoreSettings]) -> tuple[float, float]:
        """The smallest and the largest level at which student and teacher are compared."""
        low, high = (v * self.teacher.sigma_data for v in (self.settings.noise_low, self.settings.noise_high))
        return low, high or self.teacher.sigma_max

    @cached_property
    def negative(self) -> Conditioning | None:
        """What guidance leads away from; None is the null condition."""
        own = self.settings
        prompt = own.negative_prompt if isinstance(own, GuidedSettings) else ""
        return encode_prompts(self.teacher, [prompt]) if prompt else None

    def guided(self, denoiser: Denoiser | None = None) -> Denoiser:
        """The teacher, or a recorded copy of it, with the guidance of the settings."""
        own = self.settings
        denoiser = self.teacher if denoiser is None else denoiser
        if not isinstance(own, GuidedSettings) or own.guidance == 1:
            return denoiser
        low_high = [level * self.teacher.sigma_data for level in own.guidance_interval]
        return Guided(
            denoiser,
            own.guidance,
            interval=(low_high[0], low_high[1]) if low_high else None,
            negative=self.negative,
            rescale=own.guidance_rescale,
        )

    def taken(self, state: DistillState, batch: Batch) -> Batch:
        """A batch with what the teacher takes of its conditioning, and scales of ``guidance_range``."""
        check_batch("the samples of a batch", batch.x, self.teacher.shape)
        check_conditioning(batch.conditioning, len(batch.x))
        batch, own = batch.taken_by(self.teacher), self.settings
        if not (isinstance(own, GuidedSettings) and own.guidance_range):
            return batch
        low, high = own.guidance_range
        seed = stream_seed(state.generator.initial_seed(), f"guidance/{state.step}")
        gen = torch.Generator().manual_seed(seed)
        share = state.ranks.draw(len(batch.x), lambda n: torch.rand(n, generator=gen))
        scale = (low + (high - low) * share).to(batch.x)
        conditioning = Conditioning({**batch.conditioning, GUIDANCE: scale})
        return Batch(batch.x, conditioning, batch.noise, batch.texts, batch.pool)

    @property
    def copied(self) -> Denoiser | None:
        """The teacher, where the student starts as a copy of it; None for a fresh network."""
        return self.teacher if self.net is None and has_network(self.teacher) else None

    @property
    def recomputes(self) -> bool:
        """Whether networks compute the activations of their blocks again."""
        return isinstance(self.settings, NetworkSettings) and self.settings.checkpointing

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The levels of the student's calls, from the first one down.

        Raises:
            UserError: They do not lie between those of the teacher.
        """
        if self.times:
            return sigmas_at(self.teacher, self.times)
        calls = self.settings.num_steps
        if self.follows_sampler:
            return even_sigmas(self.teacher, calls, self.first_sigma)
        return student_sigmas(calls, self.first_sigma, self.teacher.sigma_data)

    def levels(self, kind: str, low: float, high: float, rho: float = 7.0) -> Karras | PathLevels:
        """Levels between two, uniform in sigma^(1/rho) or in the time of the teacher's sampler.

        Args:
            kind: ``karras``; ``uniform``, in time; or ``auto``: uniform where steps follow the sampler.
            low: Smallest level.
            high: Largest level.
            rho: Of ``karras``.

        Raises:
            UserError: A teacher without a path has no time; a ``rho`` for levels that are uniform in time.
        """
        if kind == "karras" or (kind == "auto" and not self.follows_sampler):
            return Karras(low, high, rho)
        path = getattr(self.teacher, "path", None)
        if path is None:
            raise UserError(
                "noise levels that are uniform in time need a teacher with a noise path",
                got=f"a {type(self.teacher).__name__}",
                fix="use the karras or the log-normal distribution",
            )
        if rho != 7.0:
            raise UserError(
                "--noise-rho does nothing for levels that are uniform in time, the default for pipelines",
                got=rho,
                fix="leave it out, or choose --noise-distribution karras",
            )
        return PathLevels(path, low, high, shift=getattr(self.teacher, "shift", None) or 1.0)

    def log_normal(self, mean: float, std: float, low: float, high: float) -> Truncated:
        """Levels between two, whose log(sigma / sigma_data) has this mean and spread before the cut."""
        return Truncated(LogNormal(mean + math.log(self.teacher.sigma_data), std), low, high)

    def adam(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer of a network, with the shared settings."""
        return adam((p for p in module.parameters() if p.requires_grad), self.settings, lr)

    def move(self, state: DistillState, name: str, lr: float) -> Tensor:
        """Steps an optimizer, whose ``lr`` the schedule scales; returns the norm of the gradient."""
        optimizer = state.optimizers[name]
        if state.offload:
            moments_to(optimizer, self.device)
        norm = scheduled_step(optimizer, self.settings, state.step, self.total_steps, lr, state.ranks)
        if state.offload:
            moments_to(optimizer, torch.device("cpu"))
        return norm

    def follow(self, state: DistillState, trained: nn.Module) -> None:
        """Counts an update of what is trained and brings its average up to date."""
        state.updates += 1
        state.ema.update(trained, ema_decay(state.updates, half_life=self.settings.ema_half_life))

    def network(
        self, seed: int, draw: Draw | None, seen: Karras | None = None, *, jumps: bool = False
    ) -> Network:
        """What the student starts from; a fresh network is fitted at the levels that are ``seen`` first."""
        roles = self.settings if isinstance(self.settings, RoleSettings) else None
        network = starting_network(
            self.teacher, self.net, seed, self.device, roles=roles, jumps=jumps, hollow=self.hollow
        )
        if self.recomputes and self.copied is None:
            recompute_blocks(network)
        if draw is not None and self.copied is None:
            seen = seen or Karras(self.teacher.sigma_min, self.first_sigma)
            fit_to_teacher(network, self.teacher, draw, seen, self.settings.fit_steps, seed)
        return taught_to_jump(require_jump(network)) if jumps else network

    def fake_score(self, student: Network) -> Network:
        """A copy of the teacher's network, which a smaller student leaves as it is; else of the student's."""
        if self.copied is not None or not has_network(self.teacher):
            copied: Network = role_copy(student)
            return copied
        roles = self.settings if isinstance(self.settings, RoleSettings) else None
        fake = starting_network(self.teacher, None, 0, self.device, roles=roles, hollow=self.hollow)
        if self.recomputes:
            recompute_blocks(fake)
        return fake

    def state(self, seed: int, student: Student, trained: nn.Module, **others: Any) -> DistillState:
        """The state before the first step, with an average of what is trained."""
        if student.sampler == "stochastic" and (student.nfe > 1 or self.method.forward_mode):
            take_exact_times(student.denoiser)
        return DistillState(
            student=student,
            ema=EMA(trained),
            generator=generator(seed, "distill", self.device),
            ratio_generator=generator(seed, "distill/ratio", self.device),
            ranks=self.ranks,
            offload=isinstance(self.settings, NetworkSettings) and self.settings.offload,
            **others,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that networks run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def parts(self, n: int) -> list[slice]:
        """The parts of a batch of ``n`` in which network passes are made, about equal."""
        accumulate = self.settings.accumulate if isinstance(self.settings, NetworkSettings) else 1
        count = max(1, min(accumulate, n))
        edges = [n * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


class Distiller(Protocol):
    """A method: ``state = init(...)``, then ``info = step(state, batch)``, in the end ``result(...)``."""

    @property
    def needs_data(self) -> bool:
        """Whether the batches must hold real samples."""
        ...

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step.

        Args:
            seed: Seed of the run.
            draw: Gives n clean real samples and their labels; needed only for a teacher without a network to
                copy, to which the first networks are fitted by regression. None on resuming.
        """
        ...

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One training step; changes ``state`` and returns what is worth logging (tensors, not synchronized).

        Args:
            state: From :meth:`init`.
            batch: Real samples and labels. The labels are also the student's.
        """
        ...

    def notes(self) -> dict[str, Any]:
        """Entries for the start event of the log: noise bins and the like."""
        ...

    def result(self, state: DistillState, info: dict[str, Any] | None = None) -> Student:
        """The student that the run ends with, on its averaged weights; ``info`` is saved with it."""
        ...


def averaged(state: DistillState, info: dict[str, Any] | None) -> Student:
    """The student on its averaged weights."""
    network: Any = state.ema.module
    return state.student.around(network, state.student.sigmas, info or {})


def standard_normal(like: Tensor, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """Noise of the shape, dtype and device of ``like``, the rows of this rank."""

    def sample(n: int) -> Tensor:
        shape = (n, *like.shape[1:])
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    return ranks.draw(len(like), sample)


def uniform(n: int, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """Uniform numbers in [0, 1), (n,), on the generator's device, those of this rank."""
    return ranks.draw(n, lambda m: torch.rand(m, generator=generator, device=generator.device))


def noised(x: Tensor, sigma: Tensor, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """``x + sigma eps`` for samples (B, ...) and levels (B,)."""
    return x + expand(sigma, x) * standard_normal(x, generator, ranks)
