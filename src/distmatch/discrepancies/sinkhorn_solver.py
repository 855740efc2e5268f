"""The solver behind the Sinkhorn divergence: dual potentials of entropic transport, in blocks of rows.

Notation: C_ij = |x_i - y_j|^2 / 2, plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps). One *sweep* takes g,
sets f to its exact minimizer given g (so that every row of P sums to a_i) and returns the column sums of P. A
block of rows is finished before the next begins, so the exponentials are taken once per iteration, not twice,
and no more than a block exists at a time. Where the whole kernel exp((f + g - C) / eps) fits into the memory
allowed, it is kept around a reference pair of potentials, and a sweep is two products with vectors.

The map g -> g + eps log(b / column sums) is Sinkhorn's iteration. It is gradient ascent on the concave
semi-dual, and mixing the last few steps reaches its fixed point in far fewer sweeps; a step that lowers the
semi-dual is taken back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.discrepancies.anderson import Anderson

_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
_SELF_STEP = 2 / 3
_SMALLEST_WEIGHT = 1e-30
_REACH = 20.0
"""Largest |log scaling| around a kept kernel; what the floor below adds stays negligible within it."""
_FLOOR = {torch.float32: -60.0, torch.float64: -100.0}
"""Smallest exponent: below it exp is slow (denormal numbers) and the entry means nothing."""
_LOST = 35.0
"""A column whose log mass is off by more than this is computed in the log domain."""


@dataclass(frozen=True)
class Settings:
    """How a transport problem is solved.

    Attributes:
        eps: Regularization, in units of the cost.
        spread: Cost from which the regularization is cooled down.
        tol: L1 error of the column marginal at which to stop.
        max_iter: Largest number of sweeps at ``eps``.
        memory: Bytes that a kept kernel may take.
        moments: Whether the last sweep returns the barycenters.
    """

    eps: float
    spread: float
    tol: float
    max_iter: int
    memory: int
    moments: bool


@dataclass(frozen=True)
class Cloud:
    """One measure, prepared: centered points (n, d); half squared norms and weights (n,) in float64."""

    points: Tensor
    half_norm: Tensor
    weight: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class Sweep:
    """The state of a sweep.

    Attributes:
        f: Potential on the rows, the exact minimizer given g (n,) float64.
        columns: Column sums of the plan (m,) float64.
        barycenter: Mean of y under row i of the plan (n, d), or None.
        pulled: Sum over i of P_ij x_i (m, d), or None.
    """

    f: Tensor
    columns: Tensor
    barycenter: Tensor | None = None
    pulled: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """Potentials of one transport problem.

    Attributes:
        sweep: The last sweep, with the row potential f.
        g: The column potential (m,) float64.
        iterations: Sweeps at the final regularization.
        marginal_error: L1 distance of the plan's column sums from the weights; its row sums are exact.
        converged: Whether that is within twice the tolerance.
    """

    sweep: Sweep
    g: Tensor
    iterations: int
    marginal_error: float
    converged: bool


def cloud(points: Tensor, weight: Tensor) -> Cloud:
    """Prepares a measure about the common center; a weight of zero becomes 1e-30 and has a potential."""
    weight = weight.clamp_min(_SMALLEST_WEIGHT)
    return Cloud(points.contiguous(), points.double().square().sum(1) / 2, weight, weight.log())


def _rows_per_block(y: Cloud) -> int:
    """Rows of a block: it stays in a core's cache on a CPU, and fills the device elsewhere."""
    room = _BLOCK_BYTES["cpu" if y.points.device.type == "cpu" else "cuda"]
    return max(1, room // (y.points.shape[0] * y.points.element_size()))


def sweep_blocks(
    x: Cloud, y: Cloud, g: Tensor, eps: float, *, columns: bool = True, moments: bool = False
) -> Sweep:
    """A sweep without keeping the kernel, stable for every g.

    Args:
        x: The row measure.
        y: The column measure.
        g: Potential on ``y`` (m,).
        eps: Regularization.
        columns: Whether to sum the columns; left at zero otherwise.
        moments: Whether to return the barycenters that the gradient needs.
    """
    bias = ((g - y.half_norm) / eps + y.log_weight).to(x.points.dtype)
    scaled = (y.points.T / eps).contiguous()
    step = _rows_per_block(y)
    buffer = x.points.new_empty(min(step, x.points.shape[0]), y.points.shape[0])
    f, sums = torch.empty_like(x.half_norm), torch.zeros_like(y.half_norm)
    barycenter = torch.empty_like(x.points) if moments else None
    pulled = torch.zeros_like(y.points) if moments else None
    for low in range(0, x.points.shape[0], step):
        rows = slice(low, low + step)
        points = x.points[rows]
        block = torch.addmm(bias, points, scaled, out=buffer[: points.shape[0]])
        top = block.amax(1, keepdim=True)
        block.sub_(top).clamp_(min=_FLOOR[block.dtype]).exp_()
        mass = block.sum(1)
        f[rows] = x.half_norm[rows] - eps * (top[:, 0].double() + mass.double().log())
        share = (x.weight[rows] / mass).to(block.dtype)
        if columns:
            sums += share @ block
        if barycenter is not None and pulled is not None:
            barycenter[rows] = (block @ y.points) / mass[:, None]
            pulled += block.T @ (share[:, None] * points)
    return Sweep(f, sums, barycenter, pulled)


class Sweeper:
    """Sweeps at one regularization, with a stored kernel if the memory suffices.

    The kept kernel is b_j exp((f_i + g_j - C_ij) / eps) around reference potentials, so its rows sum to one.
    """

    def __init__(self, x: Cloud, y: Cloud, eps: float, memory: int) -> None:
        self.x, self.y, self.eps = x, y, eps
        n, m = x.points.shape[0], y.points.shape[0]
        self.room = n * m * x.points.element_size() <= memory
        self.step = _rows_per_block(y)
        self.kernel: Tensor | None = None
        self.f, self.g = torch.empty_like(x.half_norm), torch.empty_like(y.half_norm)

    def settle(self, f: Tensor, g: Tensor, step: Tensor) -> None:
        """Keeps the kernel at potentials that the last ``step`` changed little, unless there is one."""
        if not self.room or self.kernel is not None or float(step.abs().max()) > _REACH * self.eps / 2:
            return
        x, y, self.f, self.g = self.x, self.y, f, g
        kernel = x.points.new_empty(x.points.shape[0], y.points.shape[0])
        bias = ((g - y.half_norm) / self.eps + y.log_weight).to(kernel.dtype)
        shift = ((f - x.half_norm) / self.eps).to(kernel.dtype)
        scaled = (y.points.T / self.eps).contiguous()
        for low in range(0, x.points.shape[0], self.step):
            rows = slice(low, low + self.step)
            block = torch.addmm(bias, x.points[rows], scaled, out=kernel[rows])
            block.add_(shift[rows, None]).clamp_(min=_FLOOR[block.dtype]).exp_()
        self.kernel = kernel

    def sweep(self, g: Tensor, *, columns: bool = True) -> Sweep:
        """A sweep: two products with vectors, or blocks where the kept kernel does not reach ``g``."""
        if self.kernel is not None and float((g - self.g).abs().max()) > _REACH * self.eps:
            self.kernel = None
        if self.kernel is None:
            return sweep_blocks(self.x, self.y, g, self.eps, columns=columns)
        scaling = ((g - self.g) / self.eps).exp()
        narrow = scaling.to(self.kernel.dtype)
        mass, sums = torch.empty_like(self.f), torch.zeros_like(g)
        for low in range(0, self.kernel.shape[0], self.step):
            rows = slice(low, low + self.step)
            block = self.kernel[rows]
            mass[rows] = (block @ narrow).double()
            if columns:
                sums += (self.x.weight[rows] / mass[rows]).to(block.dtype) @ block
        return Sweep(self.f - self.eps * mass.log(), sums * scaling)


def _softmin_at(x: Cloud, y: Cloud, f: Tensor, where: Tensor, eps: float) -> Tensor:
    """The exact g given f at the columns ``where``."""
    part = Cloud(y.points[where], y.half_norm[where], y.weight[where], y.log_weight[where])
    return sweep_blocks(part, x, f, eps, columns=False).f


def _ascent(x: Cloud, y: Cloud, g: Tensor, found: Sweep, eps: float) -> Tensor:
    """Sinkhorn's step for g; columns whose mass underflowed are computed in the log domain."""
    step = eps * (y.log_weight - found.columns.log())
    lost = step > _LOST * eps
    if bool(lost.any()):
        step[lost] = _softmin_at(x, y, found.f, lost, eps) - g[lost]
    return step


def cooling(start: float, eps: float) -> list[float]:
    """Regularizations from ``start`` down towards ``eps`` (excluded), each a quarter of the one before."""
    if not start > eps:
        return []
    count = math.ceil(math.log(start / eps) / math.log(4))
    return [eps * 4.0**k for k in range(count, 0, -1)]


def solve(x: Cloud, y: Cloud, s: Settings) -> Solution:
    """Potentials of entropic transport between two measures.

    Args:
        x: The row measure.
        y: The column measure.
        s: How to solve.
    """
    g = torch.zeros_like(y.half_norm)
    for hot in cooling(s.spread, s.eps):
        g = g + _ascent(x, y, g, sweep_blocks(x, y, g, hot), hot)
    slack = 10 * torch.finfo(x.points.dtype).eps * (s.spread + s.eps)
    sweeper = Sweeper(x, y, s.eps, s.memory)
    mixing = Anderson(y.weight)
    best, best_g, best_step = -math.inf, g, torch.zeros_like(g)
    iterations = 0
    while iterations < s.max_iter:
        iterations += 1
        found = sweeper.sweep(g)
        step = _ascent(x, y, g, found, s.eps)
        sweeper.settle(found.f, g, step)
        dual = float(x.weight @ found.f + y.weight @ g)
        error = float((found.columns - y.weight).abs().sum())
        if error <= s.tol:
            break
        if dual < best - slack:
            mixing.clear()
            g = best_g + best_step
            best = -math.inf
            continue
        best, best_g, best_step = dual, g, step
        g = mixing.next(g, step)
    sweeper.kernel = None
    last = sweep_blocks(x, y, g, s.eps, moments=s.moments)
    error = float((last.columns - y.weight).abs().sum())
    return Solution(last, g, iterations, error, error <= 2 * s.tol)


def solve_self(x: Cloud, s: Settings) -> Solution:
    """The one potential of a measure transported to itself.

    The plain map T has a derivative with eigenvalues in [-1, 0], so f + 2/3 (T f - f) at least divides the
    error by three; the usual average of f and T f only halves it.

    Args:
        x: The measure.
        s: How to solve.
    """
    f = torch.zeros_like(x.half_norm)
    for hot in cooling(s.spread, s.eps):
        f = f + _SELF_STEP * (sweep_blocks(x, x, f, hot, columns=False).f - f)
    sweeper = Sweeper(x, x, s.eps, s.memory)
    error, iterations = math.inf, 0
    while iterations < s.max_iter and error > s.tol:
        iterations += 1
        plain = sweeper.sweep(f, columns=False).f
        sweeper.settle(plain, f, plain - f)
        error = float(x.weight @ ((f - plain) / s.eps).exp().sub(1).abs())
        if error > s.tol:
            f = f + _SELF_STEP * (plain - f)
    sweeper.kernel = None
    last = sweep_blocks(x, x, f, s.eps, moments=s.moments)
    error = float((last.columns - x.weight).abs().sum())
    return Solution(last, f, iterations, error, error <= 2 * s.tol)
