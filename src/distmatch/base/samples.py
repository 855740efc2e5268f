"""Samples as matrices, checked in one place, so that no bad input becomes a silent NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.checks import check_finite
from distmatch.base.errors import UserError


def checked(x: Tensor, what: str, least: int = 2, *, vary: bool = False) -> Tensor:
    """The samples as a floating (n, d) matrix.

    Args:
        x: Samples along the first axis; one axis means d = 1, more than two are flattened to (n, d).
        what: How the message names them.
        least: The smallest n that makes sense.
        vary: Whether to refuse copies of one point, which have no density.

    Returns:
        (n, d) in float32 or float64 (half precision is raised to float32), with the graph of ``x``.

    Raises:
        UserError: Not a floating tensor, too few samples, no coordinates, or values that are not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(
            f"the samples of {what} must be a floating-point tensor",
            got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
            expected="float32 or float64, one sample a row",
            fix="convert with torch.as_tensor(x).float(); labels belong in one-hot columns",
        )
    if x.ndim == 0 or len(x) < least:
        raise UserError(
            f"too few samples of {what}",
            got=len(x) if x.ndim else "a single number",
            expected=f"at least {least}, one a row",
            fix="pass more samples",
        )
    flat = x[:, None] if x.ndim == 1 else x.flatten(1)
    if flat.shape[1] == 0:
        raise UserError(f"the samples of {what} have no coordinates", got=f"shape {tuple(x.shape)}")
    check_finite(f"the samples of {what}", flat)
    if vary and bool((flat == flat[:1]).all()):
        raise UserError(
            f"the samples of {what} are all equal",
            got=f"{len(x)} copies of one point",
            expected="samples of a distribution with a density",
            fix="check how they were computed; a point mass has an infinite divergence or none",
        )
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def checked_pair(
    x: Tensor,
    y: Tensor,
    least: int = 2,
    names: tuple[str, str] = ("x", "y"),
    *,
    vary: bool = False,
    paired: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two sets of samples of the same shape, in their common precision.

    Args:
        x: Samples, (n,) or (n, *shape).
        y: Samples, (m,) or (m, *shape).
        least: The smallest number of either.
        names: How the messages name them.
        vary: Whether to refuse copies of one point.
        paired: Whether row i of both must belong together, so that n is m.

    Raises:
        UserError: As :func:`checked`, or the shapes, the devices or, of pairs, the numbers differ.
    """
    first, second = checked(x, names[0], least, vary=vary), checked(y, names[1], least, vary=vary)
    if (x.shape[1:] or (1,)) != (y.shape[1:] or (1,)):
        raise UserError(
            f"{names[0]} and {names[1]} have samples of different shapes",
            got=f"{tuple(x.shape[1:])} and {tuple(y.shape[1:])}",
            expected="the same dimensions",
            fix="compare samples of the same space",
        )
    if paired:
        same_count(first, second, names)
    same_device(first, second, names)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def about_center(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64, less the mean of their means, through which no gradient runs.

    What depends on distances does not change; in float64 the subtraction itself loses nothing of float32.
    """
    x, y = x.double(), y.double()
    center = (x.detach().mean(0) + y.detach().mean(0)) / 2
    return x - center, y - center


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
    if len(x) != len(y):
        raise UserError(
            f"{names[0]} and {names[1]} must be paired",
            got=f"{len(x)} and {len(y)} rows",
            expected="row i of both from the same draw",
        )
    same_device(x, y, names)
