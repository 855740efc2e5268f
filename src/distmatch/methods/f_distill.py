"""f-distill: a score difference weighted by h(r), an adversarial term, and their special cases.

With reverse KL the weight is one, which is DMD2; without the adversarial term too, it is Diff-Instruct.

Detach rules (getting these wrong is the classic mistake): the score difference and the weight form a fixed
vector field at the student's samples, so teacher, fake score and h are all detached and their product enters
the backward pass as the gradient of x0. Only the adversarial term is differentiated through a network's
*input*, and only with respect to x0, so no gradient ever reaches teacher, critic or discriminator from the
student's side.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import Denoiser, expand, require_score
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.noise import Karras
from distmatch.divergences import Divergence
from distmatch.methods.config import DistillConfig, Method
from distmatch.methods.objectives import (
    adversarial_critic,
    adversarial_student,
    approximate_r1,
    score_difference,
)
from distmatch.methods.start import Draw, fit_to_teacher, has_network, starting_network
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student, student_levels
from distmatch.nets.config import NetConfig
from distmatch.nets.edm import weighted_error
from distmatch.nets.ema import EMA, ema_decay
from distmatch.nets.optim import adam, clipped_step, rate, set_rate
from distmatch.ratio.discriminator import build_discriminator, choose_source, denoise_with_logit
from distmatch.ratio.normaliser import (
    NormaliserConfig,
    RatioNormaliser,
    batch_normalised,
    effective_sample_size,
)

Info = dict[str, Tensor]


@dataclass
class FDistill:
    """The method: ``state = init(...)``, then ``info = step(state, batch)``.

    Attributes:
        teacher: The frozen teacher, unguided.
        method: f-distill or one of its special cases.
        divergence: Whose weight h is used (ignored by unweighted methods).
        config: The settings.
        total_steps: Length of the run, for the learning-rate schedule.
        device: Where the networks live.
        bf16: Whether networks run under bfloat16 autocast.
        net: Network for student and critic when the teacher has none to copy; None chooses by shape.
    """

    teacher: Denoiser
    method: Method
    divergence: Divergence
    config: DistillConfig
    total_steps: int
    device: torch.device
    bf16: bool = False
    net: NetConfig | None = None

    def __post_init__(self) -> None:
        cfg = self.config
        if self.method.weighted and not self.divergence.differentiable:
            raise UserError(
                f"{self.divergence.name} has no second derivative, so its weight is zero almost everywhere",
                fix="choose another divergence; le_cam and js are bounded too",
            )
        require_score(self.teacher, "a score difference")
        self._guided = Guided(self.teacher, cfg.guidance) if cfg.guidance != 1 else self.teacher
        self._source = choose_source(cfg.ratio_features, self.teacher)
        self.noise = Karras(cfg.noise_low, cfg.noise_high or self.teacher.sigma_max, cfg.noise_rho)

    @property
    def _first_level(self) -> float:
        return self.config.student_sigma or self.teacher.sigma_max

    @property
    def needs_ratio(self) -> bool:
        """Whether a discriminator is trained (and real data are needed)."""
        return self.method.weighted or self.config.gan_weight > 0

    # ------------------------------------------------------------------ init

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step: student and critic start as copies of the teacher.

        Args:
            seed: Seed of the run.
            draw: Gives n clean real samples and their labels; needed only for a teacher without a network to
                copy, to which student and critic are first fitted by regression.
        """
        cfg = self.config
        start = starting_network(self.teacher, self.net, seed, self.device)
        if draw is not None and not has_network(self.teacher):
            seen = Karras(self.noise.low, max(self.noise.high, self._first_level), self.noise.rho)
            fit_to_teacher(start, self.teacher, draw, seen, cfg.fit_steps, seed)
        levels = student_levels(cfg.calls, self._first_level)
        student = Student(start, levels)
        fake = copy.deepcopy(start)
        discriminator = None
        optimisers: dict[str, torch.optim.Optimizer] = {
            "student": self._adam(student.denoiser, cfg.lr),
            "fake": self._adam(fake, cfg.lr_critic),
        }
        if self.needs_ratio:
            features_from = self.teacher if self._source == "teacher" else fake
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_seed(seed, "discriminator"))
                discriminator = build_discriminator(self._source, features_from, self.teacher.num_classes)
            discriminator.to(self.device)
            optimisers["ratio"] = self._adam(discriminator, cfg.lr_ratio)
        normaliser = RatioNormaliser(
            NormaliserConfig(
                bins=cfg.ratio_bins,
                memory=cfg.ratio_memory,
                min_count=cfg.ratio_min_count,
                clip=cfg.ratio_clip,
            ),
            self.device,
        )
        return DistillState(
            student=student,
            average=EMA(student.denoiser),
            fake=fake,
            discriminator=discriminator,
            optimisers=optimisers,
            normaliser=normaliser,
            generator=generator(seed, "distill", self.device),
            ratio_generator=generator(seed, "distill/ratio", self.device),
        )

    def _adam(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        cfg = self.config
        return adam(module.parameters(), lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)

    # ------------------------------------------------------------------ step

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One training step; changes ``state`` and returns what is worth logging (tensors, not synchronised).

        Args:
            state: From :meth:`init`.
            batch: Real samples and labels. The labels are also the student's.
        """
        cfg = self.config
        last = (state.step + 1) % cfg.critic_steps == 0
        student_turn = last and state.step >= cfg.warmup_steps
        critic_turn = cfg.order == "same-batch" or not student_turn
        labels = batch.labels if self.teacher.num_classes else None
        factor = rate(state.step, self.total_steps, cfg.lr_rampup, cfg.lr_decay)
        x0 = self._generate(state, len(batch.x), labels, student_turn)
        info: Info = {}
        if student_turn:
            set_rate(state.optimisers["student"], cfg.lr * factor)
            info |= self._student_step(state, x0, labels)
        if critic_turn:
            set_rate(state.optimisers["fake"], cfg.lr_critic * factor)
            if "ratio" in state.optimisers:
                set_rate(state.optimisers["ratio"], cfg.lr_ratio * factor)
            info |= self._critic_step(state, x0.detach(), batch.x, labels)
        state.step += 1
        return info

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _noised(self, x: Tensor, sigma: Tensor, gen: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=gen, device=self.device, dtype=x.dtype)
        return x + expand(sigma, x) * noise

    def _generate(self, state: DistillState, n: int, labels: Tensor | None, grad: bool) -> Tensor:
        """Student samples; with several calls, by backward simulation (DMD2).

        The student is run as at sampling time up to a random call, and only that call is differentiated.
        """
        student = state.student
        last = 0
        if student.nfe > 1:
            last = stream_seed(state.generator.initial_seed(), f"call/{state.step}") % student.nfe
        z = torch.randn(n, *student.shape, generator=state.generator, device=self.device)
        x = student.start(z)
        with self._autocast():
            for index in range(last):
                with torch.no_grad():
                    x0 = student.call(x, index, labels)
                    z = torch.randn(x0.shape, generator=state.generator, device=self.device)
                    x = student.renoise(x0.float(), z, index + 1)
            with torch.set_grad_enabled(grad):
                return student.call(x, last, labels).float()

    def _student_step(self, state: DistillState, x0: Tensor, labels: Tensor | None) -> Info:
        cfg = self.config
        adversarial = cfg.gan_weight > 0
        sigma = self.noise.sample(len(x0), state.generator)
        leaf = x0.detach().requires_grad_(adversarial)
        x = self._noised(leaf, sigma, state.generator)
        with self._autocast(), torch.set_grad_enabled(adversarial):
            teacher, fake, logit = self._predictions(state, x, sigma, labels)
        info: Info = {}
        weight = None
        if self.method.weighted and logit is not None:
            quantile = self.noise.cdf(sigma)
            ratio = state.normaliser.update(logit, quantile)
            weight = batch_normalised(self.divergence.weight(ratio.log_r))
            state.normaliser.record(weight, quantile)
            info["clip_fraction"] = ratio.clip_fraction
            info["pooled_bins"] = ratio.pooled
            info["ess"] = effective_sample_size(weight)
            info["ratio_mean"], info["weight_mean"] = state.normaliser.bin_means()
        gradient = score_difference(teacher, fake, x0, sigma, weight, scaling=cfg.scaling)
        info["loss_student"] = 0.5 * gradient.square().mean()
        # The hand-made gradient is given to the backward pass as it is: the pseudo-target form
        # 0.5 (x0 - sg(x0 - g))^2 gives the same g but loses digits of it when g is small against x0.
        gradient = gradient / gradient.numel()
        info["grad_dm"] = gradient.norm()
        if adversarial and logit is not None:
            loss = adversarial_student(logit)
            (pull,) = torch.autograd.grad(cfg.gan_weight * loss, leaf)
            info["loss_gan"], info["grad_gan"] = loss.detach(), pull.norm()
            gradient = gradient + pull
        x0.backward(gradient.to(x0.dtype))
        info["grad_norm_student"] = clipped_step(
            state.optimisers["student"], list(state.student.denoiser.parameters()), cfg.grad_clip
        )
        state.updates += 1
        state.average.update(state.student.denoiser, ema_decay(state.updates, half_life=cfg.ema_half_life))
        return info

    def _predictions(
        self, state: DistillState, x: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Teacher's and critic's denoised x and the raw log ratio; one pass each serves all three."""
        head = state.discriminator
        logit = None
        if head is not None and self._source == "teacher":
            teacher, logit = denoise_with_logit(self._guided, head, x, sigma, labels)
        else:
            with torch.no_grad():
                teacher = self._guided(x, sigma, labels)
        if head is not None and self._source == "fake":
            fake, logit = denoise_with_logit(state.fake, head, x, sigma, labels)
        else:
            with torch.no_grad():
                fake = state.fake(x, sigma, labels)
        if head is not None and self._source == "own":
            logit = head(x, sigma, labels)
        return teacher, fake, logit

    def _critic_step(self, state: DistillState, x0: Tensor, real: Tensor, labels: Tensor | None) -> Info:
        """The fake score learns to denoise student samples; the discriminator to tell them from real ones."""
        cfg = self.config
        n, head = len(x0), state.discriminator
        sigma = self.noise.sample(n, state.generator)
        parts = [self._noised(x0, sigma, state.generator)]
        if head is not None:
            parts.append(self._noised(real, sigma, state.ratio_generator))
            if cfg.r1 > 0:
                parts.append(self._noised(parts[1], 0.1 * sigma, state.ratio_generator))
        x, levels = torch.cat(parts), sigma.repeat(len(parts))
        y = None if labels is None else labels.repeat(len(parts))
        info: Info = {}
        logit: Tensor | None = None
        with self._autocast():
            if head is not None and self._source == "fake":
                prediction, logit = denoise_with_logit(state.fake, head, x, levels, y)
            else:
                prediction = state.fake(x[:n], sigma, labels)
                if head is not None:
                    logit = self._frozen_logit(head, x, levels, y)
            loss = weighted_error(prediction[:n], x0, sigma, state.fake.sigma_data).mean()
            info["loss_fake"] = loss.detach()
            if logit is not None:
                logits = logit.chunk(len(parts))
                ratio_loss = adversarial_critic(real=logits[1], fake=logits[0])
                info["loss_ratio"] = ratio_loss.detach()
                if cfg.r1 > 0:
                    ratio_loss = ratio_loss + cfg.r1 * approximate_r1(logits[1], logits[2])
                loss = loss + (cfg.joint_weight if self._source == "fake" else 1.0) * ratio_loss
        loss.backward()
        info["grad_norm_fake"] = clipped_step(
            state.optimisers["fake"], list(state.fake.parameters()), cfg.grad_clip
        )
        if head is not None:
            clipped_step(state.optimisers["ratio"], list(head.parameters()), cfg.grad_clip)
        return info

    def _frozen_logit(self, head: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's logit where nothing but itself learns from it."""
        if self._source == "own":
            return head(x, sigma, labels)
        source: Any = self.teacher  # unguided: only its features are wanted
        with torch.no_grad():
            _, features = source.with_features(x, sigma, labels)
        return head(features, sigma, labels)
