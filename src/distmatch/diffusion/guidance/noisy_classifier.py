"""A classifier of noised samples, p(class | x, sigma), and its training: what classifier guidance needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator as make_generator
from distmatch.diffusion.denoiser import FeatureDenoiser, expand, pooled
from distmatch.diffusion.noise import LogNormal, NoiseLevels

_FREQUENCIES = 8  # sines of log sigma / 4, from a slow one to one that turns by 4 rad per doubling
_UNIT = 0.5  # standard deviation of the data that EDM's levels are for; others have levels in proportion


class NoisyClassifier(nn.Module):
    """Logits of the classes of noised samples: a residual perceptron on samples or on a teacher's features.

    Features are those of a frozen teacher at (x, sigma), averaged over positions; the gradient of
    guidance goes through the teacher then. Without a teacher it flattens x / sqrt(sigma^2 + sigma_data^2).

    Args:
        num_classes: Number of classes.
        shape: Shape of one sample.
        sigma_data: Standard deviation of the data.
        width: Hidden units.
        depth: Residual blocks.
        features: A teacher with features; it is not trained and not part of the parameters.

    Raises:
        UserError: Fewer than two classes.
    """

    def __init__(
        self,
        num_classes: int,
        shape: Sequence[int],
        *,
        sigma_data: float = 0.5,
        width: int = 128,
        depth: int = 2,
        features: FeatureDenoiser | None = None,
    ) -> None:
        super().__init__()
        check_count("the number of classes", num_classes, 2)
        self.num_classes, self.shape, self.sigma_data = num_classes, tuple(shape), float(sigma_data)
        self._features = (features,)  # in a tuple, so that its parameters are not registered here
        inputs = math.prod(self.shape) if features is None else _feature_size(features)
        self.first = nn.Linear(inputs, width)
        self.level = nn.Linear(2 * _FREQUENCIES, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.last = nn.Linear(width, num_classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits (B, classes) of ``x`` (B, *shape) at levels ``sigma`` (B,); all classes alike at first."""
        dtype = self.last.weight.dtype
        turns = torch.arange(_FREQUENCIES, device=x.device, dtype=dtype) / (_FREQUENCIES - 1)
        level = sigma.to(dtype) * (_UNIT / self.sigma_data)
        angle = level.clamp_min(1e-8).log()[:, None] / 4 * (0.5 * 48**turns)
        hidden = self.first(self._inputs(x, sigma).to(dtype))
        hidden = hidden + self.level(torch.cat([angle.cos(), angle.sin()], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(F.silu(hidden))

    def _inputs(self, x: Tensor, sigma: Tensor) -> Tensor:
        teacher = self._features[0]
        if teacher is None:
            return (x * (expand(sigma, x) ** 2 + self.sigma_data**2).rsqrt()).flatten(1)
        # In training nothing before the features learns; in guidance the gradient comes back through them.
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return pooled(teacher(x, sigma, return_features="only"))


def _feature_size(teacher: FeatureDenoiser) -> int:
    """Width of the pooled features of a teacher, from one call on zeros."""
    like = next(teacher.parameters(), torch.zeros(())) if isinstance(teacher, nn.Module) else torch.zeros(())
    with torch.no_grad():
        zeros = torch.zeros(1, *teacher.shape, dtype=like.dtype, device=like.device)
        return pooled(teacher(zeros, zeros.new_ones(1), return_features="only")).shape[1]


def classifier_loss(
    classifier: nn.Module, x0: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor
) -> Tensor:
    """Cross-entropy in nats at the noised samples; its minimizer is the posterior p(class | x, sigma).

    Args:
        classifier: ``(x, sigma) -> logits``.
        x0: Clean samples (B, *shape).
        labels: Classes (B,) int64.
        sigma: Noise levels (B,).
        noise: Unit normal noise like ``x0``.
    """
    return F.cross_entropy(classifier(x0 + expand(sigma, x0) * noise, sigma), labels)


@torch.enable_grad()
def fit_noisy_classifier(
    classifier: nn.Module,
    x0: Tensor,
    labels: Tensor,
    *,
    levels: NoiseLevels | None = None,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """Trains a noisy classifier in place with AdamW and a cosine schedule, and sets it to eval mode.

    Args:
        classifier: ``(x, sigma) -> logits``.
        x0: Clean samples (n, *shape), on the device of the classifier.
        labels: Classes (n,) int64.
        levels: Distribution of the noise levels in training; by default log-normal, the one of EDM but
            wider, in proportion to the classifier's ``sigma_data``, or to the spread of ``x0`` where it has
            none. It should cover the levels at which the classifier will guide.
        steps: Training steps.
        batch: Samples in a step.
        lr: First step size.
        weight_decay: That of AdamW.
        seed: Seed of batches, levels and noise.

    Returns:
        The mean loss in nats over each tenth of the training; log(classes) is chance.

    Raises:
        UserError: No samples, labels that are not one class a sample, or fewer than one step.
    """
    count = int(getattr(classifier, "num_classes", 0))
    if len(x0) == 0 or labels.shape != (len(x0),) or labels.is_floating_point() or steps < 1 or batch < 1:
        raise UserError(
            "a classifier is trained on samples with one class each",
            got=f"{len(x0)} samples, labels {tuple(labels.shape)} {labels.dtype}, {steps} steps of {batch}",
            expected="as many int64 labels as samples, at least one step of one sample",
        )
    if int(labels.min()) < 0 or (count and int(labels.max()) >= count):
        raise UserError(
            "a label is no class of this classifier",
            got=f"labels from {int(labels.min())} to {int(labels.max())}",
            expected=f"0 to {count - 1}" if count else "0 or more",
            fix="remove samples without a class",
        )
    device = x0.device
    draws = make_generator(seed, "noisy classifier", device)
    if levels is None:
        spread = (
            float(getattr(classifier, "sigma_data", 0) or (x0 - x0.mean(0)).square().mean().sqrt()) or _UNIT
        )
        levels = LogNormal(-0.5 + math.log(spread / _UNIT), 1.8)
    classifier.train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = torch.zeros(steps, device=device)
    for step in range(steps):
        rows = torch.randint(len(x0), (batch,), generator=draws, device=device)
        sigma = levels.sample(batch, draws).to(x0.dtype)
        noise = torch.randn((batch, *x0.shape[1:]), generator=draws, device=device, dtype=x0.dtype)
        loss = classifier_loss(classifier, x0[rows], labels[rows], sigma, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    classifier.eval()
    return [float(part.mean()) for part in losses.tensor_split(min(10, steps))]
