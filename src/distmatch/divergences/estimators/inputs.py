"""What the estimators accept: samples and log-densities without holes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import UserError


def check_samples(x_p: Tensor, x_q: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Samples of p and of q as matrices (n, d) and (m, d) of one float dtype, detached.

    Args:
        x_p: Samples of p, (n,) or (n, *shape).
        x_q: Samples of q, (m,) or (m, *shape).
        least: The smallest number of samples accepted.

    Raises:
        UserError: They are no float tensors, empty, too few, not finite, of different shapes or devices, or
            all equal (a distribution on one point has no density).
    """
    checked = []
    for name, x in (("p", x_p), ("q", x_q)):
        _check_float(f"the samples of {name}", x)
        if x.ndim == 0 or len(x) < least:
            raise UserError(
                f"too few samples of {name}",
                got=0 if x.ndim == 0 else len(x),
                expected=f"at least {least}, one a row",
            )
        flat = x.detach().reshape(len(x), -1)
        if flat.shape[1] == 0:
            raise UserError(f"the samples of {name} have no columns", got=tuple(x.shape))
        _check_finite(f"the samples of {name}", flat)
        if bool((flat == flat[0]).all()):
            raise UserError(
                f"the samples of {name} are all equal",
                got=f"{len(x)} copies of one point",
                expected="samples of a distribution with a density",
                fix="check how they were computed; a point mass has an infinite divergence or none",
            )
        checked.append(flat)
    first, second = checked
    if x_p.shape[1:] != x_q.shape[1:]:
        raise UserError(
            "the samples of p and q have different shapes",
            got=f"{tuple(x_p.shape[1:])} and {tuple(x_q.shape[1:])} per sample",
            expected="the same shape",
        )
    if first.device != second.device:
        raise UserError("the samples are on different devices", got=f"{first.device} and {second.device}")
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


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
        _check_float(what, log_density)
        if log_density.ndim != 1 or len(log_density) < 2:
            raise UserError(
                f"{what} must have one value per sample",
                got=f"shape {tuple(log_density.shape)}",
                expected="shape (n,) with n >= 2",
                fix="sum the log-density over the dimensions of a sample",
            )
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
        _check_float(what, values)
        if values.ndim != 1 or len(values) < 2:
            raise UserError(
                f"{what} must have one value per sample",
                got=f"shape {tuple(values.shape)}",
                expected="shape (n,) with n >= 2",
                fix="flatten it with .squeeze(1)",
            )
        _check_finite(what, values)
    return values_p.detach().double(), values_q.detach().double()


def _check_float(what: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise UserError(
            f"{what} must be a tensor", got=type(x).__name__, fix="wrap it in torch.as_tensor(...)"
        )
    if not x.is_floating_point():
        raise UserError(
            f"{what} must be floating-point numbers",
            got=str(x.dtype),
            expected="float32 or float64",
            fix="convert with .float(), or use a divergence between histograms for counts",
        )


def _check_finite(what: str, x: Tensor) -> None:
    bad = ~x.isfinite()
    if bool(bad.any()):
        raise UserError(
            f"{what} are not finite" if what.startswith("the samples") else f"{what} is not finite",
            got=f"{float(x[bad][0])} in {int(bad.sum())} of {x.numel()} numbers",
            expected="finite numbers",
            fix="find out where NaN or inf comes from; removing such samples changes the distribution",
        )
