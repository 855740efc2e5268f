"""The value of an f-divergence from samples and a density ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.samples import checked
from distmatch.divergences import Divergence, divergence
from distmatch.ratio.density_ratio import DensityRatio
from distmatch.ratio.diagnostics import SIGMAS, mean_estimate


def divergence_from_ratio(
    which: str | Divergence,
    ratio: DensityRatio | Callable[[Tensor], Tensor],
    x_q: Tensor,
    x_p: Tensor | None = None,
) -> Estimate:
    r"""D_f(p || q) from a density ratio, at samples that it was not fitted to.

    With samples of q alone this is the mean of f(r), whose error is of first order in that of the ratio, so
    that for a fitted ratio no standard error is given. With samples of p as well it is

    .. math:: E_p[f'(r)] - E_q[f^*(f'(r))], \qquad f^*(f'(r)) = r f'(r) - f(r),

    which for *any* r is at most D_f (Nguyen, Wainwright and Jordan, arXiv 0809.0853), with an error of second
    order in the error of the ratio: use it when you can. The standard error is that of the given samples; the
    ratio's own error only lowers the value.

    ``warning`` holds what is known to be wrong with the ratio, and whether the samples miss the region that
    dominates the divergence: an unbounded divergence that is larger than the log of the sample size cannot be
    measured.

    Args:
        which: A divergence or its name.
        ratio: A fitted ratio, or a function from points to their log p/q that is known to be exact.
        x_q: Samples of q (M, *shape).
        x_p: Samples of p (N, *shape), if there are any.

    Returns:
        The value in nats; ``n`` counts the samples of both.

    Raises:
        UserError: The samples cannot be used, or the ratio returns NaN.
    """
    div = divergence(which)
    fitted = isinstance(ratio, DensityRatio)
    log_ratio = ratio.log_ratio if isinstance(ratio, DensityRatio) else ratio
    doubts = list(ratio.warnings) if isinstance(ratio, DensityRatio) else []
    on_q = _log_r(log_ratio, x_q, "x_q")
    if x_p is None:
        parts = [mean_estimate(div.f(on_q))]
        mass = mean_estimate(on_q.exp())
        if not fitted and abs(mass.value - 1.0) > SIGMAS * mass.stderr:
            doubts.append(f"E_q[r] is {mass} at these samples instead of 1: they miss samples of p")
    else:
        on_p = _log_r(log_ratio, x_p, "x_p")

        def q_part(log_r: Tensor) -> Tensor:
            return div.dual().df(-log_r)  # f(r) - r f'(r), without cancellation

        parts = [mean_estimate(div.df(on_p)), mean_estimate(q_part(on_q))]
        # The other sample's estimate of the part of each mean beyond the range of its own sample.
        beyond_q = (q_part(on_p).abs() * (-on_p).exp())[on_p > on_q.max()].sum().item() / len(on_p)
        beyond_p = (div.df(on_q).abs() * on_q.exp())[on_q < on_p.min()].sum().item() / len(on_q)
        if beyond_q + beyond_p > math.hypot(parts[0].stderr, parts[1].stderr):
            doubts.append(
                "the samples do not cover the region that dominates this divergence; use more samples"
            )
    doubts += [part.warning for part in parts if part.warning is not None][:1]
    stderr = math.nan if fitted and x_p is None else math.hypot(*(part.stderr for part in parts))
    value, n = sum(part.value for part in parts), sum(part.n for part in parts)
    return Estimate(value, stderr, n, warning="; ".join(doubts) or None)


def _log_r(log_ratio: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    checked(x, name)
    with torch.no_grad():
        log_r = log_ratio(x).double()
    if log_r.shape != (len(x),) or bool(log_r.isnan().any()):
        raise UserError(
            "the density ratio does not return log-ratios",
            got="NaN" if log_r.shape == (len(x),) else f"shape {tuple(log_r.shape)}",
            expected=f"numbers of shape ({len(x)},)",
        )
    return log_r
