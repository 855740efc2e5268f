"""Consistency trajectory models: jumps between any two levels (Kim et al. 2024, arXiv 2310.02279)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.base.seeds import stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import expand, jump
from distmatch.diffusion.noise import Karras
from distmatch.losses import (
    CTM_CELL,
    adaptive_weight,
    ctm_levels,
    denoising_loss,
    edm_weight,
    pseudo_huber,
    pseudo_huber_scale,
)
from distmatch.methods.consistency.adversary import Adversary
from distmatch.methods.consistency.direct import (
    Draws,
    noised_draws,
    training_levels,
)
from distmatch.methods.consistency.pairs import teacher_path, where_needed
from distmatch.methods.consistency.settings import CTMSettings
from distmatch.methods.context import Context, Info, uniform
from distmatch.methods.state import DistillState
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.ema import EMA
from distmatch.nets.shared import unshared


@dataclass
class TrajectoryTerm:
    """Soft consistency of jumps, and denoising at the student's own level.

    A jump from t to s is compared with the teacher's path from t to u and a jump from u to s, both taken on
    to the data by an average of the network, through whose input the gradient flows. The solver crosses one
    of 18 cells of levels at a step, and a number of them that is drawn anew for each batch, from 1 (local
    consistency) up to ``solver_steps``; 17 of them reach any level (global consistency). Denoising and the
    adversarial term, on the same samples, are scaled so that their gradients at the last layer are as large
    as the first one's.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[CTMSettings]
    jumps = True
    needs_data = True

    def __post_init__(self) -> None:
        teacher, cfg = self.context.teacher, self.context.settings
        self._guided = self.context.guided()
        self._levels = training_levels(self.context, self.context.settings)
        self._law = Karras(teacher.sigma_min, self.context.first_sigma)
        self._c = pseudo_huber_scale(cfg.huber, teacher.shape, teacher.sigma_data)
        self.adversary = Adversary(self.context) if self.context.settings.gan_weight > 0 else None

    def notes(self) -> dict[str, Any]:
        """Nothing that the options do not say."""
        return {}

    def prepare(self, state: DistillState, seed: int) -> None:
        """The average network that makes targets, and the discriminator."""
        state.extra["target"] = EMA(state.student.denoiser).module
        record_of(last_layer(state.student.denoiser))
        if self.adversary is not None:
            self.adversary.prepare(state, seed)

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters, and lets the target follow."""
        n, cfg = len(batch.x), self.context.settings
        student, target = state.student.denoiser, state.extra["target"]
        with torch.no_grad():
            torch._foreach_lerp_(*unshared(target, student), 1 - cfg.target_decay)
        sigma = self._levels(n, state)
        share = uniform(n, state.generator, state.ranks)
        to, via = ctm_levels(sigma, self._law, self.cells(state) * CTM_CELL, share)
        draws = noised_draws(self.context, state, batch, sigma.to(batch.x.dtype))
        draws = draws.extended(to=to.to(batch.x.dtype), via=via.to(batch.x.dtype))
        adversary = self.adversary
        if adversary is None or state.step < self.context.settings.gan_after * self.context.total_steps:
            return self._accumulate(state, draws, None)[0]
        draws = draws.extended(**adversary.draw(state, batch.x))
        info, samples = self._accumulate(state, draws, adversary)
        return info | adversary.learn(state, samples, draws)

    def _accumulate(
        self, state: DistillState, draws: Draws, adversary: Adversary | None
    ) -> tuple[Info, Tensor]:
        """Adds the gradients of all terms, scaled to each other, to those of the student's parameters.

        Returns:
            What to log, and the student's clean samples (B, *shape).
        """
        info: Info = {}
        samples: list[Tensor] = []

        def consistency(jump: Tensor, some: Draws) -> Iterator[tuple[str, Tensor]]:
            wanted = self.wanted(state, some, self.cells(state))
            x0 = self.reached(state, jump, some)
            samples.append(x0.detach())
            yield "loss", pseudo_huber(x0, wanted, self._c) / self.context.unit
            if adversary is not None:
                yield "loss_gan", adversary.student_loss(state, x0, some)

        def denoising(clean: Tensor, some: Draws) -> Iterator[tuple[str, Tensor]]:
            weight = edm_weight(some["sigma"], self.context.teacher.sigma_data)
            yield "loss_dsm", denoising_loss(clean, some["x0"], weight)

        at_last: dict[str, Tensor] = {}
        self._balanced(state, draws, self.jump, consistency, at_last, info)
        self._balanced(state, draws, self.denoised, denoising, at_last, info)
        return info, torch.cat(samples)

    def _balanced(
        self,
        state: DistillState,
        draws: Draws,
        call: Callable[[DistillState, Draws], Tensor],
        losses: Callable[[Tensor, Draws], Iterator[tuple[str, Tensor]]],
        at_last: dict[str, Tensor],
        info: Info,
    ) -> None:
        """Adds the gradient of losses of one call of the student, scaled by what they are at the last layer.

        The scales need the gradients of the whole batch, but at one layer only, to which they are taken from
        the output by themselves. One backward pass then serves all losses. A batch in parts makes its calls
        again for it, so that the graph of one part is held.

        Args:
            state: The networks.
            draws: Of the whole batch.
            call: The student's output (b, *shape) for a part.
            losses: Their names and values (b,) for an output and a part.
            at_last: Gradients at the last layer by name, to which these are added; "loss" is the measure.
            info: Where mean losses and scales are put.
        """
        weights = {"loss_dsm": self.context.settings.dsm_weight, "loss_gan": self.context.settings.gan_weight}
        n = len(draws["x0"])
        parts = [draws.index(part) for part in self.context.parts(n)]
        pulls: list[dict[str, Tensor]] = []
        record = record_of(last_layer(state.student.denoiser))
        for some in parts:
            pulls.append({})
            with record.recording(), self.context.autocast():
                out = call(state, some)
                leaf = out.detach().requires_grad_()
                for name, loss in losses(leaf, some):
                    value = loss.sum() / n
                    (pull,) = torch.autograd.grad(value, leaf, retain_graph=True)
                    slope = record.weight_gradient(out, pull)
                    at_last[name] = at_last[name] + slope if name in at_last else slope
                    info[name] = info[name] + value.detach() if name in info else value.detach()
                    pulls[-1][name] = pull
                    del loss, value
        scales: dict[str, Tensor | float] = {}
        for name in pulls[0]:
            at_last[name] = state.ranks.mean(at_last[name])
            scales[name] = 1.0
            if name != "loss":
                scales[name] = weights[name] * adaptive_weight(at_last["loss"], at_last[name])
                info[name.replace("loss", "weight")] = torch.as_tensor(scales[name])
        for some, own in zip(parts, pulls, strict=True):
            if len(parts) > 1:
                with self.context.autocast():
                    out = call(state, some)
            out.backward(torch.stack([scales[name] * pull for name, pull in own.items()]).sum(0))

    def jump(self, state: DistillState, draws: Draws) -> Tensor:
        """The student's jump from t to s, (b, *shape)."""
        x0, sigma = draws["x0"], draws["sigma"]
        y = x0 + expand(sigma, x0) * draws["noise"]
        return jumped(state.student.denoiser, y, sigma, draws["to"], draws.conditioning)

    def reached(self, state: DistillState, jump: Tensor, draws: Draws) -> Tensor:
        """Where a jump to s leads, taken on to the data, (b, *shape)."""
        return self._to_data(state.extra["target"], jump, draws["to"], draws.conditioning)

    def denoised(self, state: DistillState, draws: Draws) -> Tensor:
        """The student's jump to the own level, which denoises, (b, *shape)."""
        x0, sigma = draws["x0"], draws["sigma"]
        y = x0 + expand(sigma, x0) * draws["noise"]
        clean: Tensor = state.student.denoiser(y, sigma, draws.conditioning, target_sigma=sigma)
        return clean

    def cells(self, state: DistillState) -> int:
        """The number of cells that the teacher crosses at this step, uniform from 1 to ``solver_steps``."""
        drawn = stream_seed(state.generator.initial_seed(), f"cells/{state.step}")
        return 1 + drawn % self.context.settings.solver_steps

    @torch.no_grad()
    def wanted(self, state: DistillState, draws: Draws, steps: int) -> Tensor:
        """Where the teacher's path, in ``steps`` steps, and a shorter jump lead, taken on to the data."""
        cfg, target, conditioning = self.context.settings, state.extra["target"], draws.conditioning
        x0, sigma, to, via = (draws[name] for name in ("x0", "sigma", "to", "via"))
        y = x0 + expand(sigma, x0) * draws["noise"]
        middle = teacher_path(
            self._guided, y, sigma, via, conditioning, solver=cfg.teacher_solver, steps=steps
        )
        return self._to_data(target, jumped(target, middle, via, to, conditioning), to, conditioning)

    def _to_data(self, network: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's jump from levels ``sigma`` to the data; what is below sigma_min counts as there."""
        low = self.context.teacher.sigma_min
        return where_needed(sigma > low, network, x, x, sigma.clamp_min(low), conditioning)


def jumped(network: nn.Module, x: Tensor, sigma: Tensor, to: Tensor, conditioning: Conditioning) -> Tensor:
    """A jump that may start at level 0, where it stays."""
    safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    return jump(network, x, safe, torch.where(sigma > 0, to, safe), conditioning)


def last_layer(denoiser: nn.Module) -> nn.Module:
    """The output layer of a built-in network, also inside a wrapper."""
    found = next((part for part in denoiser.modules() if isinstance(part, EDMDenoiser)), None)
    if found is None:
        raise TypeError("only built-in networks support jumps")
    return found.net.get_submodule("last")


class LayerRecord:
    """Input and output of the latest call of a layer, for the gradient of its weight.

    ``torch.autograd.grad`` with respect to a parameter of a wrapped network would bypass what the wrapper
    does with gradients and parameters (DDP sums gradients in hooks, FSDP computes with other parameters than
    those it lists). The layer's output is in the graph in any case, and from there it is one product with
    its input.
    """

    def __init__(self) -> None:
        self._recording = False
        self._seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook."""
        if self._recording:
            self._seen = inputs[0], output
            self._layer = layer

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The latest call is kept while it lasts."""
        self._recording = True
        try:
            yield
        finally:
            self._recording, self._seen = False, None

    def weight_gradient(self, out: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the layer's weight.

        Args:
            out: What was made of the layer's output in the call; its graph is kept.
            gradient: The gradient at ``out``.
        """
        if self._seen is None:
            raise RuntimeError("no call of the layer was recorded")
        seen, output = self._seen
        (at_output,) = torch.autograd.grad(out, output, gradient, retain_graph=True)
        layer = getattr(self._layer, "base_layer", self._layer)  # peft's adapters wrap it
        # Its value is not read: the output is linear in it. Between passes it may be sharded.
        shape: Any = layer.weight.shape
        weight = seen.new_zeros(shape).requires_grad_()
        if isinstance(layer, nn.Conv2d):
            again = F.conv2d(seen.detach(), weight, None, layer.stride, layer.padding)
        else:
            again = F.linear(seen.detach(), weight)
        return torch.autograd.grad(again, weight, at_output)[0]


def record_of(layer: nn.Module) -> LayerRecord:
    """The record that is a hook of a layer; it is made when there is none, and must be before compilation."""
    hooks = layer._forward_hooks
    found = next((hook for hook in hooks.values() if isinstance(hook, LayerRecord)), None)
    if found is None:
        found = LayerRecord()
        layer.register_forward_hook(found)
    return found
