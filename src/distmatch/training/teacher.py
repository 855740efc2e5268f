"""Training a diffusion teacher: the EDM loss with label dropout and a weight average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.files import load_into
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.noise import LogNormal
from distmatch.nets.build import build_net
from distmatch.nets.config import NetConfig
from distmatch.nets.edm import EDMDenoiser, edm_loss
from distmatch.nets.ema import EMA, ema_decay
from distmatch.nets.optim import adam, clipped_step, rate, set_rate
from distmatch.training.options import TeacherConfig


@dataclass
class TeacherState:
    """What a checkpoint of a teacher's training holds.

    Attributes:
        denoiser: The network in training.
        average: Its moving average; what is sampled and saved.
        optimiser: Its optimiser.
        generator: The random stream of the steps.
        step: Steps done.
    """

    denoiser: EDMDenoiser
    average: EMA
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restores a state of the same configuration.

        Raises:
            UserError: The network is of another architecture.
        """
        load_into(self.denoiser, tree.get("denoiser", {}), "the checkpoint")
        load_into(self.average.module, tree.get("average", {}), "the checkpoint")
        self.optimiser.load_state_dict(tree["optimiser"])
        self.generator.set_state(tree["generator"].cpu())
        self.step = tree["step"]


@dataclass
class TeacherTraining:
    """The method: ``state = init(seed)``, then ``info = step(state, batch)``.

    Attributes:
        config: The settings.
        net: The network's config.
        shape: Shape of one sample.
        num_classes: Classes; 0 trains without labels.
        sigma_data: Standard deviation of the data.
        total_steps: Length of the run, for the learning-rate schedule.
        device: Where the network lives.
        bf16: Whether the network runs under bfloat16 autocast.
    """

    config: TeacherConfig
    net: NetConfig
    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float
    total_steps: int
    device: torch.device
    bf16: bool = False

    def init(self, seed: int) -> TeacherState:
        """The state before the first step."""
        cfg = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            net = build_net(self.net, self.shape, self.num_classes)
        denoiser = EDMDenoiser(
            net,
            shape=self.shape,
            num_classes=self.num_classes,
            sigma_data=cfg.sigma_data or self.sigma_data,
            sigma_min=cfg.sigma_min,
            sigma_max=cfg.sigma_max,
        ).to(self.device)
        return TeacherState(
            denoiser=denoiser,
            average=EMA(denoiser),
            optimiser=adam(denoiser.parameters(), cfg.lr, (0.9, cfg.beta2), cfg.weight_decay),
            generator=generator(seed, "teacher", self.device),
        )

    def step(self, state: TeacherState, batch: Batch) -> dict[str, Tensor]:
        """One step on a batch of clean samples; changes ``state``, returns loss and gradient norm."""
        cfg = self.config
        x0 = batch.x
        sigma = LogNormal(cfg.noise_mean, cfg.noise_std).sample(len(x0), state.generator)
        noise = torch.randn(x0.shape, generator=state.generator, device=self.device)
        labels = batch.labels if self.num_classes else None
        if labels is not None and cfg.label_dropout > 0:
            draw = torch.rand(len(x0), generator=state.generator, device=self.device)
            hidden = draw < cfg.label_dropout
            labels = torch.where(hidden, -1, labels)
        set_rate(state.optimiser, cfg.lr * rate(state.step, self.total_steps, cfg.lr_rampup, cfg.lr_decay))
        with (
            self._dropout_stream(state),
            torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext(),
        ):
            loss = edm_loss(state.denoiser, x0, sigma, noise, labels).mean()
        loss.backward()
        norm = clipped_step(state.optimiser, list(state.denoiser.parameters()), cfg.grad_clip)
        state.step += 1
        state.average.update(state.denoiser, ema_decay(state.step, half_life=cfg.ema_half_life))
        return {"loss": loss.detach(), "grad_norm": norm}

    @contextmanager
    def _dropout_stream(self, state: TeacherState) -> Iterator[None]:
        """Dropout draws from torch's global stream, which no checkpoint holds: here it is set by the step."""
        if not getattr(self.net, "dropout", 0.0):
            yield
            return
        accelerators = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices=accelerators, device_type=self.device.type):
            torch.manual_seed(stream_seed(state.generator.initial_seed(), f"dropout/{state.step}"))
            yield
