"""Tests that any density ratio must pass, whatever it came from: its masses.

If r = p/q then E_q[r] = 1, E_p[1/r] = 1 and E_q[r / (1 + r)] = E_p[1 / (1 + r)]. The first two see every
error of scale, but their variances are the chi-squares between p and q, so far apart they see nothing. The
third is bounded and can always be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate

SIGMAS = 4.0  # a mass this many standard errors off is wrong: by chance, one test in 16,000
# Coverage of mean +- 1.96 s/sqrt(n) falls short of 95% by about 0.25 skewness^2 / n (Edgeworth expansion), so
# this loses 5%; what one sample dominates has skewness^2 / n near 1.
_SKEW = 0.2


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of independent values (N,) with standard error, and a warning if it is not nearly normal."""
    v = values.detach().double()
    n = len(v)
    mean = v.mean()
    if n < 2:
        return Estimate(mean.item(), math.nan, n, warning="one sample gives no standard error")
    centered = v - mean
    largest = centered.abs().max()
    if not bool(largest > 0):
        return Estimate(mean.item(), 0.0 if math.isfinite(mean.item()) else math.nan, n)
    unit = centered / largest  # so that no square overflows
    variance = unit.square().mean()
    skew = (unit**3).mean() / variance**1.5
    warning = None
    if bool(skew.square() > _SKEW * n):
        warning = "a few samples dominate this mean: its standard error is too small"
    stderr = largest * (variance / (n - 1)).sqrt()
    return Estimate(mean.item(), stderr.item(), n, warning=warning)


@dataclass(frozen=True)
class MassTests:
    """The masses of a ratio on samples that it was not fitted to.

    Attributes:
        q: E_q[r], 1 for the true ratio.
        p: E_p[1/r], 1 for the true ratio.
        balance: E_q[r / (1 + r)] - E_p[1 / (1 + r)], 0 for the true ratio; never heavy-tailed.
    """

    q: Estimate
    p: Estimate
    balance: Estimate

    def failures(self) -> tuple[str, ...]:
        """The masses that are off by more than four standard errors.

        A mass that cannot be estimated with these samples is no evidence against the ratio; only when that is
        so for both E_q[r] and E_p[1/r] is it counted here.
        """
        found = []
        if not (self.q.reliable or self.p.reliable):
            found.append("E_q[r] and E_p[1/r] cannot be estimated with so few samples")
        for name, mass, truth in (
            ("E_q[r]", self.q, 1.0),
            ("E_p[1/r]", self.p, 1.0),
            ("E_q[r/(1+r)] - E_p[1/(1+r)]", self.balance, 0.0),
        ):
            if mass.reliable and abs(mass.value - truth) > SIGMAS * mass.stderr:
                found.append(f"mass test {name} = {mass} and should be {truth:g}: the ratio is wrong")
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether no failure was found."""
        return not self.failures()


def mass_tests(log_r_p: Tensor, log_r_q: Tensor) -> MassTests:
    """The mass tests of log-ratios, for example of a classifier's logits.

    Args:
        log_r_p: log r at samples of p, (N,), not those it was fitted to.
        log_r_q: log r at samples of q, (M,), likewise.

    Returns:
        The three masses. One that needs more samples than there are has a ``warning``: E_q[r] needs
        about exp(KL(p || q) + sd of log r under p) samples of q (Chatterjee and Diaconis, arXiv 1511.01437).

    Raises:
        UserError: There are fewer than two values on a side, or NaN among them.
    """
    for name, values in (("log_r_p", log_r_p), ("log_r_q", log_r_q)):
        if values.ndim != 1 or len(values) < 2 or bool(values.isnan().any()):
            raise UserError(
                f"{name} cannot be tested",
                got=f"shape {tuple(values.shape)}" + (", NaN" if bool(values.isnan().any()) else ""),
                expected="at least two log-ratios in one dimension, none of them NaN",
            )
    on_p, on_q = log_r_p.detach().double(), log_r_q.detach().double()
    return MassTests(_mass(on_q, on_p), _mass(-on_p, -on_q), _balance(on_p, on_q))


def _mass(log_r: Tensor, log_r_other: Tensor) -> Estimate:
    """E[exp(log_r)], with the log-ratios on the other side telling whether it can be measured."""
    mass = mean_estimate(log_r.exp())
    needed = (log_r_other.mean() + log_r_other.std()).item()
    if mass.warning is None and needed > math.log(len(log_r)):
        wanted = f"about exp({needed:.0f})" if needed > 16 else f"about {math.exp(needed):.0f}"
        warning = f"{len(log_r)} samples are not enough, {wanted} would"
        return Estimate(mass.value, mass.stderr, mass.n, warning=warning)
    return mass


def _balance(on_p: Tensor, on_q: Tensor) -> Estimate:
    first, second = mean_estimate(torch.sigmoid(on_q)), mean_estimate(torch.sigmoid(-on_p))
    return Estimate(
        first.value - second.value,
        math.hypot(first.stderr, second.stderr),
        first.n + second.n,
        warning=first.warning or second.warning,
    )
