"""Two-stage normalization of the density ratio (f-distill, section 1.4), without cancelling the weight.

Stage 1 uses that E_q[r] = 1 at every noise level: ratios are divided by a running mean of their noise bin.
Bins hold equal *probability* of the distribution that noise levels are drawn from, so none stays empty. A bin
with too few samples for a mean is pooled over all bins, and with too few samples in total the ratio is not
changed.

Stage 2 divides the weights h(r) by their running mean over all noise levels, so that learning rates carry
over between divergences. It is one number: a mean for each bin would cancel how h changes with the noise
level, which is part of the divergence.

Neither mean holds the batch that it is applied to, as soon as earlier batches gave enough samples. A batch
divided by its own mean is pulled towards equal weights: at batch 2 the slope of the weight used on h(r) is
about 1/5 for KL, and any divergence acts much like reverse KL. A mean of earlier batches is independent of
the batch, so that the weight is h(r) times a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_number
from distmatch.base.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class NormalizerConfig:
    """How ratios are normalized.

    Attributes:
        bins: Noise bins of equal probability.
        memory: Share of the running sums kept at each update, or as much more as it takes for each bin to
            hold ``2 min_count`` samples in the long run; 0 uses the current batch alone, as FastGen does
            for CIFAR-10.
        min_count: Samples a bin needs (decayed count) before its own mean is trusted.
        clip: Bound on |log r| after stage 1; keeps r within [exp(-clip), exp(clip)].
    """

    bins: int = 10
    memory: float = 0.95
    min_count: float = 64.0
    clip: float = 3.0

    def __post_init__(self) -> None:
        check_count("bins", self.bins)
        check_number("memory", self.memory, "[0, 1)")
        check_number("min_count", self.min_count, "[2, inf)")
        check_number("clip", self.clip, "(0, inf]")

    def kept(self, batch: int) -> float:
        """The share of the running sums that an update with ``batch`` samples keeps."""
        if self.memory == 0:
            return 0.0
        return max(self.memory, 1 - batch / (2 * self.bins * self.min_count))


@dataclass
class NormalizedRatio:
    """What :meth:`RatioNormalizer.update` returns. All values are detached.

    Attributes:
        log_r: Normalized, clipped log ratios (B,), float32.
        weight: h(r) / ``scale``, (B,).
        scale: The running mean of h over student samples at all noise levels, scalar.
        clip_fraction: Share of the batch at the clip, scalar.
        pooled: Bins whose mean was pooled, scalar.
    """

    log_r: Tensor
    weight: Tensor
    scale: Tensor
    clip_fraction: Tensor
    pooled: Tensor


class RatioNormalizer:
    """Running means of the ratio and of its weight by noise bin; part of the training state.

    Args:
        config: The settings.
        device: Device of the sums.
    """

    #: Raw log ratios are held within this before they enter a mean, so that one sample cannot rule a bin.
    RAW_LIMIT = 10.0

    def __init__(self, config: NormalizerConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self._sums = {
            name: torch.zeros(config.bins, dtype=torch.float64, device=device)
            for name in ("count", "ratio", "weight")
        }

    @property
    def count(self) -> Tensor:
        """Decayed number of samples of each bin (bins,)."""
        return self._sums["count"]

    def bin_of(self, quantile: Tensor) -> Tensor:
        """The bin (B,) of samples whose noise level is at ``quantile`` (B,) of its distribution."""
        return (quantile * self.config.bins).long().clamp(0, self.config.bins - 1)

    def update(
        self,
        log_r: Tensor,
        quantile: Tensor,
        weigh: Callable[[Tensor], Tensor],
        ranks: Ranks = ALONE,
    ) -> NormalizedRatio:
        """Normalizes a batch of student samples and takes it into the running means.

        Args:
            log_r: Raw log ratios of samples *of the student*, (B,).
            quantile: CDF of each sample's noise level under the sampling distribution, (B,).
            weigh: h as a function of log r, (B,) to (B,).
            ranks: The processes whose rows make up the batch; the means are those of all.
        """
        cfg, index = self.config, self.bin_of(quantile)
        raw = log_r.detach().float().clamp(-self.RAW_LIMIT, self.RAW_LIMIT)
        for total in self._sums.values():
            total.mul_(cfg.kept(len(raw) * ranks.size))
        # Whether the earlier batches have enough samples for their own mean.
        seen = self.count.sum()
        known = seen >= cfg.min_count
        before = self._log_means()
        self._add(index, ranks, count=torch.ones_like(raw), ratio=raw.exp())
        after = self._log_means()
        log_mean, pooled = (torch.where(known, b, a) for b, a in zip(before, after, strict=True))
        shifted = raw - log_mean[index].float()
        clipped = shifted.clamp(-cfg.clip, cfg.clip)

        weight = weigh(clipped)
        earlier = self._sums["weight"].sum() / seen.clamp_min(1e-12)
        self._add(index, ranks, weight=weight)
        scale = torch.where(known, earlier, self._sums["weight"].sum() / self.count.sum()).clamp_min(1e-12)
        return NormalizedRatio(
            clipped,
            weight / scale.to(weight.dtype),
            scale,
            (shifted != clipped).float().mean(),
            pooled,
        )

    def _add(self, index: Tensor, ranks: Ranks, **values: Tensor) -> None:
        """Takes values (B,) into the sums of their bins."""
        if ranks.size == 1:
            for name, value in values.items():
                self._sums[name].index_add_(0, index, value.double())
            return
        stacked = torch.stack([value.double() for value in values.values()])
        zeros = torch.zeros(len(values), self.config.bins, dtype=torch.float64, device=stacked.device)
        for name, total in zip(values, ranks.sum(zeros.index_add_(1, index, stacked)), strict=True):
            self._sums[name] += total

    def _log_means(self) -> tuple[Tensor, Tensor]:
        """Log mean ratio of each bin (bins,), and how many of these are pooled.

        Bins that are too thin take the mean over all, which is 0 while all together are too thin.
        """
        count, ratio, least = self.count, self._sums["ratio"], self.config.min_count
        thin = count < least
        mean = ratio.sum() / count.sum().clamp_min(1e-12)
        over_all = torch.where(count.sum() < least, torch.zeros_like(mean), mean.log())
        return torch.where(thin, over_all, (ratio / count.clamp_min(1e-12)).log()), thin.sum()

    def bin_means(self) -> tuple[Tensor, Tensor]:
        """Mean raw ratio of each bin, and mean weight relative to that of all, (bins,), NaN for empty bins.

        By E_q[r] = 1 the ratios should stay near 1 at every noise level.
        """
        count = torch.where(self.count > 0, self.count, math.nan)
        over_all = self._sums["weight"].sum() / self.count.sum()
        return self._sums["ratio"] / count, self._sums["weight"] / count / over_all

    def thin_message(self, batch: int, updates: int) -> str | None:
        """A warning for settings under which bins stay thin, or None.

        Args:
            batch: Student samples in one update.
            updates: Student updates in the whole run.
        """
        cfg = self.config
        steady = batch / cfg.bins * min(1 / (1 - cfg.kept(batch)), updates)
        if steady > 0.999 * cfg.min_count:
            return None
        enough = steady * cfg.bins >= cfg.min_count
        then = "its mean is pooled over all bins together" if enough else "the ratio is not normalized"
        text = (
            f"ratio normalization: a noise bin collects {steady:.1f} samples at batch {batch}, fewer than "
            f"min_count={cfg.min_count:g}; {then}. "
        )
        if cfg.memory > 0:
            return text + "Use a larger batch, fewer --ratio-bins or more steps."
        return text + (
            "Weights are divided by the mean of their own batch, which biases them towards equality: at "
            "batch 1 all are 1, as with reverse KL. Use a --ratio-memory above 0 or a larger batch."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the running sums."""
        for name, total in self._sums.items():
            total.copy_(state[name])


def effective_sample_size(weight: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """(sum h)^2 / (B sum h^2): the share of the batch that the weights leave in effect, in (0, 1]."""
    total, squares = ranks.sum(torch.stack([weight.sum(), weight.square().sum()]))
    return total.square() / (len(weight) * ranks.size * squares).clamp_min(1e-30)
