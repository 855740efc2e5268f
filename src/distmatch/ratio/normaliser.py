"""Two-stage normalisation of the density ratio (f-distill, section 1.4), without cancelling the weight.

Stage 1 uses that E_q[r] = 1 at every noise level: ratios are divided by a running mean of their noise bin.
Bins hold equal *probability* of the distribution that noise levels are drawn from, so none stays empty. A
bin whose mean rests on too few samples is pooled over all bins, and when even those are too few the ratio is
left alone: dividing a ratio by the mean of one or two samples would make every weight equal and turn any
divergence into reverse KL. Stage 2 divides the weights by their mean over the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NormaliserConfig:
    """How ratios are normalised.

    Attributes:
        bins: Noise bins of equal probability.
        memory: Share of the running sums kept at each update; 0 uses the current batch alone.
        min_count: Samples a bin needs (decayed count) before its own mean is trusted.
        clip: Bound on |log r| after stage 1; keeps r within [exp(-clip), exp(clip)].
    """

    bins: int = 10
    memory: float = 0.95
    min_count: float = 64.0
    clip: float = 3.0

    def __post_init__(self) -> None:
        if self.bins < 1 or not 0 <= self.memory < 1 or self.min_count < 2 or not self.clip > 0:
            raise UserError(
                "the ratio normaliser cannot work with these numbers",
                got=f"bins={self.bins}, memory={self.memory}, min_count={self.min_count}, clip={self.clip}",
                expected="bins >= 1, 0 <= memory < 1, min_count >= 2, clip > 0",
            )


@dataclass
class NormalisedRatio:
    """What :meth:`RatioNormaliser.update` returns.

    Attributes:
        log_r: Normalised, clipped log ratios (B,), float32, detached.
        clip_fraction: Share of the batch at the clip, scalar tensor.
        pooled: Bins whose mean was pooled, scalar tensor.
    """

    log_r: Tensor
    clip_fraction: Tensor
    pooled: Tensor


class RatioNormaliser:
    """Running means of the ratio by noise bin; part of the training state.

    Args:
        config: The settings.
        device: Where the sums live.
    """

    #: Raw log ratios are held within this before they enter a mean, so that one sample cannot rule a bin.
    RAW_LIMIT = 10.0

    def __init__(self, config: NormaliserConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.total = torch.zeros(config.bins, dtype=torch.float64, device=device)
        self.count = torch.zeros(config.bins, dtype=torch.float64, device=device)
        self.weight = torch.zeros(config.bins, dtype=torch.float64, device=device)

    def bin_of(self, quantile: Tensor) -> Tensor:
        """The bin (B,) of samples whose noise level is at ``quantile`` (B,) of its distribution."""
        return (quantile * self.config.bins).long().clamp(0, self.config.bins - 1)

    def update(self, log_r: Tensor, quantile: Tensor) -> NormalisedRatio:
        """Takes a batch of student samples into the running means and normalises it (stage 1).

        Args:
            log_r: Raw log ratios of samples *of the student*, (B,).
            quantile: CDF of each sample's noise level under the sampling distribution, (B,).

        Returns:
            The normalised log ratios; nothing carries a gradient.
        """
        cfg = self.config
        raw = log_r.detach().float().clamp(-self.RAW_LIMIT, self.RAW_LIMIT)
        index = self.bin_of(quantile)
        self.total.mul_(cfg.memory).index_add_(0, index, raw.double().exp())
        self.count.mul_(cfg.memory).index_add_(0, index, torch.ones_like(raw, dtype=torch.float64))
        self.weight.mul_(cfg.memory)
        thin = self.count < cfg.min_count
        log_mean = torch.where(
            thin, self._pooled_log_mean(), (self.total / self.count.clamp_min(1e-12)).log()
        )
        shifted = raw - log_mean[index].float()
        clipped = shifted.clamp(-cfg.clip, cfg.clip)
        return NormalisedRatio(clipped, (shifted != clipped).float().mean(), thin.sum())

    def _pooled_log_mean(self) -> Tensor:
        """Log mean ratio over all bins; 0 while all together are too thin."""
        mean = self.total.sum() / self.count.sum().clamp_min(1e-12)
        return torch.where(self.count.sum() < self.config.min_count, torch.zeros_like(mean), mean.log())

    def record(self, weight: Tensor, quantile: Tensor) -> None:
        """Takes the final weights (B,) of the batch just passed to :meth:`update` into the bin means."""
        self.weight.index_add_(0, self.bin_of(quantile), weight.detach().double())

    def bin_means(self) -> tuple[Tensor, Tensor]:
        """Mean raw ratio and mean weight of each bin (bins,), NaN where nothing was seen.

        By E_q[r] = 1 the ratios should stay near 1 at every noise level.
        """
        count = torch.where(self.count > 0, self.count, math.nan)
        return self.total / count, self.weight / count

    def thin_message(self, batch: int) -> str | None:
        """A warning for settings under which bins stay thin for good, or None.

        Args:
            batch: Student samples in one update.
        """
        cfg = self.config
        if batch < 2:
            return "at batch 1 every weight is 1 after normalisation: any divergence acts as reverse KL."
        steady = batch / cfg.bins / (1 - cfg.memory)
        if steady > 0.999 * cfg.min_count:
            return None
        whole = "all bins together" if steady * cfg.bins >= cfg.min_count else "nothing, as all are too few"
        return (
            f"ratio normalisation: a noise bin gathers {steady:.1f} samples at batch {batch}, fewer than "
            f"min_count={cfg.min_count:g}; its mean is pooled over {whole}. "
            "Use a larger batch, fewer --ratio-bins or a --ratio-memory nearer 1."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums."""
        return {"total": self.total, "count": self.count, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the running sums."""
        self.total.copy_(state["total"])
        self.count.copy_(state["count"])
        self.weight.copy_(state["weight"])


def batch_normalised(weight: Tensor) -> Tensor:
    """Stage 2: weights with mean one over the batch.

    Dividing by a clamped mean rather than mean + epsilon keeps reverse KL (all ones) exactly DMD2.
    """
    return weight / weight.mean().clamp_min(1e-12)


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum h)^2 / (B sum h^2): the share of the batch that the weights leave in effect, in (0, 1]."""
    return weight.sum().square() / (len(weight) * weight.square().sum()).clamp_min(1e-30)
