"""Running a solver: from noise to samples, part of the way, or back from samples to noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.base.checks import check_batch, check_count, check_finite
from distmatch.base.errors import UserError
from distmatch.base.seeds import initial_noise
from distmatch.diffusion.conditioning import Conditioning, ConditioningLike, conditioning_for
from distmatch.diffusion.denoiser import Denoiser, levels_like, require_score
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import NoisePath, noise_path
from distmatch.diffusion.pfgm import start_noise
from distmatch.diffusion.solvers.grids import checked_levels, default_grid
from distmatch.diffusion.solvers.names import find_solver
from distmatch.diffusion.solvers.run import Run, Solver
from distmatch.diffusion.wrapper import CallCounter, at_step, regime_of


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    Attributes:
        y: State at the last level, (B, *shape), in the dtype of the start; the sample where that is 0.
        calls: Network calls for each sample, counted; a guided call counts as two.
        trajectory: (levels, B, *shape), the states at all noise levels, if requested.
    """

    y: Tensor
    calls: int
    trajectory: Tensor | None = None


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    y: Tensor,
    grid: Tensor | Sequence[float],
    solver: str | Solver = "heun",
    *,
    conditioning: ConditioningLike = None,
    noise: SampleNoise | None = None,
    path: NoisePath | str | None = None,
    trajectory: bool = False,
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Solution:
    """Takes ``y = x0 + sigma eps`` from level ``grid[0]`` to level ``grid[-1]``.

    The state is kept in float64 between calls (float32 on devices without it); the model is called in the
    dtype of ``y``. Memory does not grow with the number of steps unless ``trajectory`` is set.

    Args:
        denoiser: The model.
        y: State at level ``grid[0]``, (B, *shape), in this frame: x_t / alpha_t for a state x_t on a path.
        grid: Levels, strictly decreasing (the last may be 0), or strictly increasing to go from samples to
            noise, which deterministic solvers can.
        solver: A solver, or its name with options after colons, see :func:`find_solver`.
        conditioning: Class labels (B,), a conditioning, or None.
        noise: The noise of stochastic solvers.
        path: A path or its name, for solvers that work in a path's time; without it the denoiser's own
            ``path``, if it has one.
        trajectory: Keep the states at all levels.
        on_step: Called after each step with its number and the state in the dtype of the work; a tensor that
            it returns replaces the state.

    Returns:
        The state at the last level and what it cost.

    Raises:
        UserError: Grid, solver, noise and model do not go together; the message says why.
    """
    chosen = find_solver(solver)
    levels = checked_levels(grid, stochastic=chosen.stochastic)
    _check(denoiser, y, chosen, solver, levels, noise)
    conditioning = conditioning_for(denoiser, conditioning, len(y))
    counter = denoiser if isinstance(denoiser, CallCounter) else CallCounter(denoiser)
    calls_before = counter.calls
    work = torch.float32 if y.device.type == "mps" else torch.float64

    model: Denoiser = counter

    def begin(k: int) -> None:
        nonlocal model
        model = at_step(counter, levels[k], levels[k + 1])

    def denoise(state: Tensor, level: float) -> Tensor:
        return model(state.to(y.dtype), levels_like(y, level, y.dtype), conditioning).to(work)

    def normal(step: int, draw: int) -> Tensor:
        if noise is None:
            raise UserError("a deterministic solver requested noise", fix="set `stochastic` in your solver")
        return noise.normal(step, draw).to(work)

    states = [y] if trajectory else []

    def visit(k: int, state: Tensor) -> Tensor:
        replaced = None if on_step is None else on_step(k, state)
        state = state if replaced is None else replaced
        if trajectory:
            states.append(state.to(y.dtype))
        return state

    own_path = getattr(denoiser, "path", None) if path is None else path
    run = Run(
        levels,
        denoise,
        normal,
        path=None if own_path is None else noise_path(own_path),
        sigma_min=denoiser.sigma_min,
        sigma_data=denoiser.sigma_data,
        watched=trajectory or on_step is not None,
        begin=begin,
        restarts=_restarts(counter, levels, conditioning),
    )
    end = chosen.integrate(run, y.to(work), visit).to(y.dtype)
    return Solution(end, counter.calls - calls_before, torch.stack(states) if trajectory else None)


def _restarts(denoiser: Denoiser, levels: tuple[float, ...], conditioning: Conditioning) -> frozenset[int]:
    """The steps from which on a guided model guides that did not before, or no longer does."""
    regimes = [regime_of(at_step(denoiser, *step), conditioning) for step in pairwise(levels)]
    return frozenset(k for k in range(1, len(regimes)) if regimes[k] != regimes[k - 1])


