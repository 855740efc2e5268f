"""DisBack: the student follows the teacher's own path towards it, backwards (arXiv 2408.15991).

At the start the student's samples are where the teacher was not trained. So a copy of the teacher is
first degraded: trained to denoise samples of the untrained student, and recorded at intervals. The student is
then drawn to the recorded copies in reverse order, each of them near, and to the teacher itself in the end.

The degraded copy is the fake score: the first stage is the base method with a fixed student, and the second
    starts with a fake score adapted to the student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.methods.context import Context, Info
from distmatch.methods.initialization import Draw, Network
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.settings import BacktrackSettings
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.nets.ema import copy_weights
from distmatch.nets.shared import role_copy


@dataclass(frozen=True)
class Path:
    """The recorded copies 0 (the teacher) to ``copies`` (fully degraded), and when they serve.

    Attributes:
        copies: N. Copies 1 to N - 1 are kept as targets; copy N is where the fake score starts.
        degrade_steps: Fake score steps from one copy to the next.
        interval: Student updates towards each kept copy.
    """

    copies: int
    degrade_steps: int
    interval: int

    @property
    def recorded_after(self) -> int:
        """Steps of the first stage."""
        return self.copies * self.degrade_steps

    @property
    def teacher_from(self) -> int:
        """The student update from which the teacher itself is the target."""
        return max(0, self.copies - 1) * self.interval

    def target(self, updates: int) -> int:
        """The copy that the student is drawn to after this many updates, from N - 1 down to 0."""
        return max(0, self.copies - 1 - updates // self.interval)


def backtrack_path(context: Context[BacktrackSettings]) -> Path:
    """The path of a set-up, with lengths of its own where they are left at 0.

    Raises:
        UserError: The run would end before the teacher itself becomes the target.
    """
    wanted, every, total = context.settings, context.settings.fake_score_steps, context.total_steps
    n = wanted.backtrack
    degrade = wanted.backtrack_degrade_steps or max(1, min(40, total // (10 * n)))
    updates = max(0, total - n * degrade) // every
    interval = wanted.backtrack_interval or max(1, min(50, updates // (3 * max(1, n - 1))))
    path = Path(n, degrade, interval)
    if updates <= path.teacher_from:
        raise UserError(
            "the run would end before the student is drawn to the teacher itself",
            got=f"{total} steps; {path.recorded_after} record {n} copies of the teacher, which serve for "
            f"{path.teacher_from} student updates, one every {every} steps",
            expected=f"{path.recorded_after + every * (path.teacher_from + 1)} steps or more",
            fix="raise --steps, or lower --backtrack, --backtrack-degrade-steps or --backtrack-interval",
        )
    return path


@dataclass
class Backtracking:
    """A method with a fake score whose first targets are recorded copies of its teacher.

    The copies are networks of the state, so a checkpoint holds them; which of them is the target follows from
    the student updates done. Guidance acts on all targets alike.

    Attributes:
        base: The method; its student is made to wait until the copies are recorded.
        path: When the copies are recorded, and when they serve.
    """

    base: Matching
    path: Path

    def __post_init__(self) -> None:
        context = self.base.context
        wait = max(context.settings.warmup_steps, self.path.recorded_after)
        context = replace(context, settings=replace(context.settings, warmup_steps=wait))
        self.base = replace(self.base, context=context, target=self._target)

    @property
    def needs_data(self) -> bool:
        """As the base method."""
        return self.base.needs_data

    def _target(self, state: DistillState) -> Denoiser:
        """The denoiser that the student is drawn to now."""
        index = self.path.target(state.updates)
        if index == 0:
            return self.base.compared.guided
        recorded: Any = state.extra[_name(index)]
        return self.base.context.guided(recorded)

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step, with room for the copies."""
        state = self.base.init(seed, draw)
        for index in range(1, self.path.copies):
            state.extra[_name(index)] = role_copy(_fake(state)).requires_grad_(False)
        return state

    def step(self, state: DistillState, batch: Batch) -> Info:
        """A step of the base method; in the first stage, copies the fake score where one is due."""
        info = self.base.step(state, batch)
        index, rest = divmod(state.step, self.path.degrade_steps)
        if rest == 0 and index < self.path.copies:
            copy_weights(_fake(state), state.extra[_name(index)])
        return info

    def fake_score_error(
        self, state: DistillState, conditioning: Conditioning, n: int, generator: torch.Generator
    ) -> Tensor:
        """As of the base method."""
        return self.base.fake_score_error(state, conditioning, n, generator)

    def notes(self) -> dict[str, Any]:
        """Those of the base method, and when the copies serve."""
        return {
            **self.base.notes(),
            "recording_steps": self.path.recorded_after,
            "teacher_from_update": self.path.teacher_from,
        }

    def result(self, state: DistillState, info: dict[str, Any] | None = None) -> Student:
        """As the base method."""
        return self.base.result(state, info)


def _name(index: int) -> str:
    return f"target_{index}"


def _fake(state: DistillState) -> Network:
    if state.fake_score is None:
        raise RuntimeError("this state has no fake score")
    return state.fake_score
