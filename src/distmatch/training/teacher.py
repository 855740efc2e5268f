"""Training a diffusion teacher: one x0 loss with a weight, label dropout and a weight average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE, Ranks
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning, for_model, null_conditioning
from distmatch.diffusion.denoiser import expand
from distmatch.diffusion.geometry.fokker_planck import fokker_planck_loss
from distmatch.diffusion.paths.core import NoisePath, check_prior
from distmatch.diffusion.pfgm import student_t
from distmatch.diffusion.prompts import PromptEncoder
from distmatch.losses import uncertainty_loss
from distmatch.nets.build import build_net
from distmatch.nets.config import NetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.ema import EMA, ema_decay
from distmatch.nets.layers import ConditionEmbedding, Perturbation
from distmatch.nets.optim import adam, scheduled_step
from distmatch.nets.text import TextInput
from distmatch.nets.training_state import TrainingState
from distmatch.nets.uncertainty import LearnedUncertainty
from distmatch.training.objective import Objective, build_objective, denoiser_loss
from distmatch.training.observations import Observations, complete
from distmatch.training.options import TeacherConfig


@dataclass(kw_only=True)
class TeacherState(TrainingState):
    """The training state of a teacher, with one optimizer, ``denoiser``.

    Attributes:
        denoiser: The network in training.
        uncertainty: The log-variance that balances the levels, when it is learned.
    """

    denoiser: EDMDenoiser
    uncertainty: LearnedUncertainty | None = None

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        own: dict[str, nn.Module] = {"denoiser": self.denoiser, **super().modules()}
        return own if self.uncertainty is None else {**own, "uncertainty": self.uncertainty}


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
        device: Device of the network.
        bf16: Whether the network runs under bfloat16 autocast.
        path: A noise path to use instead of the one that the config names.
        text: The text that the network takes; None without.
        prompt_encoder: What makes it of prompts; the teacher keeps it.
        ranks: The processes that train together.
        observations: What is known of each item, when that is all; batches then say which items they are.

    Raises:
        UserError: The choices in the config do not go together.
    """

    config: TeacherConfig
    net: NetConfig
    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float
    total_steps: int
    device: torch.device
    bf16: bool = False
    path: NoisePath | None = None
    text: TextInput | None = None
    prompt_encoder: PromptEncoder | None = None
    ranks: Ranks = ALONE
    observations: Observations | None = None
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        cfg = self.config
        if cfg.condition_noise > 0 and self.num_classes == 0:
            raise UserError(
                "--condition-noise perturbs label embeddings, and there are no labels",
                fix="leave it out, or train on labeled data",
            )
        if cfg.fokker_planck > 0 and self._drops:
            raise UserError(
                "--fokker-planck differentiates the network, which --dropout makes a random one",
                fix="omit one of them",
            )
        conditional = self.num_classes > 0 or self.text is not None
        if cfg.label_dropout not in (0, TeacherConfig.label_dropout) and not conditional:
            raise UserError(
                "--label-dropout drops labels and captions, and there are none",
                fix="leave it out, or train on data with labels or captions",
            )
        sigma_data = math.hypot(cfg.sigma_data or self.sigma_data, cfg.instance_noise)
        self.objective = build_objective(cfg, sigma_data, self.path)

    @property
    def _drops(self) -> bool:
        """Whether the network has dropout."""
        return getattr(self.net, "dropout", 0.0) > 0

    @property
    def warnings(self) -> list[str]:
        """What is allowed and will probably be regretted: a largest noise level too low for the data."""
        chosen = self.objective
        try:
            check_prior(chosen.path, chosen.sigma_data, rho_max=chosen.sigma_max)
        except UserError as error:
            return [str(error)]
        return []

    def init(self, seed: int) -> TeacherState:
        """The state before the first step."""
        cfg = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            net = build_net(self.net, self.shape, self.num_classes, self.text)
        if cfg.condition_noise > 0:
            for part in net.modules():
                if isinstance(part, ConditionEmbedding):
                    part.perturbation = Perturbation(cfg.condition_noise, cfg.condition_noise_kind)
        denoiser = self.objective.denoiser(net, self.shape, self.num_classes).to(self.device)
        if denoiser.text is not None and self.prompt_encoder is not None:
            denoiser.prompt_encoder = self.prompt_encoder
            denoiser.text.set_null(self.prompt_encoder.encode([""]))
        optimizer = adam(denoiser.parameters(), cfg)
        uncertainty = None
        if cfg.learned_uncertainty:
            uncertainty = LearnedUncertainty().to(self.device)
            optimizer.add_param_group({"params": list(uncertainty.parameters()), "weight_decay": 0.0})
        return TeacherState(
            denoiser=denoiser,
            ema=EMA(denoiser),
            optimizers={"denoiser": optimizer},
            generator=generator(seed, "teacher", self.device),
            ranks=self.ranks,
            uncertainty=uncertainty,
        )

    def step(self, state: TeacherState, batch: Batch) -> dict[str, Tensor]:
        """One step on a batch of samples; changes ``state``, returns loss and gradient norm."""
        cfg = self.config
        x0 = batch.x if self.observations is None else self._completed(state, self.observations, batch)
        gen, ranks = state.generator, state.ranks
        sigma = ranks.draw(len(x0), lambda n: self.objective.levels.sample(n, gen))
        if batch.noise is not None:
            sigma = torch.maximum(sigma, batch.noise)
        if cfg.instance_noise > 0:
            x0 = x0 + cfg.instance_noise * ranks.draw(len(x0), lambda n: self._normal(n, gen))
        noise = ranks.draw(len(x0), lambda n: self._noise(n, gen))
        weight = self.objective.weight(sigma)
        conditioning = for_model(state.denoiser, batch.conditioning)
        if conditioning and cfg.label_dropout > 0:
            draw = ranks.draw(len(x0), lambda n: torch.rand(n, generator=gen, device=self.device))
            null = null_conditioning(state.denoiser, len(x0), self.device)
            conditioning = null.where(draw < cfg.label_dropout, conditioning)
        with (
            self._dropout_stream(state),
            torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext(),
        ):
            losses = denoiser_loss(
                state.denoiser, x0, sigma, noise, weight, conditioning, data_noise=batch.noise
            )
        total = losses if state.uncertainty is None else uncertainty_loss(losses, state.uncertainty(sigma))
        total.mean().backward()
        info = {"loss": losses.detach().mean()}
        if cfg.fokker_planck > 0:
            fresh = sigma if batch.noise is None else (sigma**2 - batch.noise**2).clamp_min(0).sqrt()
            info["fokker_planck"] = self._fokker_planck(
                state, x0 + expand(fresh, x0) * noise, sigma, conditioning
            )
        norm = scheduled_step(
            state.optimizers["denoiser"], cfg, state.step, self.total_steps, ranks=state.ranks
        )
        state.step += 1
        state.ema.update(state.denoiser, ema_decay(state.step, half_life=cfg.ema_half_life))
        return {**info, "grad_norm": norm}

    def _completed(self, state: TeacherState, observations: Observations, batch: Batch) -> Tensor:
        """The items of a batch as the model completes them, all of them anew every so many steps."""
        if batch.items is None:
            raise UserError(
                "training from observations needs to know which items a batch consists of",
                fix="pass them: Batch(x, conditioning, items=numbers)",
            )
        turn, rest = divmod(state.step, self.config.observe_every)
        if rest == 0:
            average: Any = state.ema.module
            before = state.memory.get("completed") if turn else None
            # Without gradients more rows fit than in a step, and few at a time would be slow.
            where: dict[str, Any] = {
                "rows": max(256, len(batch.x)),
                "device": self.device,
                "ranks": state.ranks,
            }
            state.memory["completed"] = complete(average, observations, before, turn, **where)
        return state.memory["completed"][batch.items]

    def _fokker_planck(
        self, state: TeacherState, y: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Adds the gradient of the weighted residual at noised samples, in float32; returns the residual."""
        gen, shape = state.generator, (2, *self.shape)
        normal = state.ranks.draw(
            len(y), lambda n: torch.randn((n, *shape), generator=gen, device=self.device)
        )
        probes = torch.where(normal >= 0, 1.0, -1.0).transpose(0, 1)
        with self._dropout_stream(state):
            each = fokker_planck_loss(state.denoiser, y, sigma, probes, conditioning)
        (self.config.fokker_planck * each.mean()).backward()
        return each.detach().mean()

    def result(self, state: TeacherState) -> EDMDenoiser:
        """The teacher on its averaged weights."""
        averaged: Any = state.ema.module
        return averaged

    def _normal(self, n: int, gen: torch.Generator) -> Tensor:
        return torch.randn((n, *self.shape), generator=gen, device=self.device)

    def _noise(self, n: int, gen: torch.Generator) -> Tensor:
        noise = self._normal(n, gen)
        return student_t(noise, self.config.pfgm_dims, gen) if self.config.pfgm_dims > 0 else noise

    @contextmanager
    def _dropout_stream(self, state: TeacherState) -> Iterator[None]:
        """Layers draw from torch's global stream, which no checkpoint holds: here it is set by the step.

        What a layer drops is drawn for the rows of a rank alone, so it depends on the number of ranks.
        """
        if not (self._drops or self.config.condition_noise):
            yield
            return
        accelerators = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices=accelerators, device_type=self.device.type):
            name = f"dropout/{state.step}" + (f"/{state.ranks.index}" if state.ranks.index else "")
            torch.manual_seed(stream_seed(state.generator.initial_seed(), name))
            yield
