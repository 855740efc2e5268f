"""Variational lower bounds of divergences, from the values of a critic at held-out samples.

Every bound holds for every critic; a better critic makes it tighter. The samples must not have been used to
train or choose the critic: on those the same formulas are no bounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.divergences import Divergence, divergence
from distmatch.divergences.estimators.inputs import check_critic
from distmatch.divergences.estimators.results import (
    LowerBound,
    effective_from_log,
    few,
    joined,
)
from distmatch.divergences.estimators.tails import both_tails, judged, unseen


def f_gan_terms(measure: Divergence, log_r_p: Tensor, log_r_q: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of the f-GAN bound for the critic T = f'(r): their means add up to it. Differentiable.

    D_f >= E_p[T] - E_q[f*(T)] (Nguyen, Wainwright, Jordan 2010; Nowozin, Cseke, Tomioka 2016). At T = f'(r)
    the second term is f*(f'(r)) = r f'(r) - f(r) = -g'(1/r), g the generator of the dual: a form without
    cancellation, in which every log-ratio is inside the domain.

    Args:
        measure: The divergence.
        log_r_p: The critic's log p/q at samples of p.
        log_r_q: The same at samples of q.
    """
    return measure.df(log_r_p), measure.dual().df(-log_r_q)


def f_gan_bound(which: str | Divergence, log_r_p: Tensor, log_r_q: Tensor) -> LowerBound:
    """The f-GAN lower bound of any divergence, from a critic that estimates log p/q.

    For ``"kl"`` it is the NWJ bound with critic 1 + log r. For ``"js"`` it is log 2 less the mean logistic
    loss of the classifier with logit log r, for ``"tv"`` the accuracy of that classifier times two less one.

    Args:
        which: The divergence or its name.
        log_r_p: The critic's log p/q at held-out samples of p, (n,).
        log_r_q: The same at held-out samples of q, (m,).

    Raises:
        UserError: The values are not finite, or there is no such divergence.
    """
    measure = divergence(which)
    log_r_p, log_r_q = check_critic(log_r_p, log_r_q)
    on_p, on_q = f_gan_terms(measure, log_r_p, log_r_q)
    # Both KL rest on samples of one side that look like the other.
    limit = {"kl": len(on_q), "reverse_kl": len(on_p)}.get(measure.name)
    value = float(on_p.mean()) + float(on_q.mean())
    n = min(len(on_p), len(on_q))
    if not math.isfinite(value):
        return LowerBound(-math.inf, math.nan, n, "the critic is so inaccurate that the bound overflows")
    mean_p, mean_q = float(on_p.mean()), float(on_q.mean())
    sides = (
        judged(on_p - mean_p, *both_tails(log_r_p, lambda x: measure.df(x) - mean_p)),
        judged(on_q - mean_q, *both_tails(log_r_q, lambda x: measure.dual().df(-x) - mean_q)),
    )
    # A side that hardly adds to the error may well rest on few samples.
    warnings = (warning for error, warning in sides if error > 0.01 * abs(value))
    warning = joined(_saturated(value, limit) if limit is not None else None, *warnings)
    return LowerBound(value, math.hypot(*(error for error, _ in sides)), n, warning)


def classifier_bound(
    which: str | Divergence, logit_p: Tensor, logit_q: Tensor, *, prior_log_odds: float = 0.0
) -> LowerBound:
    """The same bound from the logits of a classifier of p (positive) against q (negative).

    Args:
        which: The divergence or its name.
        logit_p: Logits at held-out samples of p, (n,).
        logit_q: Logits at held-out samples of q, (m,).
        prior_log_odds: log(n_p / n_q) of the samples it was trained on; 0 for balanced training. Subtracted.

    Raises:
        UserError: The logits are not finite, or there is no such divergence.
    """
    return f_gan_bound(which, logit_p - prior_log_odds, logit_q - prior_log_odds)


def nwj_bound(critic_p: Tensor, critic_q: Tensor) -> LowerBound:
    """KL(p || q) >= E_p[T] - E_q[e^(T - 1)] (Nguyen, Wainwright, Jordan 2010); best at T = 1 + log p/q.

    Args:
        critic_p: T at held-out samples of p, (n,).
        critic_q: T at held-out samples of q, (m,).

    Raises:
        UserError: The values are not finite.
    """
    return f_gan_bound("kl", critic_p - 1.0, critic_q - 1.0)


