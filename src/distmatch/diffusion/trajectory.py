"""Predictions along a sampling trajectory, and when they determine the layout (arXiv 2503.10637).

At each noise level of a solve the denoiser predicts the clean sample. Where that prediction is constant, the
sample is determined: the levels above are those that a student of few calls decides at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import at_step
from distmatch.diffusion.paths import NoisePath
from distmatch.diffusion.solvers import Solver, find_solver, solve
from distmatch.diffusion.solvers.grids import checked_levels
from distmatch.diffusion.solvers.solve import starts

_COARSE = 4  # the layout of an image is its means over at most 4 x 4 tiles


@dataclass(frozen=True)
class Trajectory:
    """The predictions of a model along its own solve.

    Attributes:
        levels: Its positive noise levels, decreasing, (S,) float64.
        x0: The prediction of the clean sample at each level, (S, n, *shape) float32 on the CPU.
        final: The samples that the solve ends with, (n, *shape).
    """

    levels: Tensor
    x0: Tensor
    final: Tensor

    def open_share(self, *, layout: bool = False) -> Tensor:
        """How much of the samples the predictions leave open at each level, (S,) float64.

        It is their mean square distance to the final samples, relative to that of the first prediction, which
        is about the mean of all samples. It is 0 throughout where already the first one is final.

        Args:
            layout: Compare only the coarse image, means over 4 x 4 tiles; vectors are compared as they are.
        """
        look = coarse if layout else torch.Tensor.double
        final = look(self.final)
        to_go = torch.stack([(look(x0) - final).square().mean() for x0 in self.x0])
        return to_go / to_go[0].clamp_min(torch.finfo(to_go.dtype).tiny)

    def decided(self, share: float, *, layout: bool = True) -> float:
        """The noise level below which a share of the samples stays decided; log sigma is interpolated.

        Args:
            share: In (0, 1), for example 0.9.
            layout: Of the coarse image.
        """
        missing = self.open_share(layout=layout)
        above = (missing > 1 - share).nonzero()
        if not len(above):
            return float(self.levels[0])
        last = int(above[-1])
        if last + 1 == len(self.levels):
            return float(self.levels[-1])
        upper, lower = missing[last].item(), missing[last + 1].item()
        part = (upper - (1 - share)) / (upper - lower)
        high, low = self.levels[last].item(), self.levels[last + 1].item()
        return math.exp(math.log(high) + part * math.log(low / high))


def coarse(x: Tensor) -> Tensor:
    """The layout of samples: means over at most 4 x 4 tiles; samples that are no images or video unchanged.

    Args:
        x: Images (B, C, H, W), or video (B, C, T, H, W), frame by frame; or others.

    Returns:
        float64.
    """
    if x.ndim not in (4, 5):
        return x.double()
    height, width = (min(_COARSE, side) for side in x.shape[-2:])
    return F.adaptive_avg_pool2d(x.double().flatten(1, -3), (height, width))


@torch.no_grad()
def x0_trajectory(
    denoiser: Denoiser,
    n: int,
    grid: Tensor | Sequence[float],
    solver: str | Solver = "heun",
    *,
    conditioning: ConditioningLike = None,
    path: NoisePath | str | None = None,
    seed: int = 0,
    batch: int = 1024,
    device: torch.device | str = "cpu",
) -> Trajectory:
    """Samples a model and keeps what it predicts at each level.

    The samples are those that :func:`~distmatch.diffusion.solvers.sample_teacher` draws with the same seed.
    The predictions cost one further call a level, whatever the solver.

    Args:
        denoiser: The model.
        n: Number of samples.
        grid: Decreasing levels; samples are at the last one, usually 0.
        solver: A solver or its name.
        conditioning: Class labels (n,), a conditioning, or None.
        path: As for :func:`~distmatch.diffusion.solvers.solve`.
        seed: Seed of all noise.
        batch: Samples per batch.
        device: Where to compute.

    Returns:
        Predictions at all positive levels, and the samples.

    Raises:
        UserError: What :func:`~distmatch.diffusion.solvers.solve` refuses.
    """
    chosen = find_solver(solver)
    levels = checked_levels(grid, stochastic=True)
    steps = list(itertools.pairwise(levels))
    seen, final = [], []
    for z, c, noise in starts(denoiser, n, conditioning, seed=seed, batch=batch, device=device):
        start_state, drawn = z * levels[0], noise if chosen.stochastic else None
        way = solve(
            denoiser, start_state, levels, chosen, conditioning=c, noise=drawn, path=path, trajectory=True
        )
        states = way.trajectory if way.trajectory is not None else start_state[None]
        x0 = []
        for (high, low), state in zip(steps, states[:-1], strict=True):
            sigma = torch.full((len(z),), high, dtype=z.dtype, device=z.device)
            x0.append(at_step(denoiser, high, low)(state, sigma, c).float().cpu())
        seen.append(torch.stack(x0))
        final.append(way.y.float().cpu())
    return Trajectory(torch.tensor(levels[:-1], dtype=torch.float64), torch.cat(seen, 1), torch.cat(final))
