r"""MMD finetuning: a few-step sampler is trained end to end by a two-sample statistic (MMD-DDM).

Aiello et al. 2023, arXiv 2301.07969. The student's deterministic sampler is run completely, and its samples
are compared with real ones by the unbiased MMD^2 of features. There is no fake score, and no teacher except
for the features. The statistic couples all samples of a batch, so a batch in parts is run twice: once for the
gradient with respect to every feature, and once more, part by part, to backpropagate it to the parameters.
That is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distmatch.base.errors import UserError
from distmatch.base.metric_names import COMPARED
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser, has_features, pooled, require_score
from distmatch.diffusion.paths import noise_path
from distmatch.discrepancies.kernels import Kernel, energy, gaussian, polynomial
from distmatch.losses.kernel import mmd_with_gradient
from distmatch.methods.context import Context, Info, standard_normal
from distmatch.methods.kernel.settings import MMDSettings
from distmatch.methods.sampler import student_sigmas
from distmatch.methods.state import DistillState


def mmd_sigmas(calls: int, sigma: float, sigma_data: float, spacing: str) -> tuple[float, ...]:
    """Noise levels of ``calls`` steps from ``sigma`` down.

    Args:
        calls: Network calls.
        sigma: The first level.
        sigma_data: Standard deviation of the data; the VP path is that of data of 1/2.
        spacing: ``karras``, or ``uniform`` or ``quadratic``: shares k / calls, or their squares, of the time
            of the VP path, which are the sub-sequences of DDIM.
    """
    if spacing == "karras":
        return student_sigmas(calls, sigma, sigma_data)
    path, unit = noise_path("vp"), 2 * sigma_data
    share = torch.arange(calls - 1, 0, -1, dtype=torch.float64) / calls
    levels = unit * path.rho(path.t_of_rho(sigma / unit) * share ** (2 if spacing == "quadratic" else 1))
    return (sigma, *levels.tolist())


def feature_kernel(config: MMDSettings, of_network: bool, width: int) -> Kernel:
    """The kernel of a choice, on features of unit spread.

    Args:
        config: The settings.
        of_network: Whether the features are those of a network.
        width: Their number.
    """
    name = config.mmd_kernel
    if name == "auto":
        name = "cubic" if of_network else "energy"
    if name == "rbf":
        return gaussian(config.mmd_bandwidth * width**0.5)
    return energy() if name == "energy" else polynomial(3 if name == "cubic" else 1)


@dataclass
class ChainMMD:
    """The loss of MMD finetuning: the MMD^2 between the samples of all steps and real ones.

    Attributes:
        context: Teacher and settings.
    """

    context: Context[MMDSettings]
    needs_data = True
    jumps = False

    def __post_init__(self) -> None:
        require_score(self.context.teacher, "a sampler from Gaussian noise")
        chosen, teacher = self.context.settings.mmd_features, self.context.teacher
        able = has_features(teacher)
        if chosen == "teacher" and not able:
            raise UserError(
                "this teacher has no features",
                got=type(teacher).__name__,
                expected="a denoiser whose has_features is True, and which takes return_features",
                fix="use --mmd-features samples",
            )
        self.of_network = able and (chosen == "teacher" or (chosen == "auto" and len(teacher.shape) > 1))

    def notes(self) -> dict[str, Any]:
        """What is compared, and by which kernel."""
        name = feature_kernel(self.context.settings, self.of_network, 1).name
        return {COMPARED: "teacher" if self.of_network else "samples", "mmd_kernel": name}

    def prepare(self, state: DistillState, seed: int) -> None:
        """The student uses the DDIM sampler, whose only noise is the initial one."""
        context = self.context
        state.student.sampler = "ddim"
        own = context.settings
        state.student.sigmas = context.sigmas
        if own.mmd_spacing != "karras":
            state.student.sigmas = mmd_sigmas(
                own.num_steps, context.first_sigma, context.teacher.sigma_data, own.mmd_spacing
            )

    def backward(self, state: DistillState, batch: Batch) -> Info:
        """Adds the gradient to the student's parameters."""
        context, n, ranks = self.context, len(batch.x), state.ranks
        if n * ranks.size < 2:
            raise UserError(
                "mmd compares samples of one batch with each other",
                got=f"a batch of {n}",
                expected="2 samples or more",
                fix="raise --batch",
            )
        slices = context.parts(n)
        whole = len(slices) == 1
        noise = standard_normal(batch.x, state.generator, ranks)
        with torch.no_grad():
            real = ranks.gather(_joined([self._raw(batch.x[p], batch.conditioning.index(p)) for p in slices]))
            if self.of_network and "feature_mean" not in state.memory:
                spread = real.std(0)
                state.memory["feature_mean"] = real.mean(0)
                # Activations that hardly vary must not be scaled up to unit variance.
                state.memory["feature_spread"] = spread.clamp_min(1e-3 * spread.square().mean().sqrt())
            real = self._scaled(state, real)
        with torch.set_grad_enabled(whole):
            made = _joined([self.made(state, noise[p], batch.conditioning.index(p)) for p in slices])
        kernel = feature_kernel(context.settings, self.of_network, made.shape[1])
        labels = batch.conditioning.label
        labels = None if labels is None else ranks.gather(labels)
        loss, gradient = mmd_with_gradient(ranks.gather(made), real, kernel, labels)
        # Of one statistic of all samples, not of a mean: what the ranks add to it is summed.
        gradient = ranks.size * gradient[ranks.rows(len(gradient))]
        if whole:
            made.backward(gradient)
        else:
            for p in slices:
                self.made(state, noise[p], batch.conditioning.index(p)).backward(gradient[p])
        return {"loss": loss}

    def made(self, state: DistillState, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Features (b, F) of the samples from unit noise (b, *shape), with their graph."""
        student = state.student

        def call(x: Tensor, index: int) -> Tensor:
            if not (self.context.settings.mmd_checkpoint and torch.is_grad_enabled()):
                return student.call(x, index, conditioning)
            again: Tensor = checkpoint(student.call, x, index, conditioning, use_reentrant=False)
            return again

        with self.context.autocast():
            x = student.start(noise)
            x0 = call(x, 0)
            for index in range(1, student.nfe):
                x = student.advance(x, x0, noise, index)  # of DDIM: no further noise
                x0 = call(x, index)
        return self._scaled(state, self._raw(x0, conditioning))

    def _raw(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """What is compared of samples (b, *shape), before it is scaled, (b, F)."""
        teacher: Denoiser = self.context.teacher
        if not (self.of_network and has_features(teacher)):
            return x.flatten(1)
        level = self.context.settings.mmd_feature_sigma * teacher.sigma_data
        sigma = torch.full((len(x),), level, device=x.device, dtype=x.dtype)
        with self.context.autocast():
            return pooled(teacher(x, sigma, conditioning, return_features="only")).to(x.dtype)

    def _scaled(self, state: DistillState, values: Tensor) -> Tensor:
        """Features of about unit spread: that of the first real batch, or of the data."""
        if not self.of_network:
            return values / self.context.teacher.sigma_data
        return (values - state.memory["feature_mean"]) / state.memory["feature_spread"]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
