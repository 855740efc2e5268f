"""The per-sample terms k1, k2, k3 of KL(q || p), and which gradient each of them has.

With l = log p - log q at samples of q (the student, which has the parameters theta):

========  =============  =====================  ===========================================================
term      formula        its mean under q       the mean of its gradient through log q at *fixed* samples
========  =============  =====================  ===========================================================
``k1``    -l             KL(q || p), unbiased   zero: E_q[grad log q] = 0. It trains nothing.
``k2``    l^2 / 2        biased, third order    the gradient of KL(q || p): E_q[-l grad log q]
``k3``    e^l - 1 - l    KL(q || p), unbiased   the gradient of KL(p || q): E_q[(1 - r) grad log q]
========  =============  =====================  ===========================================================

So the loss for reverse KL by its samples is k2, although its value is biased, and k3, the best value of the
three, moves the student by the *other* KL. Where samples are reparametrized, x = G_theta(z), and the gradient
goes through x as well, k1 and k3 both have the gradient of KL(q || p), and k2 does not.

Names: J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from distmatch.base.errors import unknown_name
from distmatch.base.estimate import Estimate
from distmatch.divergences.estimators.inputs import check_log_densities
from distmatch.divergences.estimators.results import few_warning, joined, mass_warning, mean_error
from distmatch.divergences.estimators.tails import both_tails, judged
from distmatch.divergences.numerics import exp_excess

Term = Literal["k1", "k2", "k3"]


def kl_terms(log_p: Tensor, log_q: Tensor, term: Term = "k3") -> Tensor:
    """The terms whose mean over samples of q estimates KL(q || p); differentiable, for use as a loss.

    Mind the gradient (see the table at the head of this module): at fixed samples k1 has none on average,
    k2 that of KL(q || p), and k3 that of KL(p || q).

    Args:
        log_p: log p (teacher) at samples of q, any shape.
        log_q: log q (student) at the same samples.
        term: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        One term a sample, in nats; k3 is never negative, k1 can be.

    Raises:
        UserError: There is no such term.
    """
    log_r = log_p - log_q
    if term == "k1":
        return -log_r
    if term == "k2":
        return 0.5 * log_r.square()
    if term == "k3":
        return exp_excess(log_r)
    raise unknown_name("KL term", term, get_args(Term))


def kl_estimate(log_p: Tensor, log_q: Tensor, term: Term = "k3") -> Estimate:
    """KL(q || p) as the mean of :func:`kl_terms` over samples of q.

    Args:
        log_p: log p at the samples, (n,); -inf where p is zero gives +inf.
        log_q: log q at the samples, (n,).
        term: Which term. k1 and k3 are unbiased; for k2 no standard error is given, because its bias is not
            known, and a warning where it differs from k1 on the same samples by more than two standard errors
            of their difference.

    Raises:
        UserError: The log-densities have holes, or there is no such term.
    """
    check_log_densities(log_p, log_q)
    terms = kl_terms(log_p.detach().double(), log_q.detach().double(), term)
    value = float(terms.mean())
    if not math.isfinite(value):
        return Estimate(math.inf, math.nan, len(terms))
    if term == "k1":
        return Estimate(value, mean_error(terms), len(terms), few_warning(terms))
    if term == "k3":
        # k3 is k1 + (r - 1): if the samples miss the tail of r, it is too low by 1 without visible symptoms.
        log_r = (log_p - log_q).detach().double()
        excess = torch.expm1(log_r.clamp(max=700.0))
        stderr, warning = judged(terms, *both_tails(log_r, lambda x: exp_excess(x) - value))
        return Estimate(value, stderr, len(terms), joined(mass_warning(excess), warning))
    difference = terms - kl_terms(log_p.detach().double(), log_q.detach().double(), "k1")
    bias, error = float(difference.mean()), mean_error(difference)
    warning = f"k2 is biased here: it differs from k1 by {bias:.2g} ± {error:.1g}"
    return Estimate(value, math.nan, len(terms), warning if abs(bias) > 2 * error else None)
