"""From one distribution to another along a stochastic interpolant: an ODE, or SDEs in either direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.interpolants import Field, Interpolant
from distmatch.diffusion.noise_streams import SampleNoise

Diffusion = float | Callable[[Tensor], Tensor]


def transport(
    velocity: Field,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: Interpolant | None = None,
    noise: Field | None = None,
    diffusion: Diffusion = 0.0,
    draws: SampleNoise | None = None,
) -> Tensor:
    """Transports samples from the first time to the last; rising times go to x1, falling ones to x0.

    Without diffusion the ODE ``x' = v`` by Heun's method. With a diffusion e >= 0 the SDE of the direction,
    by Euler's method: ``dX = (v + e s) dt + sqrt(2 e) dW`` forwards and, with time running back,
    ``dX = (v - e s) dt + sqrt(2 e) dW``, s = -eta / gamma. All have the distribution of x_t at every time.

    Args:
        velocity: ``velocity(x, t)`` for x (B, *shape) and t (B,).
        x: Samples of the distribution at the first time, (B, *shape).
        times: Rising or falling, in [0, 1]; inside (0, 1) for an SDE whose diffusion does not vanish at the
            ends as gamma does, because the score does not exist there.
        interpolant: Which gives gamma; needed for an SDE.
        noise: eta(x, t); needed for an SDE.
        diffusion: e, a number or a function of times (B,).
        draws: The random numbers of each sample; needed for an SDE.

    Returns:
        (B, *shape) at the last time.

    Raises:
        UserError: Times out of order, or an SDE without what it needs.
    """
    grid = torch.as_tensor(times, dtype=torch.float64).cpu()
    steps = grid.diff()
    if grid.ndim != 1 or len(grid) < 2 or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise UserError("times must be strictly increasing or decreasing", got=grid.tolist()[:8])
    if float(grid.min()) < 0 or float(grid.max()) > 1:
        raise UserError("times lie between 0 and 1", got=f"{float(grid.min())} to {float(grid.max())}")
    ode = not callable(diffusion) and diffusion == 0
    if not ode:
        if interpolant is None or noise is None or draws is None:
            raise UserError(
                "an SDE needs the interpolant, its learned noise and random numbers",
                fix="pass interpolant=, noise= and draws=SampleNoise(seed, indices, shape, device), "
                "or leave diffusion at 0",
            )
        check_number("a diffusion", 0 if callable(diffusion) else diffusion, "[0, inf)")
    for k, (now, step) in enumerate(zip(grid[:-1].tolist(), steps.tolist(), strict=True)):
        t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
        v = velocity(x, t)
        if ode:
            after = torch.full_like(t, now + step)
            x = x + step / 2 * (v + velocity(x + step * v, after))
            continue
        x = _euler(x, v, t, step, interpolant, noise, diffusion, draws.normal(k))  # type: ignore[union-attr,arg-type]
    return x


def _euler(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    step: float,
    interpolant: Interpolant,
    noise: Field,
    diffusion: Diffusion,
    normal: Tensor,
) -> Tensor:
    """One step of the SDE in the direction of ``step``."""
    e = diffusion(t) if callable(diffusion) else torch.full_like(t, diffusion)
    gamma = interpolant.at(t).gamma
    # e / gamma, and 0 where the diffusion is switched off: a score that does not exist is not evaluated.
    pull = torch.where(e > 0, e / gamma.clamp_min(torch.finfo(t.dtype).tiny), 0.0)
    shape = (-1, *([1] * (x.ndim - 1)))
    drift = abs(step) * pull.reshape(shape) * noise(x, t)
    return x + step * v - drift + (2 * e * abs(step)).sqrt().reshape(shape) * normal.to(x.dtype)
