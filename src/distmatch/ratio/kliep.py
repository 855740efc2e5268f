"""KLIEP: the ratio that brings r q nearest to p in Kullback-Leibler divergence.

It maximizes E_p[log r] over r = sum of non-negative kernels subject to E_q[r] = 1 (Sugiyama et al. 2008).
Scaling every kernel to mean 1 under q turns the constraint into weights that sum to one, and the problem into
the maximum likelihood of mixture weights: convex, and solved by multiplicative updates without a step size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_count
from distmatch.ratio.kernels import candidate_widths, choose_centers, log_kernel
from distmatch.ratio.samples import CHUNK, Fitted, high_dimension


@dataclass(frozen=True)
class KliepSettings:
    """How KLIEP is fitted.

    Attributes:
        centers: Kernels, at most.
        widths: Kernel widths to choose from, in the unit of standardized samples; None takes multiples of the
            median distance.
        folds: Parts of the samples for the cross-validation.
    """

    centers: int = 100
    widths: Sequence[float] | None = None
    folds: int = 5

    def __post_init__(self) -> None:
        check_count("the number of folds", self.folds, 2)


def fit_kliep(p: Tensor, q: Tensor, settings: KliepSettings, seed: int) -> Fitted:
    """Fits KLIEP with the width of greatest cross-validated likelihood; memory grows with n times centers.

    Both samples are divided into folds, and the score of a width is E_p[log r] - E_q[r] + 1 on the fold that
    was left out, a lower bound of KL(p || q). Dividing p alone, as is usual, rewards ratios that grow without
    bound where there is no sample of q.

    Args:
        p: Samples of p, (n, d) float64, standardized, in random order.
        q: Samples of q, (m, d), likewise.
        settings: The settings.
        seed: Seed of the choice of centers.
    """
    centers = choose_centers(p, settings.centers, seeds.generator(seed, "ratio/centres"))
    widths = candidate_widths(settings.widths, p, q)
    scores = [_left_out_scores(p, q, centers, width, settings.folds) for width in widths]
    best_p, best_q = max(scores, key=lambda parts: (parts[0].mean() + parts[1].mean()).item())
    # The widest that is not worse than the best by more than one standard error: the smoother ratio.
    tied = []
    for width, (on_p, on_q) in zip(widths, scores, strict=True):
        loss_p, loss_q = best_p - on_p, best_q - on_q
        if loss_p.mean() + loss_q.mean() <= (loss_p.var() / len(p) + loss_q.var() / len(q)).sqrt():
            tied.append((width, (on_p.mean() + on_q.mean()).item()))
    width, bound = max(tied)
    log_w, gap = mixture_weights(scaled_log_kernels(p, q, centers, width), tolerance=1e-4)
    shift = log_w - log_mean_kernel(q, centers, width)
    chosen: dict[str, float | int | str] = {
        "width": width,
        "centers": len(centers),
        "kl_bound": bound,
        "gap": gap,
    }
    return Fitted(
        lambda x: torch.logsumexp(log_kernel(x, centers, width) + shift, 1),
        chosen,
        high_dimension("kernels", p.shape[1]),
    )


def _left_out_scores(
    p: Tensor, q: Tensor, centers: Tensor, width: float, folds: int
) -> tuple[Tensor, Tensor]:
    """Log r (n,) at samples of p and 1 - r (m,) at samples of q, each fitted without its own fold."""
    fold_p = torch.arange(len(p), device=p.device) % folds
    fold_q = torch.arange(len(q), device=q.device) % folds
    kernels_p, kernels_q = log_kernel(p, centers, width), log_kernel(q, centers, width)
    on_p, on_q = torch.empty_like(p[:, 0]), torch.empty_like(q[:, 0])
    for k in range(folds):
        rest = kernels_q[fold_q != k]
        scale = torch.logsumexp(rest, 0) - math.log(len(rest))
        log_w, _ = mixture_weights(kernels_p[fold_p != k] - scale, tolerance=3e-3)
        on_p[fold_p == k] = torch.logsumexp(kernels_p[fold_p == k] + log_w - scale, 1)
        on_q[fold_q == k] = 1.0 - torch.logsumexp(kernels_q[fold_q == k] + log_w - scale, 1).exp()
    return on_p, on_q


def log_mean_kernel(q: Tensor, centers: Tensor, width: float) -> Tensor:
    """Log E_q[phi], (b,)."""
    parts = [torch.logsumexp(log_kernel(part, centers, width), 0) for part in q.split(CHUNK)]
    return torch.logsumexp(torch.stack(parts), 0) - math.log(len(q))


def scaled_log_kernels(p: Tensor, q: Tensor, centers: Tensor, width: float) -> Tensor:
    """Log of the kernels at samples of p, (n, b), each kernel scaled to mean 1 under q."""
    return log_kernel(p, centers, width) - log_mean_kernel(q, centers, width)


def mixture_weights(terms: Tensor, tolerance: float, most: int = 2000) -> tuple[Tensor, float]:
    """The weights w that maximize the mean of log sum_j w_j exp(terms_ij), as log w (b,).

    Args:
        terms: (n, b).
        tolerance: Stop when the likelihood is known to be within this of its maximum, nats.
        most: Steps, at most.

    Returns:
        log w, and the bound on what is missing: the mean likelihood is concave in w, so it is below its
            maximum by at most max_j of its derivative with respect to w_j, less 1.
    """
    peak = terms.max(1, keepdim=True).values
    kernels = (terms - peak).exp()  # rows scaled to maximum 1: the scale of a row does not matter
    w = torch.full((terms.shape[1],), 1.0 / terms.shape[1], dtype=terms.dtype, device=terms.device)
    gap = math.inf
    for step in range(most):
        slope = kernels.T @ (1.0 / (kernels @ w).clamp_min(1e-300)) / len(kernels)
        if step % 10 == 0:
            gap = slope.max().item() - 1.0
            if gap <= tolerance:
                break
        w = w * slope
    return w.clamp_min(1e-300).log(), gap
