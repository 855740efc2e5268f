r"""Sinkhorn divergence: entropic transport without its bias, for weighted samples (Feydy et al. 2019).

OT_eps(a, b) = min over plans P of <P, C> + eps KL(P | a x b), with C_ij = |x_i - y_j|^2 / 2, and
S_eps(a, b) = OT_eps(a, b) - OT_eps(a, a) / 2 - OT_eps(b, b) / 2, which is >= 0 and zero for equal measures
only. As eps falls to 0 it becomes half the squared Wasserstein-2 distance, as eps grows half the squared
distance of the means. With geomloss: ``SamplesLoss("sinkhorn", p=2, blur=sqrt(eps))``. With POT, whose cost
has no 1/2: ``ot.solve_sample(x, y, reg=2 * eps, reg_type="KL").value / 2`` is one OT_eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmatch.base.checks import check_count, check_number
from distmatch.discrepancies.measures import checked_measures
from distmatch.discrepancies.sinkhorn_solver import Cloud, Settings, Solution, cloud, solve, solve_self

_DEFAULT_TOL = 1e-5
_DEFAULT_MEMORY = 1 << 30
_MOST_ROUNDING = 1e-4
"""Of the exponents of the kernel in float32: beyond it everything is computed in float64,"""
_LEAST_ABOVE_ROUNDING = 10.0
"""and again so where the value is not that many times the rounding of one cost; a mean rounds less."""


@dataclass(frozen=True)
class SinkhornResult:
    """A Sinkhorn divergence and how far the iteration came.

    Attributes:
        value: The divergence (), in the precision of the samples; differentiable once in samples and weights.
        epsilon: The regularization used, in units of the cost.
        converged: Whether all marginal errors are within twice the tolerance.
        iterations: Iterations at ``epsilon`` of the problem between the two measures.
        marginal_error: The largest L1 error of a marginal; the error of ``value`` is of second order in it.
        f: Witness on ``x`` (n,) float64: how the value changes when mass is added there, up to a constant.
        g: Witness on ``y`` (m,) float64.
        stderr: First-order standard error of ``value`` for the distributions that were sampled, from the
            spread of the witnesses; NaN with one sample on a side. :func:`sinkhorn_estimate` says when it
            means something.
    """

    value: Tensor
    epsilon: float
    converged: bool
    iterations: int
    marginal_error: float
    f: Tensor
    g: Tensor
    stderr: float


class _Envelope(torch.autograd.Function):
    """A value with its gradients given: at converged potentials they do not move, so neither need a graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pulls: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*pulls)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.to(pull.dtype) * pull for pull in ctx.saved_tensors)


def _cost_gradients(x: Cloud, y: Cloud, found: Solution) -> tuple[Tensor, Tensor]:
    """Gradients of OT_eps in the points: sums over the plan of x_i - y_j, and of y_j - x_i."""
    last = found.sweep
    if last.barycenter is None or last.pulled is None:
        raise RuntimeError("the last sweep was computed without its moments")
    of_x = x.weight.to(x.points.dtype)[:, None] * (x.points - last.barycenter)
    of_y = last.columns.to(y.points.dtype)[:, None] * y.points - last.pulled
    return of_x, of_y


def _dual(x: Cloud, y: Cloud, found: Solution) -> Tensor:
    return x.weight @ found.sweep.f + y.weight @ found.g


def _centered(potential: Tensor, weight: Tensor) -> Tensor:
    return potential - weight @ potential


def _variance(witness: Tensor, weight: Tensor) -> float:
    """Variance of a weighted mean of independent values."""
    if len(weight) < 2:
        return math.nan
    squares = weight.square()
    share = float(squares.sum())
    return float(squares @ _centered(witness, weight).square()) / (1 - share) if share < 1 else math.nan


def _check_settings(epsilon: float | None, tol: float, max_iter: int, memory: int) -> None:
    check_number("epsilon", 1 if epsilon is None else epsilon, "(0, inf)", fix="omit it for the default")
    check_number("tol", tol, "(0, 1)", fix="1e-5, for example")
    check_count("max_iter", max_iter)
    check_number("memory, in bytes,", memory, "[0, inf]")


@dataclass(frozen=True)
class _Found:
    """Value, witnesses, gradients in the points; the problems they come from, that between the two first."""

    total: Tensor
    f: Tensor
    g: Tensor
    pulls: list[Tensor]
    solutions: list[Solution]


