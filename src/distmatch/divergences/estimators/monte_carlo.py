"""Monte Carlo: a divergence from both log-densities at samples of q, or of q and p."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.divergences import Divergence, Renyi, divergence, measure
from distmatch.divergences.estimators.inputs import check_log_densities
from distmatch.divergences.estimators.results import (
    WeightedEstimate,
    effective_from_log,
    few,
    joined,
    mass_warning,
)
from distmatch.divergences.estimators.tails import both_tails, judged, unseen

Method = Literal["plain", "control_variate", "self_normalized"]

_LOG_MAX = 700.0  # exp of it is finite in float64
_NEAR_ONE = 1e-6  # Renyi orders closer than this to 1 are KL: the difference is of this order


def monte_carlo(
    which: str | Divergence | Renyi, log_p: Tensor, log_q: Tensor, *, method: Method = "control_variate"
) -> WeightedEstimate:
    """D_f(p || q) = E_q[f(p/q)] from log p and log q at independent samples of q.

    * ``"plain"``: the mean of the centered f(r). Unbiased and never negative.
    * ``"control_variate"``: the mean of f(r) - c (r - 1), whose second term has mean zero under q, with c the
      regression coefficient of f(r) on r. Never a larger variance for large n; a bias of order 1/n.
    * ``"self_normalized"``: for densities known up to constants: r is divided by its mean. A bias of order
      1/n, and finite variance only where Pearson's chi-square is finite.

    Samples of q cannot see mass of p where q is zero; the mean of r then falls short of 1, which is
    checked for the first two methods. :func:`monte_carlo_two_sided` counts that mass.

    Args:
        which: A divergence or its name; Renyi's goes to :func:`renyi_monte_carlo`.
        log_p: log p at the samples, (n,); -inf where p is zero.
        log_q: log q at the samples, (n,).
        method: As above.

    Returns:
        The value in nats, +inf where q has mass outside p and the divergence is infinite then; its standard
        error, which includes the contribution beyond the largest and the smallest observed p/q; the effective
        sample size of the weights p/q; a warning where few samples dominate the mean, where their tail has no
        variance or adds more than the error, or where the mean of p/q is not 1.

    Raises:
        UserError: The log-densities have holes, or there is no such divergence or method.
    """
    chosen = measure(which)
    if isinstance(chosen, Renyi):
        return renyi_monte_carlo(chosen.order, log_p, log_q, method=method)
    log_r = check_log_densities(log_p, log_q)
    check_name("method", method, get_args(Method))
    ess = effective_from_log(log_r) if bool((log_r > -math.inf).any()) else 0.0
    if method == "self_normalized":
        if ess == 0.0:
            raise UserError(
                "p vanishes at every sample of q", expected="supports that overlap", fix="use method='plain'"
            )
        log_r = log_r - _log_mean_exp(log_r)
    terms = _terms(chosen, log_r)
    value = float(terms.mean())
    if not math.isfinite(value):
        return WeightedEstimate(math.inf, math.nan, len(terms), None, ess)
    excess = torch.expm1(log_r.clamp(max=_LOG_MAX))
    mass = mass_warning(excess)
    slope = 0.0  # the part of r - 1 that is taken off the terms
    spread = terms
    if method == "control_variate":
        slope = _slope(terms, excess)
        terms = terms - slope * excess
        spread = (terms - terms.mean()) * _leverage(excess)
    elif method == "self_normalized":
        # What one more sample does to mean f(w / mean w), by the delta method.
        slope = float(_finite(chosen.df(log_r) * (1.0 + excess)).mean())
        spread = terms - value - slope * excess
        mass = None if ess >= few(len(terms)) else _weights_warning(ess, len(terms))
    value = float(terms.mean())
    tails = both_tails(log_r, lambda x: chosen.f(x) - slope * torch.expm1(x) - value)
    stderr, warning = judged(spread, *tails)
    return WeightedEstimate(value, stderr, len(terms), joined(mass, warning), ess)


def monte_carlo_two_sided(
    which: str | Divergence,
    at_q: tuple[Tensor, Tensor],
    at_p: tuple[Tensor, Tensor],
) -> Estimate:
    """D_f(p || q) from the log-densities at samples of q and at samples of p.

    The part where p <= q is a mean of f(r) over samples of q, and the part where p > q a mean of the dual
    generator at 1/r over samples of p: D_f = E_q[f(r); r <= 1] + E_p[f(r)/r; r > 1]. No term is
    larger than f(0) or lim f(r)/r, so bounded divergences have bounded terms, and mass of one distribution
    outside the other is counted. Unbiased and never negative.

    Args:
        which: A divergence or its name.
        at_q: (log p, log q), each (n,), at samples of q.
        at_p: (log p, log q), each (m,), at samples of p.

    Returns:
        The value in nats, +inf where mass outside the other support makes it infinite; n is the smaller
        number of samples.

    Raises:
        UserError: The log-densities have holes, or there is no such divergence.
    """
    chosen = divergence(which)
    sides = (
        (chosen, check_log_densities(*at_q, where="q")),
        (chosen.dual(), -check_log_densities(*at_p, where="p")),
    )
    on_q, on_p = (_terms(of, log_ratio.clamp(max=0.0)) for of, log_ratio in sides)
    n = min(len(on_q), len(on_p))
    value = float(on_q.mean()) + float(on_p.mean())
    if not math.isfinite(value):
        return Estimate(math.inf, math.nan, n)
    errors = [_side_error(*side) for side in sides]
    # Each side counts by its part of the error: terms that hardly add to the value do no harm.
    warning = joined(*(warning for error, warning in errors if error > 0.01 * value))
    return Estimate(value, math.hypot(*(error for error, _ in errors)), n, warning)


def _side_error(of: Divergence, log_ratio: Tensor) -> tuple[float, str | None]:
    """Standard error and warning for the mean of the generator ``of`` where its argument is at most 1."""
    low = log_ratio.clamp(-_LOG_MAX, 0.0)
    tail = unseen((-low).exp(), lambda inverse: _terms(of, -inverse.log()))
    return judged(_terms(of, log_ratio.clamp(max=0.0)), tail)


def renyi_monte_carlo(
    order: float, log_p: Tensor, log_q: Tensor, *, method: Method = "control_variate"
) -> WeightedEstimate:
    """Renyi's divergence log E_q[r^a] / (a - 1) of order a > 0, from log-densities at samples of q.

    With A_a the alpha divergence it is log(1 + a (a - 1) A_a) / (a - 1); order 1 is KL(p || q). The methods
    are those of :func:`monte_carlo`; each has a bias of order 1/n here, because of the logarithm.

    Args:
        order: The order a, positive.
        log_p: log p at the samples, (n,).
        log_q: log q at the samples, (n,).
        method: As for :func:`monte_carlo`.

    Raises:
        UserError: The order is not positive and finite, the log-densities have holes, p vanishes at every
            sample, or there is no such method.
    """
    check_number("the order of a Renyi divergence", order, "(0, inf)")
    if abs(order - 1.0) < _NEAR_ONE:
        return monte_carlo("kl", log_p, log_q, method=method)
    log_r = check_log_densities(log_p, log_q)
    check_name("method", method, get_args(Method))
    if bool((log_r == -math.inf).all()):
        raise UserError("p vanishes at every sample of q", expected="supports that overlap")
    ess = effective_from_log(log_r)
    if method == "self_normalized":
        log_r = log_r - _log_mean_exp(log_r)
    top = float((order * log_r).max())
    powers = torch.exp(order * log_r - top)
    excess = torch.expm1(log_r.clamp(max=_LOG_MAX))
    slope = _slope(powers, excess) if method == "control_variate" else 0.0
    mean = float((powers - slope * excess).mean())
    if mean <= 0.0:  # a correction larger than what it corrects: leave it out
        slope, mean = 0.0, float(powers.mean())
    spread = (powers - slope * excess) / mean - 1.0
    if method == "control_variate":
        spread = spread * _leverage(excess)
    mass = mass_warning(excess)
    if method == "self_normalized":
        slope = order * mean
        spread = spread - order * excess
        mass = None if ess >= few(len(powers)) else _weights_warning(ess, len(powers))
    tails = both_tails(log_r, lambda x: (torch.exp(order * x - top) - slope * torch.expm1(x)) / mean - 1.0)
    stderr, warning = judged(spread, *tails)
    scale = 1.0 / (order - 1.0)
    return WeightedEstimate(
        value=scale * (math.log(mean) + top),
        stderr=abs(scale) * stderr,
        n=len(powers),
        warning=joined(mass, warning),
        ess=ess,
    )


def _terms(chosen: Divergence, log_r: Tensor) -> Tensor:
    """f(r) at each log-ratio, with the true limit, maybe +inf, where r = 0."""
    empty = log_r == -math.inf
    terms = chosen.f(torch.where(empty, torch.zeros_like(log_r), log_r))
    return torch.where(empty, torch.full_like(terms, _at_zero(chosen)), terms)


def _at_zero(chosen: Divergence) -> float:
    """The limit f(0), +inf where f grows without end towards r = 0."""
    far = chosen.f(torch.tensor([-400.0, -800.0, -math.inf], dtype=torch.float64)).tolist()
    # An unbounded generator grows at least like -log r, so its value doubles from r = e^-400 to e^-800.
    if math.isinf(chosen.upper_bound) and far[1] > 1.9 * far[0]:
        return math.inf
    return far[2] if math.isfinite(far[2]) else far[1]


def _log_mean_exp(x: Tensor) -> Tensor:
    return torch.logsumexp(x, 0) - math.log(len(x))


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0)


def _slope(terms: Tensor, control: Tensor) -> float:
    """The coefficient of the regression of ``terms`` on ``control``, which is known to have mean zero."""
    scale = control.abs().max().clamp(min=torch.finfo(control.dtype).tiny)
    centered = (control - control.mean()) / scale  # so that its square does not overflow
    variance = centered.square().mean()
    if float(variance) < 1e-24:  # r is constant up to rounding: nothing to regress on
        return 0.0
    return float(((terms - terms.mean()) * centered).mean() / variance / scale)


def _leverage(control: Tensor) -> Tensor:
    """By how much the residual of each sample is too small because the regression was fitted to it.

    With it the error of the intercept is that of the jackknife (MacKinnon and White 1985, "HC3").
    """
    scale = control.abs().max().clamp(min=torch.finfo(control.dtype).tiny)
    centered = (control - control.mean()) / scale
    total = centered.square().sum()
    if float(total) < 1e-24 * len(control):
        return torch.ones_like(control)
    own = 1.0 / len(control) + centered.square() / total
    moved = 1.0 - len(control) * (control.mean() / scale) * centered / total
    return moved / (1.0 - own).clamp(min=0.02)


def _weights_warning(ess: float, n: int) -> str:
    return f"the effective sample size is {ess:.0f} of {n}: q has too few samples in the support of p"
