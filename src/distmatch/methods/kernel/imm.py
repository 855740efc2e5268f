r"""Inductive moment matching: a jump t -> s is compared with a jump r -> s from a little below, by a kernel.

Zhou et al. 2025, arXiv 2503.07565. From data, with one network of two noise levels, without fake score and
teacher. M samples, the particles, share the levels s <= r < t. Their jumps from t are drawn to their jumps
from r, which are held fixed, by the MMD^2 of a Laplace kernel among the particles. With one particle and a
quadratic kernel that is consistency training.

In this frame the interpolant of DDIM from y at level t to level s, at prediction g, is
(s / t) y + (1 - s / t) g: what :func:`~distmatch.diffusion.denoiser.jump` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import LABEL, UNCONDITIONAL, Conditioning
from distmatch.diffusion.denoiser import expand, jump, require_score
from distmatch.losses.kernel import imm_loss, imm_lower_level, imm_weight
from distmatch.methods.consistency.direct import Draws, mean_backward
from distmatch.methods.context import Context, Info
from distmatch.methods.kernel.settings import IMMSettings
from distmatch.methods.state import DistillState


@dataclass
class InductiveMatching:
    """The loss of inductive moment matching.

    Attributes:
        context: Teacher, whose network the student starts from, and settings.
    """

    context: Context[IMMSettings]
    needs_data = True
    jumps = True

    def __post_init__(self) -> None:
        require_score(self.context.teacher, "a jump between samples with Gaussian noise")

    def notes(self) -> dict[str, Any]:
        """Nothing that the options do not say."""
        return {}

    def prepare(self, state: DistillState, seed: int) -> None:
        """Only the student is needed."""

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters."""
        return mean_backward(self.context, self.draw(state, batch), lambda part: self.loss(state, part))

    def draw(self, state: DistillState, batch: Batch) -> Draws:
        """Groups of samples with their noise and levels: tensors whose rows are groups.

        Samples of the same class share a group as far as they can, since only those are compared. Samples
        that do not fill a group are excluded at random, not by class.

        Raises:
            UserError: The batch is smaller than a group.
        """
        context, own, gen, ranks = self.context, self.context.settings, state.generator, state.ranks
        particles = own.imm_particles
        count = len(batch.x) * ranks.size // particles
        if count == 0:
            raise UserError(
                "a batch must hold a group of imm",
                got=f"{len(batch.x)} samples",
                expected=f"--imm-particles {particles} or more",
                fix="raise --batch or lower --imm-particles",
            )
        # Groups are of the whole batch; each rank draws all of them and keeps its own.
        x0, labels = ranks.gather(batch.x), batch.conditioning.label
        if labels is not None:
            labels = ranks.gather(labels)
            if len(x0) > count * particles:
                chance = torch.randperm(len(x0), generator=gen, device=gen.device)[: count * particles]
                x0, labels = x0[chance], labels[chance]
            order = labels.argsort(stable=True)
            x0, labels = x0[order], labels[order]
        x0 = x0[: count * particles].unflatten(0, (count, particles))
        noise = torch.randn(x0.shape, generator=gen, device=x0.device, dtype=x0.dtype)
        sigma_data, high = context.teacher.sigma_data, context.first_sigma
        ends = [level / (level + sigma_data) for level in (context.teacher.sigma_min, high)]
        share = torch.rand(2, count, generator=gen, device=x0.device, dtype=x0.dtype)
        time = ends[0] + (ends[1] - ends[0]) * share[0]
        # Neither to where it starts, where the unit of length is 0, nor to level 0, from where none starts.
        target = time * share[1].clamp(1e-6, 0.999)
        t, s = (sigma_data * u / (1 - u) for u in (time, target))
        r = imm_lower_level(t, s, context.teacher.sigma_min, high, own.imm_halvings)
        conditioning = UNCONDITIONAL
        if labels is not None:
            conditioning = Conditioning({LABEL: labels.unflatten(0, (count, particles))})
        tensors = {"x0": x0, "noise": noise, "t": t, "s": s, "r": r, "time": time}
        return Draws(tensors, conditioning).index(ranks.rows(count, "groups of --imm-particles"))

    def loss(
        self, state: DistillState, draws: Draws, kernel: Literal["laplace", "quadratic"] = "laplace"
    ) -> tuple[Tensor, Info]:
        """The loss of each group, (g,).

        Args:
            state: The student.
            draws: From :meth:`draw`, or a part of it.
            kernel: As for :func:`~distmatch.losses.imm_loss`.
        """
        x0, noise, labels = draws["x0"], draws["noise"], draws.conditioning.label
        network = state.student.denoiser
        groups = x0.shape[:2]

        def jumped(level: Tensor) -> Tensor:
            """The particles after their jump from ``level`` (g,) to s, (g, M, d)."""
            y = (x0 + expand(level, x0) * noise).flatten(0, 1)
            start, end = (v.repeat_interleave(groups[1]) for v in (level, draws["s"]))
            classes = None if labels is None else labels.flatten()
            return jump(network, y, start, end, classes).reshape(*groups, -1)

        with torch.no_grad():
            fixed = jumped(draws["r"])
        loss = imm_loss(
            jumped(draws["t"]),
            fixed,
            draws["t"],
            draws["s"],
            self.context.teacher.sigma_data,
            labels,
            kernel=kernel,
        )
        return imm_weight(draws["time"], self.context.settings.imm_offset) * loss, {}
