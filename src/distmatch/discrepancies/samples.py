"""What every discrepancy asks of its samples, in one place, so that no bad input turns into a silent NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.errors import UserError


def checked(x: Tensor, what: str, least: int = 2) -> Tensor:
    """The samples as a floating (n, d) matrix.

    Args:
        x: Samples along the first axis; one axis means d = 1, more than two are flattened to (n, d).
        what: How the message names them.
        least: The smallest n that makes sense.

    Returns:
        (n, d) in float32 or float64 (half precision is raised to float32), with the graph of ``x``.

    Raises:
        UserError: Not a floating tensor, too few samples, no coordinates, or values that are not finite.
    """
    if not isinstance(x, Tensor):
        raise UserError(
            f"{what} must be a torch tensor", got=type(x).__name__, fix="use torch.from_numpy or torch.tensor"
        )
    if not x.is_floating_point():
        raise UserError(
            f"{what} must be floating",
            got=x.dtype,
            expected="float32 or float64",
            fix=f"pass {what}.float(); labels belong in one-hot columns",
        )
    if x.ndim == 0 or x.shape[0] < least:
        raise UserError(
            f"{what} has too few samples",
            got=f"shape {tuple(x.shape)}",
            expected=f"at least {least} along the first axis",
            fix="pass more samples",
        )
    x = x[:, None] if x.ndim == 1 else x.flatten(1)
    if x.shape[1] == 0:
        raise UserError(
            f"{what} has no coordinates", got=f"shape {tuple(x.shape)}", expected="d of at least 1"
        )
    bad = int((~torch.isfinite(x)).any(1).sum())
    if bad:
        raise UserError(
            f"{what} contains values that are not finite",
            got=f"NaN or infinity in {bad} of {x.shape[0]} samples",
            fix="remove those samples, or find out where they come from",
        )
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def checked_pair(
    x: Tensor, y: Tensor, least: int = 2, names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """Two sets of samples of the same dimension, in their common precision.

    Raises:
        UserError: As :func:`checked`, or the dimensions or the devices differ.
    """
    x, y = checked(x, names[0], least), checked(y, names[1], least)
    same_dimension(x, y, names)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def about_center(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64, less the mean of their means, through which no gradient runs.

    What depends on distances does not change; in float64 the subtraction itself loses nothing of float32.
    """
    x, y = x.double(), y.double()
    center = (x.detach().mean(0) + y.detach().mean(0)) / 2
    return x - center, y - center


def same_dimension(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Refuse two sets of samples that cannot be compared point by point.

    Raises:
        UserError: The dimensions or the devices differ.
    """
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"{names[0]} and {names[1]} differ in dimension",
            got=f"{x.shape[1]} and {y.shape[1]} coordinates",
            fix="compare samples of the same space",
        )
    same_device(x, y, names)


def same_device(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Refuse tensors on different devices.

    Raises:
        UserError: The devices differ.
    """
    if x.device != y.device:
        raise UserError(
            f"{names[0]} and {names[1]} are on different devices",
            got=f"{x.device} and {y.device}",
            fix="move one with .to(device)",
        )


def same_count(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Refuse paired samples of different number.

    Raises:
        UserError: The numbers or the devices differ.
    """
    if x.shape[0] != y.shape[0]:
        raise UserError(
            f"{names[0]} and {names[1]} must be paired",
            got=f"{x.shape[0]} and {y.shape[0]} rows",
            expected="row i of both from the same draw",
        )
    same_device(x, y, names)
