"""The loop of all methods with a fake score: who learns when, from which samples, and what reaches whom.

What is detached (getting this wrong is the classic mistake): every objective ends in one gradient at the
student's samples, which enters the backward pass as the gradient of x0. For a score difference teacher, fake
score and weight are constants in it. The Fisher family differentiates teacher and fake score with respect to
their *input*, and the adversarial term the discriminator with respect to its own; both only down to x0, so no
gradient ever reaches teacher, fake score or discriminator from the student's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.noise import Karras, NoiseLevels, Truncated
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.losses import posterior_noise
from distmatch.methods.context import Context, Info, averaged, standard_normal
from distmatch.methods.initialization import Draw
from distmatch.methods.matching.fake_score import fake_score_backward, fake_score_error
from distmatch.methods.matching.generator import GeneratorGradient, generator_gradient
from distmatch.methods.matching.moments import levels_between
from distmatch.methods.matching.networks import Comparison
from distmatch.methods.matching.scores import MatchingObjective, StudentTerm
from distmatch.methods.sampler import Sampler
from distmatch.methods.settings import (
    AdversarialSettings,
    FakeScoreSettings,
    NoiseDistributionSettings,
    RatioSettings,
)
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.ratio.discriminator import build_discriminator, choose_source
from distmatch.ratio.normalizer import NormalizerConfig, RatioNormalizer


@dataclass
class Matching:
    """A method with a fake score: ``state = init(...)``, then ``info = step(state, batch)``.

    Attributes:
        context: Teacher, method and settings.
        objective: The student's gradient and the fake score's loss.
        terms: Further losses of the student.
        target: The denoiser that plays the teacher at a state; None is the (guided) teacher throughout.
        sampler: How a student of several steps gets from one noise level to the next. With
            ``posterior`` its samples are also compared with the teacher's on draws from the posterior,
            between the noise levels of their step and of the next.
        scaled_adversary: As in :class:`~distmatch.methods.matching.networks.Comparison`.
        first: The first step at which the objective moves the student; the fake score learns before, too.
    """

    context: Context[FakeScoreSettings]
    objective: MatchingObjective
    terms: tuple[StudentTerm, ...] = ()
    target: Callable[[DistillState], Denoiser] | None = None
    sampler: Sampler = "stochastic"
    scaled_adversary: bool = False
    first: float = 0.0

    def __post_init__(self) -> None:
        cfg, teacher = self.config, self.context.teacher
        require_score(teacher, "a score difference")
        self.adversary = cfg if isinstance(cfg, AdversarialSettings) else AdversarialSettings(gan_weight=0.0)
        low, high = self.context.compared_sigmas
        if not low < high:
            first, last = low / teacher.sigma_data, high / teacher.sigma_data
            raise UserError(
                "student and teacher are compared between two noise levels",
                got=f"--noise-low {first:.4g} and --noise-high {last:.4g}, in units of sigma_data",
                expected="the first one below the second",
            )
        kind = cfg.noise_distribution if isinstance(cfg, NoiseDistributionSettings) else "auto"
        spacing = "auto" if kind == "log-normal" else kind
        self._range = self.context.levels(spacing, low, high, cfg.noise_rho)
        self.noise: Karras | PathLevels | Truncated = self._range
        self.fake_score_noise: Karras | PathLevels | Truncated = self._range
        if isinstance(cfg, NoiseDistributionSettings):
            log_normal = partial(self.context.log_normal, cfg.noise_mean, cfg.noise_std)
            if cfg.noise_distribution == "log-normal":
                self.noise = self.fake_score_noise = log_normal(low, high)
            if cfg.fake_score_distribution == "log-normal":
                self.fake_score_noise = log_normal(teacher.sigma_min, teacher.sigma_max)
        self.compared = Comparison(
            context=self.context,
            objective=self.objective,
            guided=self.context.guided(),
            target=self.target,
            source=choose_source(self.adversary.ratio_features, teacher),
            noise=self.noise,
            gan_weight=self.adversary.gan_weight,
            scaled_adversary=self.scaled_adversary,
            r1=self.adversary.r1,
            joint_weight=self.adversary.joint_weight,
        )
        self._bins = NormalizerConfig()
        if isinstance(cfg, RatioSettings):
            self._bins = NormalizerConfig(
                bins=cfg.ratio_bins,
                memory=cfg.ratio_memory,
                min_count=cfg.ratio_min_count,
                clip=cfg.ratio_clip,
            )
        self.sigmas = self.context.sigmas
        if self.sampler == "posterior":
            for call in range(len(self.sigmas)):
                levels_between(self.sigmas, call, self._range)  # refuses calls outside of the levels

    @property
    def config(self) -> FakeScoreSettings:
        """The settings of the method."""
        return self.context.settings

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher, unguided."""
        return self.context.teacher

    @property
    def needs_ratio(self) -> bool:
        """Whether a discriminator is trained (and real data are needed)."""
        return self.objective.needs_ratio or self.adversary.gan_weight > 0

    @property
    def needs_data(self) -> bool:
        """Whether a discriminator or a further term reads real samples."""
        return self.needs_ratio or any(term.needs_data for term in self.terms)

    @property
    def least_steps(self) -> int:
        """Steps of a run in which the student is updated once; see :meth:`step`."""
        every = self.config.fake_score_steps
        return every * (self.config.warmup_steps // every + 1)

    def notes(self) -> dict[str, Any]:
        """The borders of the noise bins."""
        bins = torch.linspace(0, 1, self._bins.bins + 1, dtype=torch.float64)
        return {"sigma_bins": self.noise.quantile(bins).tolist()}

    def result(self, state: DistillState, info: dict[str, Any] | None = None) -> Student:
        """The student on its averaged weights."""
        return averaged(state, info)

    def init(self, seed: int, draw: Draw | None = None) -> DistillState:
        """The state before the first step: copies of the teacher, but for a student of its own size."""
        cfg, context = self.config, self.context
        ends = (self.noise, self.fake_score_noise)
        high = max(context.first_sigma, *(distribution.high for distribution in ends))
        seen = Karras(min(distribution.low for distribution in ends), high, cfg.noise_rho)
        start = context.network(seed, draw, seen)
        student = Student(start, self.sigmas, sampler=self.sampler)
        fake = context.fake_score(start)
        discriminator = self._discriminator(fake, seed) if self.needs_ratio else None
        optimizers = {
            "student": context.adam(student.denoiser, cfg.lr),
            "fake": context.adam(fake, cfg.lr_fake_score),
        }
        if discriminator is not None:
            optimizers["ratio"] = context.adam(discriminator, self.adversary.lr_discriminator)
        state = context.state(
            seed,
            student,
            student.denoiser,
            fake_score=fake,
            discriminator=discriminator,
            optimizers=optimizers,
            normalizer=RatioNormalizer(self._bins, context.device),
        )
        for term in self.terms:
            term.prepare(state, seed)
        return state

    def _discriminator(self, fake: Denoiser, seed: int) -> nn.Module:
        source = self.compared.source
        features_from = self.teacher if source == "teacher" else fake
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "discriminator"))
            head = build_discriminator(source, features_from, self.teacher.num_classes)
        return head.to(self.context.device)

    def step(self, state: DistillState, batch: Batch) -> Info:
        """One training step: the fake score's, the student's, or both on the same samples."""
        cfg = self.config
        last = (state.step + 1) % cfg.fake_score_steps == 0
        student_turn = last and state.step >= cfg.warmup_steps
        fake_score_turn = cfg.order == "same-batch" or not student_turn
        batch = self.context.taken(state, batch)
        conditioning = batch.conditioning
        x, call = self._simulate(state, len(batch.x), conditioning)
        whole = len(self.context.parts(len(x))) == 1
        objective_turn = student_turn and state.step >= self.first
        x0 = self._call(state, x, call, conditioning, grad=objective_turn and whole)
        info: Info = {}
        if student_turn:
            if objective_turn:
                found = self._gradient(state, x0.detach(), x, call, conditioning)
                info |= found.info
                self._backward(state, x0 if whole else None, x, call, conditioning, found.gradient)
            for term in self.terms:
                info |= term.backward(state, batch)
            info |= self._move_student(state)
        if fake_score_turn:
            sigma, noise = self._noise_on(state, x0.detach(), x, call, self.fake_score_noise)
            info |= fake_score_backward(
                self.compared, state, x0.detach(), sigma, noise, batch.x, conditioning
            )
            info |= self._move_critic(state)
        state.step += 1
        return info

    @torch.no_grad()
    def fake_score_error(
        self, state: DistillState, conditioning: Conditioning, n: int, generator: torch.Generator
    ) -> Tensor:
        """The fake score's loss on fresh samples of the student, at the noise levels that it learns at, ().

        Where the student is faster than its fake score, it is above the losses of the last training steps.

        Args:
            state: The state, which is not changed.
            conditioning: What the samples are conditioned on.
            n: Number of samples, of this rank.
            generator: The stream of their noise, in the same state on all ranks.
        """
        probe = replace(state, generator=generator)
        x, call = self._simulate(probe, n, conditioning)
        x0 = self._call(probe, x, call, conditioning, grad=False)
        sigma, noise = self._noise_on(probe, x0, x, call, self.fake_score_noise)
        return fake_score_error(self.compared, probe, x0, sigma, noise, conditioning)

    # ---------------------------------------------------------- the student's samples

    def _simulate(self, state: DistillState, n: int, conditioning: Conditioning) -> tuple[Tensor, int]:
        """The input of the call that is trained, and that call's number.

        With several calls the student is run as at sampling time up to a random call (backward simulation,
        DMD2), and only that call will be differentiated.
        """
        student = state.student
        last = 0
        if student.nfe > 1:
            last = stream_seed(state.generator.initial_seed(), f"call/{state.step}") % student.nfe
        like = torch.empty(n, *student.shape, device=self.context.device)
        x = student.start(standard_normal(like, state.generator, state.ranks))
        for index in range(last):
            x0 = self._call(state, x, index, conditioning, grad=False)
            z = standard_normal(like, state.generator, state.ranks)
            x = student.advance(x, x0, z, index + 1)
        return x, last

    def _call(
        self, state: DistillState, x: Tensor, index: int, conditioning: Conditioning, grad: bool
    ) -> Tensor:
        """One call of the student, in parts, in float32."""
        with self.context.autocast(), torch.set_grad_enabled(grad):
            parts = [
                state.student.call(x[part], index, conditioning.index(part)).float()
                for part in self.context.parts(len(x))
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gradient(
        self, state: DistillState, x0: Tensor, x: Tensor, call: int, conditioning: Conditioning
    ) -> GeneratorGradient:
        """The gradient of everything with respect to the student's samples."""
        sigma, noise = self._noise_on(state, x0, x, call, self.noise)
        return generator_gradient(self.compared, state, x0, sigma, noise, conditioning)

    def _noise_on(
        self, state: DistillState, x0: Tensor, x: Tensor, call: int, distribution: NoiseLevels | PathLevels
    ) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) and unit noise (B, *shape) for samples ``x0`` that a call made from ``x``."""
        posterior = self.sampler == "posterior"
        levels = levels_between(self.sigmas, call, self._range) if posterior else distribution
        sigma = state.ranks.draw(len(x0), lambda n: levels.sample(n, state.generator))
        noise = standard_normal(x0, state.generator, state.ranks)
        if posterior and call:
            noise = posterior_noise(x0, x, self.sigmas[call], sigma, noise)
        return sigma, noise

    def _backward(
        self,
        state: DistillState,
        x0: Tensor | None,
        x: Tensor,
        call: int,
        conditioning: Conditioning,
        gradient: Tensor,
    ) -> None:
        """Takes the gradient at the samples to the parameters.

        The computed gradient is passed to the backward pass directly: the pseudo-target form
        0.5 (x0 - sg(x0 - g))^2 gives the same g but loses digits of it when g is small against x0.

        ``x0`` has the samples' graph; None makes them again part by part from ``x``, the input of the
        call, so that only the graph of one part is held.
        """
        if x0 is not None:
            x0.backward(gradient.to(x0.dtype))
            return
        for part in self.context.parts(len(x)):
            with self.context.autocast():
                again = state.student.call(x[part], call, conditioning.index(part)).float()
            again.backward(gradient[part].to(again.dtype))

    # ---------------------------------------------------------- who moves

    def _move_student(self, state: DistillState) -> Info:
        norm = self.context.move(state, "student", self.config.lr)
        self.context.follow(state, state.student.denoiser)
        return {"grad_norm_student": norm}

    def _move_critic(self, state: DistillState) -> Info:
        norm = self.context.move(state, "fake", self.config.lr_fake_score)
        if "ratio" in state.optimizers:
            self.context.move(state, "ratio", self.adversary.lr_discriminator)
        return {"grad_norm_fake": norm}