def check_start(y: Tensor, shape: Sequence[int]) -> None:
    """Refuses a start of another shape, and one that holds NaN or infinity, which no solver would get rid of.

    It waits for the device. Tensors on the meta device have no values, and pass.

    Raises:
        UserError: With the shapes, or with how many samples are not finite.
    """
    check_batch("the samples at the start of a solve", y, shape)
    check_finite("the samples at the start of a solve", y, fix="draw them as grid[0] * torch.randn(...)")


def _check(
    denoiser: Denoiser,
    y: Tensor,
    chosen: Solver,
    asked: str | Solver,
    levels: tuple[float, ...],
    noise: SampleNoise | None,
) -> None:
    """Refuses what does not go together."""
    check_start(y, denoiser.shape)
    if len(levels) - 1 < chosen.least_steps:
        raise UserError(
            f"the solver {asked} needs at least {chosen.least_steps} steps",
            got=f"{len(levels) - 1}: with fewer it does not reach its order",
            fix='use a longer grid, or "ddim" or "heun", which need one step',
        )
    if not chosen.stochastic:
        return
    require_score(denoiser, f"the solver {asked}, which adds Gaussian noise,")
    if noise is None:
        raise UserError(
            f"the solver {asked} draws noise and received none",
            fix="pass noise=SampleNoise(seed, torch.arange(len(y)), denoiser.shape, y.device)",
        )
    noise.check(y)


def starts(
    denoiser: Denoiser,
    n: int,
    conditioning: ConditioningLike,
    *,
    seed: int,
    batch: int,
    device: torch.device | str,
    first: int = 0,
) -> Iterator[tuple[Tensor, Conditioning, SampleNoise]]:
    """What ``n`` samples start from, batch by batch: unit noise, their conditioning, their further noise.

    Those of sample i depend only on the seed and i, not on ``batch``; the first one is number ``first``.

    Raises:
        UserError: A negative number of samples, an empty batch, or a conditioning that is not theirs.
    """
    check_count("n", n, 0)
    check_count("batch", batch)
    whole = conditioning_for(denoiser, conditioning, n)
    latent = start_noise(denoiser, initial_noise(n, denoiser.shape, seed, first=first), seed, first=first)
    for begin in range(0, n, batch):
        z = latent[begin : begin + batch].to(device)
        numbers = first + torch.arange(begin, begin + len(z))
        noise = SampleNoise(seed, numbers, tuple(denoiser.shape), device)
        yield z, whole.index(slice(begin, begin + batch)).to(device), noise


def sample_teacher(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int = 18,
    solver: str | Solver = "heun",
    grid: Tensor | Sequence[float] | None = None,
    path: NoisePath | str | None = None,
    conditioning: ConditioningLike = None,
    seed: int = 0,
    batch: int = 1024,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    first: int = 0,
) -> Tensor:
    """Draws samples from a teacher, by default with Heun's method on its own grid, EDM's for most.

    The initial noise and later noise of sample i depend only on the seed and i, not on ``batch``.

    Args:
        denoiser: The teacher.
        n: Number of samples.
        steps: Steps of the default grid; 18 Heun steps are 35 network calls.
        solver: A solver or its name.
        grid: Decreasing levels in place of the default ones.
        path: As for :func:`solve`.
        conditioning: Class labels (n,), a conditioning, or None.
        seed: Seed of all noise.
        batch: Samples per batch.
        device: Where to compute.
        on_batch: Called with the number of samples after each batch, for a progress bar.
        first: Number of the first sample: a part of a larger set is drawn alone.

    Returns:
        (n, *shape) float32 on the CPU.

    Raises:
        UserError: A negative number of samples, an empty batch, or what :func:`solve` refuses.
    """
    chosen = find_solver(solver)
    levels = default_grid(denoiser, steps) if grid is None else grid
    top = checked_levels(levels, stochastic=True)[0]
    out = [torch.zeros(0, *denoiser.shape)]
    begins = starts(denoiser, n, conditioning, seed=seed, batch=batch, device=device, first=first)
    for z, part, noise in begins:
        drawn = noise if chosen.stochastic else None
        out.append(
            solve(denoiser, z * top, levels, chosen, conditioning=part, noise=drawn, path=path).y.cpu()
        )
        if on_batch is not None:
            on_batch(len(z))
    return torch.cat(out)
