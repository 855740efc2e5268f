"""Heun's method on the probability-flow ODE, the deterministic EDM sampler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import latents
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise import karras_grid


def heun_calls(steps: int) -> int:
    """Network calls that ``steps`` Heun steps need: the last one, to sigma = 0, is a single Euler call."""
    return 2 * steps - 1


@torch.no_grad()
def heun(denoiser: Denoiser, x: Tensor, grid: Tensor, condition: Tensor | None = None) -> Tensor:
    """Integrates dx/dsigma = (x - D(x, sigma)) / sigma down ``grid`` (Karras et al. 2022, alg. 1).

    Args:
        denoiser: The model.
        x: Start at level ``grid[0]``, (B, *shape).
        grid: Strictly decreasing levels; the last may be 0.
        condition: Labels (B,), -1 for none.

    Returns:
        Samples at level ``grid[-1]``, in the dtype of ``x``. The state is kept in float64 between calls.

    Raises:
        UserError: The grid does not decrease or holds fewer than two levels.
    """
    levels = [float(v) for v in grid]
    if len(levels) < 2 or any(b >= a for a, b in pairwise(levels)) or levels[-1] < 0:
        raise UserError("a sampling grid must decrease strictly and stay non-negative", got=levels[:6])
    dtype = x.dtype
    state = x.double()
    ones = torch.ones(len(x), device=x.device, dtype=dtype)
    for now, after in pairwise(levels):
        slope = (state - denoiser(state.to(dtype), ones * now, condition).double()) / now
        ahead = state + (after - now) * slope
        if after > 0:
            slope2 = (ahead - denoiser(ahead.to(dtype), ones * after, condition).double()) / after
            ahead = state + (after - now) * 0.5 * (slope + slope2)
        state = ahead
    return state.to(dtype)


@torch.no_grad()
def sample_teacher(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int = 18,
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 1024,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Draws samples from a teacher with Heun's method on the EDM grid.

    The start noise of sample i depends on the seed and i alone, not on ``batch``.

    Args:
        denoiser: The teacher.
        n: Number of samples.
        steps: Heun steps; ``2 steps - 1`` network calls.
        labels: Optional (n,) int64 classes.
        seed: Seed of the start noise.
        batch: Samples at a time.
        device: Where to compute.
        on_batch: Called with the number of samples after each batch, for a progress bar.

    Returns:
        (n, *shape) float32 on the CPU.
    """
    grid = karras_grid(steps, denoiser.sigma_min, denoiser.sigma_max)
    noise = latents(n, denoiser.shape, seed)
    out = []
    for start in range(0, n, batch):
        z = noise[start : start + batch].to(device)
        y = None if labels is None else labels[start : start + batch].to(device)
        out.append(heun(denoiser, z * grid[0].item(), grid, y).cpu())
        if on_batch is not None:
            on_batch(len(z))
    return torch.cat(out) if out else noise
