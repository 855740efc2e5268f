"""The noise levels of discrete-time teachers, as a path whose times are 0, 1, ..., T - 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.paths.core import NoisePath, Time
from distmatch.diffusion.predictions import Coefficients

BETAS = ("linear", "scaled-linear", "cosine")


def betas(
    kind: str = "linear",
    steps: int = 1000,
    *,
    start: float | None = None,
    end: float | None = None,
    k: float = 0.008,
    cap: float = 0.999,
) -> Tensor:
    """The noise rates of a discrete-time teacher; ``(1 - betas).cumprod(0)`` are its alphas_cumprod.

    Args:
        kind: "linear" (Ho et al. 2020, 1e-4 to 0.02 at 1000 steps), "scaled-linear" (linear in the root,
            0.00085 to 0.012, latent diffusion) or "cosine" (Nichol and Dhariwal 2021).
        steps: Number of levels T.
        start: First rate; by default that of the kind. Linear rates of another T than 1000 keep their
            integral: by default they are scaled by 1000 / T.
        end: Last rate; likewise.
        k: Offset of the cosine.
        cap: Largest rate of the cosine, which would reach 1 at the end.

    Returns:
        (T,) float64.

    Raises:
        UserError: An unknown kind, fewer than two steps, or rates outside (0, 1).
    """
    check_name("kind of noise rates", kind, BETAS)
    check_count("the number of noise levels", steps, 2)
    if kind == "cosine":
        if start is not None or end is not None:
            raise UserError("cosine rates take an offset k and a cap, not a start and an end")
        angle = math.pi / 2 / (1 + k) * (torch.arange(steps + 1, dtype=torch.float64) / steps + k)
        signal = angle.cos() ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=cap)
    usual = (1e-4, 0.02) if kind == "linear" else (0.00085, 0.012)
    scale = 1000 / steps
    low, high = usual[0] * scale if start is None else start, usual[1] * scale if end is None else end
    if not 0 < low <= high < 1:
        raise UserError(
            "noise rates must lie in (0, 1) and not decrease",
            got=f"start={low:g}, end={high:g} for {steps} steps",
            fix="give start and end, or more steps",
        )
    if kind == "linear":
        return torch.linspace(low, high, steps, dtype=torch.float64)
    return torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class DiscretePath(NoisePath):
    """The path of a discrete-time teacher.

    Attributes:
        levels: Noise-to-signal ratio at each time 0, 1, ..., T - 1, rising, (T,) float64.
    """

    levels: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)

    def nearest(self, rho: Time) -> tuple[Tensor, Tensor]:
        """The time, int64, and noise-to-signal ratio of the level nearest to ``rho``, in the logarithm."""
        t = self.t_of_rho(rho).clamp(0, len(self.levels) - 1)
        index = t.round().long()
        return index, self.rho(index)


def discrete_path(alphas_cumprod: Tensor | Sequence[float], *, name: str = "discrete") -> DiscretePath:
    """The path through a teacher's own levels; between them, log rho is linear in the time.

    alpha^2 + sigma^2 = 1 everywhere. Beyond its ends the path continues with its last slope.

    Args:
        alphas_cumprod: Squared alpha at each time, falling, in (0, 1), (T,); float64 keeps small noise exact.
        name: A name for messages.

    Raises:
        UserError: Not a falling sequence in (0, 1); in particular a last value of 0, pure noise, cannot be
            the level of an eps prediction and has no place on a log scale.
    """
    squares = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
    if squares.ndim != 1 or len(squares) < 2:
        raise UserError("alphas_cumprod must be a vector of at least two numbers", got=tuple(squares.shape))
    if not bool((squares.diff() < 0).all() and (squares > 0).all() and (squares < 1).all()):
        raise UserError(
            "alphas_cumprod must decrease strictly and lie between 0 and 1",
            got=f"{float(squares[0]):.6g}, {float(squares[1]):.6g}, ..., {float(squares[-1]):.6g}",
            fix="it is (1 - betas).cumprod(0); remove a last noise level of pure noise",
        )
    log_rho = 0.5 * (torch.log1p(-squares) - squares.log())
    tables = {log_rho.device: log_rho}
    options = {"alphas_cumprod": tuple(squares.tolist())}
    curve, inverse = partial(_curve, tables), partial(_inverse, tables)
    return DiscretePath(name, 0.0, len(squares) - 1.0, curve, inverse, options, log_rho.exp())


def _on(tables: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    """The table on ``device``, copied there once."""
    if device not in tables:
        tables[device] = next(iter(tables.values())).to(device)
    return tables[device]


def _curve(tables: dict[torch.device, Tensor], t: Tensor) -> Coefficients:
    knots = _on(tables, t.device)
    cell = t.floor().clamp(0, len(knots) - 2).long()
    slope = knots.diff()[cell]
    rho = (knots[cell] + slope * (t - cell)).exp()
    alpha = (1 + rho**2).rsqrt()
    sigma = rho * alpha
    return Coefficients(alpha, sigma, -alpha * sigma**2 * slope, sigma * alpha**2 * slope)


def _inverse(tables: dict[torch.device, Tensor], rho: Tensor) -> Tensor:
    knots = _on(tables, rho.device)
    target = rho.log()
    cell = (torch.bucketize(target, knots, right=True) - 1).clamp(0, len(knots) - 2)
    return cell + (target - knots[cell]) / knots.diff()[cell]
