"""DPM-OT: an optimal transport map replaces the first steps of the teacher.

Li et al. 2023, arXiv 2307.11308. The teacher is run from noise down to a level, and what comes out is stored.
Gaussian noise, the same that is used for sampling, is then mapped to these latents by the semi-discrete
optimal map, whose heights are all that is trained. Samples start at the latent of their noise and take the
last calls of the teacher's own network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import require_score
from distmatch.diffusion.solvers import grid, sample_teacher
from distmatch.methods.context import Context, Info
from distmatch.methods.initialization import Draw
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.methods.transport.semi_discrete import BrenierMap
from distmatch.methods.transport.settings import DPMOTSettings


@dataclass
class Transport:
    """The method: ``state = init(...)``, then ``info = step(state, batch)``.

    The map is kept in ``state.extra``, and ``state.ema`` holds its moving average: the network is the
    teacher's and does not change.

    Attributes:
        context: Teacher, method and settings.
    """

    context: Context[DPMOTSettings]
    needs_data = False

    def __post_init__(self) -> None:
        teacher, first = self.context.teacher, self.context.first_sigma
        require_score(teacher, "a draw from the posterior between two noise levels")
        if not teacher.sigma_min < first < teacher.sigma_max:
            raise UserError(
                "the noise level of the stored latents must lie within the teacher's range",
                got=f"--student-sigma {first / teacher.sigma_data:.4g}, in units of sigma_data",
                expected=f"above {teacher.sigma_min / teacher.sigma_data:.4g} and below "
                f"{teacher.sigma_max / teacher.sigma_data:.4g}",
                fix="the last steps of the teacher start there; 1.4 is a common value",
            )

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step; the latents are made at that step, and kept in checkpoints."""
        context, own = self.context, self.context.settings
        network = context.network(seed, draw).requires_grad_(False)
        groups = max(context.teacher.num_classes, 1)
        transport = BrenierMap(torch.zeros(groups, own.bank, *context.teacher.shape, device=context.device))
        levels = context.sigmas
        student = Student(network, levels, None, "posterior", transport=transport)
        optimizers = {"transport": context.adam(transport, own.lr)}
        return context.state(seed, student, transport, optimizers=optimizers, extra={"transport": transport})

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One step of Adam on the heights. Nothing of the batch is read."""
        context, own = self.context, self.context.settings
        transport = _map(state)
        if state.step == 0:
            transport.targets.copy_(self.bank(state))
            transport.restart()
        doubled = min(own.doublings, state.step * (own.doublings + 1) // context.total_steps)
        draws = own.cell_draws * own.bank * 2**doubled
        energy = transport.descend(self._noise(draws, state.generator))
        if transport.heights.grad is None:
            raise RuntimeError("the heights have no gradient")
        shares = transport.heights.grad + 1 / own.bank
        info = {"loss": energy, "empty_cells": (shares <= 0).float().mean()}
        info["grad_norm_student"] = context.move(state, "transport", own.lr)
        transport.recenter()
        context.follow(state, transport)
        state.step += 1
        return info

    def notes(self) -> dict[str, Any]:
        """Nothing that the options do not say."""
        return {}

    def result(self, state: DistillState, info: dict[str, Any] | None = None) -> Student:
        """The student on the averaged heights, once it is known which seams may be smoothed."""
        own = self.context.settings
        transport: Any = copy.deepcopy(state.ema.module)
        gen = generator(state.generator.initial_seed(), "seams", self.context.device)
        rejected = transport.find_angles(
            self._noise(own.cell_draws * own.bank, gen), own.blend, own.blend_angle
        )
        about = {**(info or {}), "bank": own.bank, "rejected_seams": round(float(rejected), 4)}
        return Student(state.student.denoiser, state.student.sigmas, about, "posterior", transport=transport)

    def _noise(self, draws: int, gen: torch.Generator) -> Tensor:
        """Noise for each class, (G, draws, d)."""
        groups = max(self.context.teacher.num_classes, 1)
        size = torch.Size(self.context.teacher.shape).numel()
        return torch.randn(groups, draws, size, generator=gen, device=self.context.device)

    def bank(self, state: DistillState) -> Tensor:
        """Latents of the teacher at the student's first level, (G, N, *shape)."""
        context, teacher, own = self.context, self.context.teacher, self.context.settings
        groups = max(teacher.num_classes, 1)
        labels = torch.arange(groups).repeat_interleave(own.bank) if teacher.num_classes else None
        with progress(groups * own.bank, desc="latents of the teacher", delay=5.0) as bar, torch.no_grad():
            found = sample_teacher(
                teacher,
                groups * own.bank,
                grid=grid("karras", own.bank_steps, context.first_sigma, teacher.sigma_max, to_zero=False),
                conditioning=labels,
                # Not the stream of evaluation, whose teacher samples these latents would otherwise lead to.
                seed=stream_seed(state.generator.initial_seed(), "bank"),
                device=context.device,
                on_batch=bar.update,
            )
        return found.reshape(groups, own.bank, *teacher.shape).to(context.device)


def _map(state: DistillState) -> BrenierMap:
    transport = state.extra["transport"]
    if not isinstance(transport, BrenierMap):
        raise RuntimeError("this state contains no map")
    return transport
