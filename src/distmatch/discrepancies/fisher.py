r"""Fisher divergence E_p\|s_p - s_q\|^2 (without a half) and the score matching objectives that need no s_p.

A score is a function of samples (n, d) that gives grad log q, (n, d), one sample at a time. The Fisher
divergence compares the shapes on the support of p, so it is insensitive to the weights of well-separated
modes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_equal, check_number
from distmatch.base.estimate import Estimate, mean_of
from distmatch.base.samples import checked, checked_pair

Score = Callable[[Tensor], Tensor]


def evaluated(score: Score, x: Tensor) -> Tensor:
    """The score at the samples.

    Raises:
        UserError: It has another shape than the samples, or is not finite.
    """
    s = score(x)
    check_equal("the shapes of the samples and of their score", tuple(x.shape), tuple(s.shape))
    return checked(s, "the score")


def score_of(log_density: Callable[[Tensor], Tensor]) -> Score:
    """The score of a log-density by automatic differentiation; a constant added to it changes nothing.

    Args:
        log_density: From samples (n, d) to (n,), one sample at a time.
    """

    def score(x: Tensor) -> Tensor:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                log_density(at).sum(), at, create_graph=graph, materialize_grads=True
            )
        return gradient

    return score


def fisher_divergence(score_p: Tensor, score_q: Tensor) -> Estimate:
    r"""E_p\|s_p - s_q\|^2 from both scores at samples of p; half of it is what score matching minimizes.

    Args:
        score_p: grad log p at n samples of p, (n, d).
        score_q: grad log q at the same samples, (n, d).

    Returns:
        The estimate, in the inverse squared unit of the samples.

    Raises:
        UserError: Bad scores or different shapes.
    """
    score_p, score_q = checked_pair(score_p, score_q, names=("score_p", "score_q"), paired=True)
    return mean_of((score_p.double() - score_q.double()).square().sum(1).detach())


def _with_slope(score: Score, x: Tensor, directions: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    """The score, and v^T grad s v for each sample and each direction of (k, n, d), summed over k."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        s = evaluated(score, at)
        total = x.new_zeros(len(x))
        for v in directions:
            if s.requires_grad:
                (gradient,) = torch.autograd.grad(
                    (s * v).sum(), at, create_graph=graph, retain_graph=True, allow_unused=True
                )
                if gradient is not None:
                    total = total + (gradient * v).sum(1)
    return s, total


def _hyvarinen_terms(
    score: Score, x: Tensor, projections: int | None, generator: torch.Generator | None, graph: bool
) -> Tensor:
    x = checked(x, "x")
    n, d = x.shape
    if projections is None:
        s, trace = _with_slope(score, x, torch.eye(d, dtype=x.dtype, device=x.device)[:, None], graph)
        return trace + s.square().sum(1) / 2
    check_count("the number of projections", projections, fix="None is exact")
    where = generator.device if generator is not None else x.device
    signs = torch.randint(0, 2, (int(projections), n, d), generator=generator, device=where).to(x) * 2 - 1
    s, slope = _with_slope(score, x, signs, graph)
    return slope / projections + s.square().sum(1) / 2


def hyvarinen(
    score: Score, x: Tensor, *, projections: int | None = None, generator: torch.Generator | None = None
) -> Estimate:
    r"""Hyvarinen's score E_p[tr grad s_q + \|s_q\|^2 / 2]: half the Fisher divergence plus a constant.

    Lower is better; differences between models are differences of half the Fisher divergence.

    Args:
        score: grad log q, a function (n, d) -> (n, d) of each sample on its own.
        x: Samples of p, (n, d).
        projections: None for the exact trace, d backward passes; a number for that many random signs in its
            place (sliced score matching with the variance-reduced norm, Song et al. 2019).
        generator: Draws the signs.

    Raises:
        UserError: Bad samples, score or number of projections.
    """
    return mean_of(_hyvarinen_terms(score, x, projections, generator, graph=False).detach().double())


def score_matching_loss(
    score: Score, x: Tensor, *, projections: int | None = 1, generator: torch.Generator | None = None
) -> Tensor:
    """The mean of :func:`hyvarinen` as a loss for the parameters of a score network.

    Arguments and errors are those of :func:`hyvarinen`.

    Returns:
        () in the precision of the samples.
    """
    return _hyvarinen_terms(score, x, projections, generator, graph=True).mean()


def denoising_score_matching_loss(
    score: Score, x: Tensor, sigma: float, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""E\|s_q(x + sigma e) + e / sigma\|^2 / 2: half the Fisher divergence to the blurred p, plus a constant.

    Args:
        score: grad log q, a function (n, d) -> (n, d).
        x: Samples of p, (n, d).
        sigma: Standard deviation of the blur.
        generator: Draws the noise.

    Returns:
        () in the precision of the samples.

    Raises:
        UserError: Bad samples or score, or sigma not positive.
    """
    check_number("sigma", sigma, "(0, inf)")
    x = checked(x, "x")
    where = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where).to(x.device)
    return (evaluated(score, x + sigma * noise) + noise / sigma).square().sum(1).mean() / 2
