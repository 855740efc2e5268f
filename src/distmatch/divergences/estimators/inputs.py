"""What the estimators accept: log-densities without holes, and values of a critic."""

from __future__ import annotations

import math

from torch import Tensor

from distmatch.base.checks import check_finite
from distmatch.base.errors import UserError


def check_log_densities(log_p: Tensor, log_q: Tensor, where: str = "q") -> Tensor:
    """``log p - log q`` in float64 at samples of ``where``, detached; -inf or +inf where one density is zero.

    Args:
        log_p: log p at each sample, (n,); -inf where p is zero.
        log_q: log q at each sample, (n,).
        where: ``"q"`` or ``"p"``: the distribution the samples are from, whose density cannot vanish there.

    Raises:
        UserError: They are no float tensors, empty, a single one, of different shapes, NaN or +inf, or a
            density vanishes at its own samples.
    """
    for name, log_density in (("p", log_p), ("q", log_q)):
        what = f"log {name}"
        _check_values(what, log_density, "sum the log-density over the dimensions of a sample")
        holes = log_density.isnan() | (log_density == math.inf)
        if name == where:
            holes |= log_density == -math.inf
        if bool(holes.any()):
            raise UserError(
                f"{what} is not a log-density at samples of {where}",
                got=f"{float(log_density[holes][0])} at {int(holes.sum())} of {len(log_density)} samples",
                expected=f"finite values{'' if name == where else ', or -inf where the density is zero'}",
                fix=f"evaluate both at samples drawn from {where}",
            )
    if log_p.shape != log_q.shape:
        raise UserError(
            "log p and log q differ in length",
            got=f"{len(log_p)} and {len(log_q)}",
            expected=f"both at the same samples of {where}",
        )
    return log_p.detach().double() - log_q.detach().double()


def check_critic(values_p: Tensor, values_q: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a critic at samples of p, (n,), and of q, (m,), in float64, detached.

    Raises:
        UserError: They are no float tensors, fewer than two, or not finite.
    """
    for name, values in (("p", values_p), ("q", values_q)):
        what = f"the critic at samples of {name}"
        _check_values(what, values, "flatten it with .squeeze(1)")
        check_finite(f"the values of {what}", values)
    return values_p.detach().double(), values_q.detach().double()


def _check_values(what: str, x: Tensor, flatten: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(
            f"{what} must be a floating-point tensor",
            got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
            fix="convert with torch.as_tensor(...).double(); for counts use a divergence between histograms",
        )
    if x.ndim != 1 or len(x) < 2:
        raise UserError(
            f"{what} must have one value per sample",
            got=f"shape {tuple(x.shape)}",
            expected="shape (n,) with n >= 2",
            fix=flatten,
        )
