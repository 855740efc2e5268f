"""Grids of noise levels, and what makes a grid one that a solver can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from distmatch.base.checks import check_count, check_name, check_number, check_rising
from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise import karras_grid
from distmatch.diffusion.paths import NoisePath, noise_path
from distmatch.diffusion.paths.discrete import DiscretePath
from distmatch.diffusion.paths.steps import even_sigmas

GRIDS = ("karras", "log", "uniform", "power", "log-snr", "time")


def grid(
    kind: str,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    path: NoisePath | str | None = None,
    to_zero: bool = True,
    rho: float = 7.0,
    kappa: float = 2.0,
) -> Tensor:
    """Decreasing noise levels for ``steps`` steps.

    Args:
        kind: The spacing of the noise levels. ``"karras"``: sigma^(1/rho) even (EDM eq. 5). ``"log"``: log
            sigma even. ``"uniform"``: sigma even. On a path with time t: ``"time"``: t even; ``"power"``:
            t^(1/kappa) even (DEIS); ``"log-snr"``: log(alpha^2 / sigma^2) even, which is ``"log"`` on every
            path, since sigma here is the ratio of noise to signal.
        steps: Number of steps.
        sigma_min: Smallest positive level.
        sigma_max: First level.
        path: The path whose time ``"time"`` and ``"power"`` need, or its name.
        to_zero: End with a step from ``sigma_min`` to 0, which is then one of the ``steps``; otherwise the
            last level is ``sigma_min``.
        rho: Curvature of ``"karras"``.
        kappa: Power of ``"power"``; 1 is ``"time"``.

    Returns:
        (steps + 1,) float64 on the CPU.

    Raises:
        UserError: Fewer than one step, levels out of order, an unknown kind, no path where one is needed.
    """
    check_name("grid", kind, GRIDS)
    count = steps if to_zero else steps + 1
    check_count("the number of steps of a sampling grid", steps, fix="use --steps 1 or more")
    check_rising(sigma_min=sigma_min, sigma_max=sigma_max)
    check_number("rho, the curvature of a grid,", rho, "(0, inf)")
    u = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    if kind == "karras":
        levels = karras_grid(count, sigma_min, sigma_max, rho)[:-1]
    elif kind in ("log", "log-snr"):
        levels = torch.exp(math.log(sigma_max) + u * math.log(sigma_min / sigma_max))
    elif kind == "uniform":
        levels = sigma_max + u * (sigma_min - sigma_max)
    else:
        levels = _even_in_time(kind, u, sigma_min, sigma_max, path, kappa)
    # Through powers and back the ends are off by rounding; they are what the user gave.
    levels[0] = sigma_max
    if count > 1:
        levels[-1] = sigma_min
    return torch.cat([levels, torch.zeros(int(to_zero), dtype=torch.float64)])


def default_grid(denoiser: Denoiser, steps: int) -> Tensor:
    """The grid of a denoiser's own sampler: even in shifted time where it has a ``shift``, else EDM's.

    Args:
        denoiser: The denoiser.
        steps: Number of steps.

    Returns:
        (steps + 1,) float64, from ``sigma_max`` to 0.
    """
    if getattr(denoiser, "shift", None) is None:
        return grid("karras", steps, denoiser.sigma_min, denoiser.sigma_max)
    return torch.tensor([*even_sigmas(denoiser, steps), 0.0], dtype=torch.float64)


def _even_in_time(
    kind: str, u: Tensor, low: float, high: float, path: NoisePath | str | None, kappa: float
) -> Tensor:
    if path is None:
        raise UserError(f"the grid {kind!r} needs the time of a path", got="no path", fix='pass path="vp"')
    check_number("kappa, the power of a grid,", kappa, "(0, inf)")
    p = noise_path(path)
    power = 1 / kappa if kind == "power" else 1.0
    start, end = p.t_of_rho(torch.tensor([high, low], dtype=torch.float64)) ** power
    return p.rho((start + u * (end - start)) ** (1 / power))


def snap_grid(levels: Tensor, path: NoisePath) -> Tensor:
    """Rounds noise levels to those of a discrete-time teacher, and removes duplicates.

    Args:
        levels: A grid; a last level of 0 stays.
        path: A discrete path.

    Returns:
        float64, at most as long as ``levels``.

    Raises:
        UserError: The path has no discrete noise levels, or fewer than two remain.
    """
    if not isinstance(path, DiscretePath):
        raise UserError(
            "only a discrete path has noise levels to snap to",
            got=path.name,
            fix="use discrete_path(alphas_cumprod)",
        )
    index, _ = path.nearest(levels[levels > 0].double())
    snapped = path.levels[torch.unique_consecutive(index)]
    out = torch.cat([snapped, levels[levels <= 0].double()])
    if len(out) < 2:
        raise UserError(
            "all noise levels snap to the same one", got=levels.tolist()[:6], fix="use fewer steps"
        )
    return out


def checked_levels(levels: Tensor | Sequence[float], *, stochastic: bool) -> tuple[float, ...]:
    """The levels of a grid as numbers, once they are known to be usable.

    Args:
        levels: Strictly decreasing, the last may be 0; or strictly increasing from above 0 (inversion).
        stochastic: Whether the solver draws noise; then the grid must decrease.

    Raises:
        UserError: With what is wrong with the grid and the way out.
    """
    with no_dispatch():  # numbers, even where tensors are fake
        values = torch.as_tensor(levels, dtype=torch.float64)
        numbers: tuple[float, ...] = tuple(values.flatten().tolist())
    if values.ndim != 1 or len(values) < 2:
        raise UserError(
            "a sampling grid needs at least two consecutive noise levels",
            got=f"shape {tuple(values.shape)}",
            expected="for example [80, 5, 0.5, 0]",
            fix='use grid("karras", steps, sigma_min, sigma_max)',
        )
    if not all(math.isfinite(v) for v in numbers):
        raise UserError("a sampling grid contains a noise level that is not finite", got=numbers[:6])
    if any(a == b for a, b in pairwise(numbers)):
        raise UserError(
            "a sampling grid repeats a noise level, and a step of length zero is not possible",
            got=next(a for a, b in pairwise(numbers) if a == b),
            fix="remove the repeated noise level; snap_grid does so for discrete-time teachers",
        )
    down, up = all(b < a for a, b in pairwise(numbers)), all(b > a for a, b in pairwise(numbers))
    if min(numbers) < 0 or not (down or up):
        raise UserError(
            "a sampling grid must decrease strictly and stay non-negative, or increase strictly to invert",
            got=list(numbers[:6]),
        )
    if up and stochastic:
        raise UserError(
            "a solver that draws noise cannot go from data to noise",
            got=f"an increasing grid, {numbers[0]:g} to {numbers[-1]:g}",
            expected="a decreasing grid",
            fix='invert with "heun" or another deterministic solver; to noise a sample, add sigma eps',
        )
    if up and numbers[0] == 0:
        raise UserError(
            "an inversion cannot start at sigma 0, where the slope (y - D) / sigma is undefined",
            got=0.0,
            fix="start at the sigma_min of the teacher",
        )
    return numbers