def _transport(clouds: Sequence[Cloud], s: Settings, debias: bool) -> _Found:
    """The divergence in the precision of the points."""
    left, right = clouds
    both = solve(left, right, s)
    total, f, g = _dual(left, right, both), both.sweep.f, both.g
    pulls = list(_cost_gradients(left, right, both)) if s.moments else []
    if not debias:
        return _Found(total, f, g, pulls, [both])
    selves = [solve_self(z, s) for z in clouds]
    total = total - (_dual(left, left, selves[0]) + _dual(right, right, selves[1])) / 2
    if s.moments:
        for i, (z, alone) in enumerate(zip(clouds, selves, strict=True)):
            of_rows, of_columns = _cost_gradients(z, z, alone)
            pulls[i] = pulls[i] - (of_rows + of_columns) / 2
    return _Found(total, f - selves[0].sweep.f, g - selves[1].sweep.f, pulls, [both, *selves])


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float | None = None,
    debias: bool = True,
    tol: float = _DEFAULT_TOL,
    max_iter: int = 1000,
    memory: int = _DEFAULT_MEMORY,
) -> SinkhornResult:
    r"""The Sinkhorn divergence between two weighted samples under the cost |x - y|^2 / 2.

    The gradient follows from the envelope theorem: only the converged potentials enter it, no iteration is
    recorded. It is the gradient of the value in the samples, and in the weights along directions that keep
    their sum. Time is O(nm) an iteration, memory O(n + m) besides one block of the kernel and ``memory``.

    Args:
        x: Samples (n, d). Potentials are in float64; the kernel is in the precision of the samples, or in
            float64 where that of float32 would show: clusters far apart for epsilon or for the value.
        y: Samples (m, d).
        a: Weights of ``x`` (n,), not negative, summing to one; equal ones by default. Zero is allowed.
        b: Weights of ``y`` (m,).
        epsilon: Regularization in units of the cost, blur^2 in the words of geomloss. By default a twentieth
            of the mean cost between two draws of the pooled sample, which is the trace of its covariance.
        debias: Whether to take the two halves of the self-transport off; without it the value is OT_eps.
        tol: L1 error of the marginals at which to stop. The value is then off by about its square.
        max_iter: Largest number of iterations at ``epsilon``; ``converged`` states whether this was enough.
        memory: Bytes that a kernel kept between iterations may take. Where n m numbers do not fit, they are
            computed anew in every iteration, block by block: slower by a factor of about two, same result.

    Raises:
        UserError: Samples, weights or settings that are not usable.
    """
    _check_settings(epsilon, tol, max_iter, memory)
    measures = checked_measures(x, y, a, b)
    inputs = (measures.x, measures.y, measures.a, measures.b)
    moments = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad():
        wa, wb = measures.a.detach(), measures.b.detach()
        px, py = (z.detach().double() for z in (measures.x, measures.y))
        center = (wa @ px + wb @ py) / 2
        clouds = cloud(px - center, wa), cloud(py - center, wb)
        left, right = (z.half_norm for z in clouds)
        spread = float(wa @ left + wb @ right)
        eps = float(epsilon) if epsilon is not None else 0.05 * spread or 1.0
        settings = Settings(eps, spread, tol, max_iter, memory, moments)
        given = measures.x.dtype
        rounding = torch.finfo(given).eps * float(torch.maximum(left.amax(), right.amax()))
        narrow = given != torch.float64 and rounding < _MOST_ROUNDING * eps
        rounded = [replace(z, points=z.points.to(given)) for z in clouds]
        found = _transport(rounded if narrow else clouds, settings, debias)
        if narrow and abs(float(found.total)) < _LEAST_ABOVE_ROUNDING * rounding:
            found = _transport(clouds, settings, debias)
        f, g = _centered(found.f, wa), _centered(found.g, wb)
        value, pulls = found.total.to(given), [pull.to(given) for pull in found.pulls]
    if moments:
        value = _Envelope.apply(value, (*pulls, f, g), *inputs)
    return SinkhornResult(
        value=value,
        epsilon=eps,
        converged=all(one.converged for one in found.solutions),
        iterations=found.solutions[0].iterations,
        marginal_error=max(one.marginal_error for one in found.solutions),
        f=f,
        g=g,
        stderr=math.sqrt(_variance(f, wa) + _variance(g, wb)),
    )
