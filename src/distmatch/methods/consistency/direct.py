"""The loop of methods that train one network on one loss, without a fake score.

A loss is a :class:`~distmatch.methods.matching.scores.StudentTerm`, as it is for a method that adds it to a
score difference: it draws its random numbers for the whole batch, adds its gradient to those of the student's
parameters part by part, and updates its own networks besides the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.diffusion.noise import NoiseLevels
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.methods.consistency.settings import LevelSettings
from distmatch.methods.context import Context, Info, averaged, standard_normal
from distmatch.methods.initialization import Draw
from distmatch.methods.matching.scores import StudentTerm
from distmatch.methods.settings import GammaSettings, NetworkSettings, Settings
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.nets.jump import require_jump


@dataclass(frozen=True)
class Draws:
    """What a loss reads of a batch and of the random stream.

    Attributes:
        tensors: By name, of as many rows as the batch.
        conditioning: What the samples are conditioned on.
    """

    tensors: dict[str, Tensor]
    conditioning: Conditioning = UNCONDITIONAL

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def extended(self, **tensors: Tensor) -> Draws:
        """The same with further tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def index(self, part: slice) -> Draws:
        """A part of the batch."""
        tensors = {name: tensor[part] for name, tensor in self.tensors.items()}
        return Draws(tensors, self.conditioning.index(part))


class Term(StudentTerm, Protocol):
    """A single loss."""

    @property
    def jumps(self) -> bool:
        """Whether the student must receive the target noise level."""
        ...

    def notes(self) -> dict[str, Any]:
        """What the log says once."""
        ...


@dataclass
class Direct:
    """A method with one loss: ``state = init(...)``, then ``info = step(state, batch)``.

    Attributes:
        context: Teacher, method and settings.
        term: The loss.
    """

    context: Context[NetworkSettings]
    term: Term

    def __post_init__(self) -> None:
        if self.term.jumps and isinstance(self.context.copied, nn.Module):
            require_jump(self.context.copied)
        own = self.context.settings
        self.gamma = gamma = own.gamma if isinstance(own, GammaSettings) else 0.0
        if gamma > 0 and len(self.context.sigmas) == 1:
            raise UserError(
                "--gamma is the fresh noise between steps, and a one-step student has none",
                got=f"--gamma {gamma:g} with --num-steps 1",
                fix="leave it out, or raise --num-steps",
            )

    @property
    def needs_data(self) -> bool:
        """Whether the batches must hold real samples."""
        return self.term.needs_data

    def notes(self) -> dict[str, Any]:
        """What the log says once about the loss."""
        return self.term.notes()

    def result(self, state: DistillState, info: dict[str, Any] | None = None) -> Student:
        """The student on its averaged weights."""
        return averaged(state, info)

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step: the student starts as a copy of the teacher."""
        context, cfg = self.context, self.context.settings
        start = context.network(seed, draw, jumps=self.term.jumps)
        student = Student(
            start,
            context.sigmas,
            sampler="gamma" if self.term.jumps else "stochastic",
            gamma=self.gamma,
        )
        optimizers = {"student": context.adam(student.denoiser, cfg.lr)}
        state = context.state(seed, student, student.denoiser, optimizers=optimizers)
        self.term.prepare(state, seed)
        return state

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One step of the student."""
        context, cfg = self.context, self.context.settings
        info = self.term.backward(state, context.taken(state, batch))
        info["grad_norm_student"] = context.move(state, "student", cfg.lr)
        context.follow(state, state.student.denoiser)
        state.step += 1
        return info


def training_levels(context: Context[Settings], own: LevelSettings) -> Callable[[int, DistillState], Tensor]:
    """The noise levels of training: a function of how many and of a state, on the device of its generator.

    They lie between the teacher's sigma_min and the level at which the student starts, by the law of the
    settings; the tails of the log-normal that are cut off are shared out in proportion.
    """
    low, high = context.teacher.sigma_min, context.first_sigma
    if own.level_distribution == "log-normal":
        return drawn_from(context.log_normal(own.level_mean, own.level_std, low, high))
    return drawn_from(context.levels(own.level_distribution, low, high))


def drawn_from(levels: NoiseLevels | PathLevels) -> Callable[[int, DistillState], Tensor]:
    """Draws from a distribution of levels: this rank's, from the stream of a state."""
    return lambda n, state: state.ranks.draw(n, lambda m: levels.sample(m, state.generator))


def mean_backward(
    context: Context[Settings], draws: Draws, loss: Callable[[Draws], tuple[Tensor, Info]]
) -> Info:
    """Adds the gradient of a mean loss to the parameters, in parts, as of the whole batch.

    Args:
        context: How many parts, and in which precision.
        draws: What the loss reads, for the whole batch.
        loss: The loss of each sample of a part, (b,), and what to log of each, (b,).

    Returns:
        ``loss`` and the logged values of the loss, as means over the batch.
    """
    n = len(draws)
    total: Info = {}
    for part in context.parts(n):
        with context.autocast():
            values, found = loss(draws.index(part))
        (values.sum() / n).backward()
        for name, value in {"loss": values, **found}.items():
            share = value.detach().sum() / n
            total[name] = total[name] + share if name in total else share
    return total


def noised_draws(context: Context[Settings], state: DistillState, batch: Batch, sigma: Tensor) -> Draws:
    """Clean samples, their noise and levels, and their conditioning where there are any."""
    noise = standard_normal(batch.x, state.generator, state.ranks)
    return Draws({"x0": batch.x, "noise": noise, "sigma": sigma}, batch.conditioning)
