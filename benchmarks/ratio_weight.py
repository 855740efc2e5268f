"""Is the weight that f-distill uses at small batches h(r), up to a number?

    python benchmarks/ratio_weight.py

The ratio is exact, so only its normalization is measured: samples of q = N(0, 1), noised to levels of the
sampling distribution, and the exact log r = log p/q of p = N(gap, 1) at each level. The slope of the weight
used on the true weight h(r) / E_q[h(r)] is 1 where the two agree up to noise, and 0 where all weights are
equal and the divergence acts as reverse KL. `Own batch` divides by the mean of the batch itself
(--ratio-memory 0). `Clip alone` is the true weight with log r held within --ratio-clip: what normalization
cannot give back.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from distmatch.diffusion.noise import Karras
from distmatch.divergences import Divergence, divergence
from distmatch.ratio.normalizer import NormalizerConfig, RatioNormalizer

LEVELS = Karras(0.02, 80.0, 7.0)
SAMPLES = 24_000


def draw(n: int, gap: float, fixed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exact log ratios at ``n`` noised samples of q, and the quantiles of their levels."""
    sigma = torch.zeros(n) if fixed else LEVELS.sample(n, generator)
    variance = 1 + sigma.double() ** 2
    x = variance.sqrt() * torch.randn(n, generator=generator, dtype=torch.float64)
    quantile = torch.rand(n, generator=generator) if fixed else LEVELS.cdf(sigma)
    return (gap * x - gap**2 / 2) / variance, quantile


def slope(used: Tensor, true: Tensor) -> float:
    """Slope of the regression of one weight on the other."""
    covariance = torch.cov(torch.stack([true, used]))
    return float(covariance[0, 1] / covariance[0, 0])


def measure(measure: Divergence, batch: int, gap: float, fixed: bool, memory: float, seed: int) -> float:
    """The slope over SAMPLES samples after a third as many of warm-up."""
    generator = torch.Generator().manual_seed(seed)
    normalizer = RatioNormalizer(NormalizerConfig(memory=memory))
    true_mean = measure.weight(draw(2_000_000, gap, fixed, generator)[0]).mean()
    used, true = [], []
    warmup = SAMPLES // 3 // batch
    for step in range(warmup + SAMPLES // batch):
        log_r, quantile = draw(batch, gap, fixed, generator)
        weight = normalizer.update(log_r, quantile, measure.weight).weight.double()
        if step >= warmup:
            used.append(weight)
            true.append(measure.weight(log_r) / true_mean)
    return slope(torch.cat(used), torch.cat(true))


def clip_alone(measure: Divergence, gap: float, fixed: bool, seed: int) -> float:
    """The slope of the clipped weight, without any normalization from samples."""
    log_r = draw(2_000_000, gap, fixed, torch.Generator().manual_seed(seed))[0]
    clip = NormalizerConfig().clip
    used, true = measure.weight(log_r.clamp(-clip, clip)), measure.weight(log_r)
    return slope(used / used.mean(), true / true.mean())


def main() -> None:
    """Prints a table for each gap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 32, 256])
    parser.add_argument("--divergences", nargs="+", default=["kl", "js", "hellinger"])
    parser.add_argument("--gaps", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    worst = math.inf
    for gap in args.gaps:
        for fixed in (True, False):
            where = "one noise level" if fixed else "levels of the default distribution"
            print(f"\ngap {gap:g}, {where}\n")
            print(f"| divergence | mean of | {' | '.join(map(str, args.batches))} | clip alone |")
            print(f"|---|---|{'---|' * len(args.batches)}---|")
            for name in args.divergences:
                chosen = divergence(name)
                limit = clip_alone(chosen, gap, fixed, args.seed)
                for memory, word in ((0.95, "earlier batches"), (0.0, "own batch")):
                    found = [measure(chosen, b, gap, fixed, memory, args.seed) for b in args.batches]
                    cells = " | ".join(f"{value:.2f}" for value in found)
                    print(f"| `{name}` | {word} | {cells} | {limit:.2f} |", flush=True)
                    large = [v / limit for v, b in zip(found, args.batches, strict=True) if b >= 8]
                    worst = min([worst, *large]) if memory else worst
    print(f"\nSmallest slope from batch 8 up, as a share of what the clip leaves: {worst:.3f}")


if __name__ == "__main__":
    main()
