"""Steps that are even in the time of a path, and the shift of flows, as samplers of pipelines take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.paths.discrete import DiscretePath


def shifted(u: Tensor, shift: float) -> Tensor:
    """T = s u / (1 + (s - 1) u): the times of a flow whose noise-to-signal ratios are s times as large.

    Esser et al. 2024, "Scaling rectified flow transformers", eq. 23; it is the ``shift`` of pipelines.
    """
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


def unshifted(t: Tensor, shift: float) -> Tensor:
    """The inverse of :func:`shifted`."""
    return t if shift == 1 else t / (shift - (shift - 1) * t)


def check_shift(path: NoisePath, shift: float) -> None:
    """Refuses a shift that is not positive, or of a path whose times do not lie between 0 and 1.

    Raises:
        UserError: With what was given.
    """
    check_number("the shift of a flow's times", shift, "(0, inf)")
    if shift != 1 and not 0 <= path.t_min < path.t_max <= 1:
        raise UserError(
            "a shift of times needs a path whose times lie between 0 and 1",
            got=f"shift={shift:g} and the {path.name} path, from {path.t_min:g} to {path.t_max:g}",
            fix="use shift=1",
        )


def even_sigmas(denoiser: Any, steps: int, start: float | None = None) -> tuple[float, ...]:
    """Decreasing noise levels, one for each step, as the sampler of a denoiser with a ``shift`` spaces them.

    From ``sigma_max``, a flow with the shift s has the times s u / (1 + (s - 1) u) at u = 1 - i / steps, the
    first of them being the end of its path. A network of T discrete times has T u - 1, rounded: 999, 749,
    499, 249 for four steps of 1000. From a lower start u falls from its value there to 0 in the same way.

    Args:
        denoiser: It has ``path``, ``shift``, ``sigma_min`` and ``sigma_max``.
        steps: Number of levels.
        start: The first level; by default ``sigma_max``.

    Raises:
        UserError: More steps than there are noise levels.
    """
    path: NoisePath = denoiser.path
    first = denoiser.sigma_max if start is None else start
    discrete = path.t_max + 1 if isinstance(path, DiscretePath) else 0.0
    with no_dispatch():  # numbers, even where tensors are fake, as in the prediction of memory
        t = path.t_of_rho(first)
        begin = (t + 1) / discrete if discrete else unshifted(t, denoiser.shift)
        begin = torch.ones_like(begin) if first >= denoiser.sigma_max * (1 - 1e-6) else begin
        u = begin * (1 - torch.arange(1, steps, dtype=torch.float64) / steps)
        times = (discrete * u).round() - 1 if discrete else shifted(u, denoiser.shift)
        levels = (first, *path.rho(times).tolist())
    if not all(a > b > 0 for a, b in zip(levels, (*levels[1:], denoiser.sigma_min / 2), strict=True)):
        raise UserError(
            "these steps do not fit between the noise levels of the teacher",
            got=f"{steps} steps from {first:.4g} to {denoiser.sigma_min:.4g}",
            fix="take fewer steps",
        )
    return levels
