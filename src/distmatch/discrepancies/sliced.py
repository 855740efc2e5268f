r"""Sliced Wasserstein distance: the mean over directions of transport on a line (Rabin et al. 2011).

SW_p^p = E over unit vectors t of W_p^p(t.x, t.y). The root SW_p is what POT and the literature report; in d
dimensions SW_2^2 <= W_2^2 / d, with equality for two Gaussians of one covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.discrepancies.measures import Measures, checked_measures
from distmatch.discrepancies.wasserstein import checked_order, line_costs, line_distances

OfLines = Callable[[Tensor, Tensor, Measures, float], Tensor]

_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 27}
"""Positions sorted at once: on a CPU all that is made of them should stay in the cache."""


@dataclass(frozen=True)
class MaxSliced:
    """The direction along which two samples differ most.

    Attributes:
        value: W_p along it (), no larger than the true maximum.
        direction: The unit vector (d,).
    """

    value: Tensor
    direction: Tensor


def random_directions(
    d: int, count: int, *, generator: torch.Generator | None = None, like: Tensor | None = None
) -> Tensor:
    """Independent directions, uniform on the sphere.

    Args:
        d: Dimension.
        count: How many.
        generator: Draws them; torch's own generator by default.
        like: The result takes the precision and device of this tensor.

    Returns:
        Unit vectors (count, d).

    Raises:
        UserError: ``count`` is less than one.
    """
    check_count("the number of projections", count)
    device = generator.device if generator is not None else "cpu"
    drawn = torch.randn(count, d, generator=generator, device=device, dtype=torch.float64)
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    return unit if like is None else unit.to(like)


def _directions(
    measures: Measures, projections: int, directions: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    d = measures.x.shape[1]
    if directions is None:
        if d == 1:
            return torch.ones_like(measures.x[:1])
        return random_directions(d, projections, generator=generator, like=measures.x)
    if directions.ndim != 2 or directions.shape[1] != d or len(directions) < 1:
        raise UserError(
            "the directions do not match the samples", got=tuple(directions.shape), expected=f"shape (L, {d})"
        )
    unit = directions.to(measures.x)
    if not bool(((unit.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise UserError("directions must be unit vectors", fix="divide each row by its norm")
    return unit


def _along(of_lines: OfLines, measures: Measures, directions: Tensor, p: float) -> Tensor:
    """:func:`line_costs` or :func:`line_distances` along each direction (L,), in chunks of directions."""
    x, y, a, b = measures.x, measures.y, measures.a, measures.b
    # Far from the origin a projection would round more than the samples themselves do.
    center = (x.detach().double().mean(0) + y.detach().double().mean(0)) / 2
    x, y = ((z.double() - center).to(z.dtype) for z in (x, y))
    room = _ENTRIES["cpu" if x.device.type == "cpu" else "cuda"]
    chunks = directions.split(max(1, room // (len(x) + len(y))))

    def costs(rows: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return of_lines(rows @ x.T, rows @ y.T, Measures(x, y, a, b, measures.uniform), p)

    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, a, b))
    if graph and len(chunks) > 1:
        # Computed again in the backward pass, so that the graph never holds more than one chunk.
        parts = [
            checkpoint(costs, rows, x, y, a, b, use_reentrant=False, preserve_rng_state=False)
            for rows in chunks
        ]
    else:
        parts = [costs(rows, x, y, a, b) for rows in chunks]
    return torch.cat(parts)


def sliced_wasserstein_loss(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 2.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    projections: int = 100,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SW_p^p as a number to minimize, differentiable in samples and weights, unbiased over directions.

    Args:
        x: Samples (n, d).
        y: Samples (m, d).
        p: Order, at least 1.
        a: Weights of ``x`` (n,), not negative, summing to one; equal ones by default.
        b: Weights of ``y`` (m,).
        projections: Number of random directions; one is enough, and taken, for d = 1.
        directions: Unit vectors (L, d) to use instead.
        generator: Draws the directions; torch's own generator by default, so that every call has fresh ones.

    Returns:
        () in the precision of the samples.

    Raises:
        UserError: Samples, weights or settings that are not usable.
    """
    p = checked_order(p)
    measures = checked_measures(x, y, a, b)
    return _along(line_costs, measures, _directions(measures, projections, directions, generator), p).mean()


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 2.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    projections: int = 100,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The sliced Wasserstein distance SW_p between two samples, with the standard error of its directions.

    The standard error is that of the mean over random directions relative to all directions, for these
    samples; it does not hold the error of the samples themselves. With d = 1 the distance is exact.

    Args:
        x: Samples (n, d).
        y: Samples (m, d).
        p: Order, at least 1.
        a: Weights of ``x`` (n,), not negative, summing to one; equal ones by default.
        b: Weights of ``y`` (m,).
        projections: Number of random directions.
        directions: Unit vectors (L, d) to use instead; the standard error assumes independent draws.
        generator: Draws the directions; seed it to compare runs on the same ones.

    Returns:
        SW_p, the root; ``n`` is the smaller number of samples.

    Raises:
        UserError: Samples, weights or settings that are not usable.
    """
    p = checked_order(p)
    measures = checked_measures(x, y, a, b)
    with torch.no_grad():
        rows = _directions(measures, projections, directions, generator)
        found = _along(line_distances, measures, rows, p).double()
    largest = float(found.max())
    costs = (found / (largest or 1.0)).pow(p)
    mean = float(costs.mean())
    value = largest * mean ** (1 / p)
    n = min(len(measures.x), len(measures.y))
    if measures.x.shape[1] == 1 or mean == 0:
        return Estimate(value, 0.0, n)
    if len(costs) < 2:
        return Estimate(value, math.nan, n, "a single direction has no error bar")
    spread = float(costs.std()) / math.sqrt(len(costs))
    return Estimate(value, spread * value / (p * mean), n)


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 2.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    projections: int = 100,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> MaxSliced:
    """The largest W_p over directions, by ascent from the best of random ones and the difference of means.

    Args:
        x: Samples (n, d).
        y: Samples (m, d).
        p: Order, at least 1.
        a: Weights of ``x`` (n,), not negative, summing to one; equal ones by default.
        b: Weights of ``y`` (m,).
        projections: Number of random directions to start from.
        steps: Largest number of ascent steps; the angle halves whenever a step does not help.
        generator: Draws the directions.

    Returns:
        Value and direction. The value is that of the direction found: a lower bound of the maximum.

    Raises:
        UserError: Samples, weights or settings that are not usable.
    """
    p = checked_order(p)
    measures = checked_measures(x, y, a, b)
    x, y, a, b = (t.detach() for t in (measures.x, measures.y, measures.a, measures.b))
    fixed = Measures(x, y, a, b, measures.uniform)
    starts = _directions(fixed, projections, None, generator)
    with torch.no_grad():
        apart = (fixed.a @ fixed.x.double() - fixed.b @ fixed.y.double()).to(fixed.x)
        if float(apart.norm()) > 0:
            starts = torch.cat([starts, (apart / apart.norm())[None]])
        found = _along(line_distances, fixed, starts, p)
    best, value, angle = starts[found.argmax()], found.max(), 0.5
    for _ in range(steps):
        leaf = best.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(_along(line_distances, fixed, leaf[None], p).sum(), leaf)
        slope = slope - (slope @ best) * best
        if not float(slope.norm()) > 0 or angle < 1e-6:
            break
        turned = math.cos(angle) * best + math.sin(angle) * slope / slope.norm()
        turned = turned / turned.norm()
        with torch.no_grad():
            reached = _along(line_distances, fixed, turned[None], p)[0]
        if reached > value:
            best, value, angle = turned, reached, min(2 * angle, 0.5)
        else:
            angle /= 2
    return MaxSliced(value, best)