def donsker_varadhan_bound(critic_p: Tensor, critic_q: Tensor) -> LowerBound:
    """KL(p || q) >= E_p[T] - log E_q[e^T] (Donsker, Varadhan 1983); best at T = log p/q + any constant.

    Never below the NWJ bound of the same critic. The mean under q rests on samples of q that look like p. No
    bound that holds with high confidence exceeds log m by much (McAllester, Stratos 2020), so beyond it, or
    where few samples dominate that mean, there is a warning. The logarithm of a mean makes the estimate too
    high by about half its squared error.

    Args:
        critic_p: T at held-out samples of p, (n,).
        critic_q: T at held-out samples of q, (m,).

    Raises:
        UserError: The values are not finite.
    """
    on_p, log_w = check_critic(critic_p, critic_q)
    m = len(log_w)
    log_mean = torch.logsumexp(log_w, 0) - math.log(m)
    value = float(on_p.mean() - log_mean)
    ess = effective_from_log(log_w)
    error_p, warning_p = judged(on_p - on_p.mean(), *both_tails(on_p - on_p.mean(), lambda x: x))
    relative = log_w - log_mean
    error_q, warning_q = judged(torch.expm1(relative), *both_tails(relative, torch.expm1))
    warning = joined(_saturated(value, m), warning_p, warning_q)
    if ess < few(m):
        warning = joined(
            _saturated(value, m),
            f"e^T is dominated by about {ess:.0f} of {m} samples of q: the bound is near its ceiling "
            f"log {m} = "
            f"{math.log(m):.3g}, and the divergence may be far above it",
        )
    return LowerBound(value, math.hypot(error_p, error_q), min(len(on_p), m), warning)


def chi_square_bound(critic_p: Tensor, critic_q: Tensor) -> LowerBound:
    """Pearson's chi-square >= (E_p[T] - E_q[T])^2 / Var_q(T) (Hammersley, Chapman, Robbins); best at T = p/q.

    The square of the difference is corrected for its own variance, so the value can be below zero.

    Args:
        critic_p: T at held-out samples of p, (n,); any scale and shift give the same bound.
        critic_q: T at held-out samples of q, (m,).

    Returns:
        The bound; exactly 0 for a critic that is constant.

    Raises:
        UserError: The values are not finite.
    """
    on_p, on_q = check_critic(critic_p, critic_q)
    n = min(len(on_p), len(on_q))
    center = on_q.mean()
    scale = torch.maximum((on_p - center).abs().max(), (on_q - center).abs().max())
    if float(scale) == 0.0:
        return LowerBound(0.0, 0.0, n)
    # In this unit squares neither overflow nor vanish.
    on_p, on_q = (on_p - center) / scale, (on_q - center) / scale
    variance = float(on_q.var(correction=1))
    if variance < 1e-20:
        return LowerBound(math.inf, math.nan, n, "the critic is constant on q: the supports may not overlap")
    gap = float(on_p.mean())
    error2 = float(on_p.var(correction=1)) / len(on_p) + variance / len(on_q)
    value = (gap * gap - error2) / variance

    # Influence of one sample on gap^2 / variance; the last part is what is left of gap^2 at gap = 0.
    def from_p(x: Tensor) -> Tensor:
        return 2.0 * gap / variance * (x - gap)

    def from_q(x: Tensor) -> Tensor:
        return -2.0 * gap / variance * x - value / variance * (x.square() - variance)

    error_p, warning_p = judged(from_p(on_p), unseen(on_p, from_p), unseen(-on_p, lambda x: from_p(-x)))
    error_q, warning_q = judged(from_q(on_q), unseen(on_q, from_q), unseen(-on_q, lambda x: from_q(-x)))
    stderr = math.sqrt(error_p**2 + error_q**2 + 2.0 * (error2 / variance) ** 2)
    warning = joined(warning_p, warning_q) if stderr > 0.01 * abs(value) else None
    return LowerBound(value, stderr, n, warning)


def _saturated(value: float, m: int) -> str | None:
    if value <= math.log(m):
        return None
    return f"above log {m} = {math.log(m):.3g} a bound from {m} samples cannot be trusted"
