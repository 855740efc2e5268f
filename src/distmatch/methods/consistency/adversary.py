"""An adversarial term on clean samples of a student; the discriminator compares noised samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.diffusion.denoiser import expand
from distmatch.diffusion.noise import Karras
from distmatch.losses import adversarial_discriminator_loss, adversarial_generator_loss, approximate_r1
from distmatch.methods.consistency.direct import Draws
from distmatch.methods.consistency.settings import CTMSettings
from distmatch.methods.context import Context, Info, standard_normal
from distmatch.methods.state import DistillState
from distmatch.ratio.discriminator import build_discriminator, choose_source, logits_of


@dataclass
class Adversary:
    """A discriminator on features of the frozen teacher, or on the noised samples themselves.

    Its random numbers come from a separate stream, so that a run without it is bit-identical.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[CTMSettings]

    def __post_init__(self) -> None:
        teacher = self.context.teacher
        self._source = choose_source(self.context.settings.ratio_features, teacher)
        if self._source == "fake":
            raise UserError(
                f"{self.context.method.name} has no fake score with features for a discriminator",
                got="--ratio-features fake",
                fix="use --ratio-features teacher, or own",
            )
        self._law = Karras(teacher.sigma_min, teacher.sigma_max)

    def prepare(self, state: DistillState, seed: int) -> None:
        """Puts the discriminator and its optimizer into a fresh state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "discriminator"))
            head = build_discriminator(self._source, self.context.teacher, self.context.teacher.num_classes)
        state.discriminator = head.to(self.context.device)
        state.optimizers["ratio"] = self.context.adam(head, self.context.settings.lr_discriminator)

    def draw(self, state: DistillState, x: Tensor) -> dict[str, Tensor]:
        """Levels and noises of a batch like ``x`` (B, *shape): for student, real, and with R1 perturbed."""
        gen = state.ratio_generator
        level = state.ranks.draw(len(x), lambda n: self._law.sample(n, gen)).to(x.dtype)
        count = 3 if self.context.settings.r1 > 0 else 2
        noises = (standard_normal(x, gen, state.ranks) for _ in range(count))
        names = ("noise_fake", "noise_real", "noise_r1")
        return {"level": level, **dict(zip(names, noises, strict=False))}

    def logits(self, state: DistillState, kinds: list[Tensor], draws: Draws, *, grad: bool) -> list[Tensor]:
        """The discriminator's log ratios of noised samples of several kinds, (b,) each."""
        head, teacher = state.discriminator, self.context.teacher
        if head is None:
            raise RuntimeError("this state has no discriminator")
        return logits_of(self._source, teacher, head, kinds, draws["level"], draws.conditioning, grad=grad)

    def student_loss(self, state: DistillState, x0: Tensor, draws: Draws) -> Tensor:
        """The student's non-saturating loss, (b,)."""
        x = x0 + expand(draws["level"], x0) * draws["noise_fake"]
        return adversarial_generator_loss(self.logits(state, [x], draws, grad=True)[0])

    def learn(self, state: DistillState, x0: Tensor, draws: Draws) -> Info:
        """One step of the discriminator.

        Args:
            state: The networks.
            x0: Samples of the student, (B, *shape), without history.
            draws: Real samples and noises, for the whole batch.
        """
        cfg = self.context.settings
        total = torch.zeros((), device=x0.device)
        for part in self.context.parts(len(x0)):
            some = draws.index(part)
            with self.context.autocast():
                level, real = expand(some["level"], x0), some["x0"]
                kinds = [x0[part] + level * some["noise_fake"], real + level * some["noise_real"]]
                if cfg.r1 > 0:
                    kinds.append(kinds[1] + 0.1 * level * some["noise_r1"])
                on_fake, on_real, *on_moved = self.logits(state, kinds, some, grad=False)
                loss = adversarial_discriminator_loss(real=on_real, fake=on_fake)
                reported = loss.detach()
                if on_moved:
                    loss = loss + cfg.r1 * approximate_r1(on_real, on_moved[0])
            share = len(some["x0"]) / len(x0)
            (share * loss).backward()
            total = total + share * reported
        self.context.move(state, "ratio", cfg.lr_discriminator)
        return {"loss_ratio": total}
