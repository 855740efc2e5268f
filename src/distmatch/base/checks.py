"""Checks of single arguments, each with one message: names, numbers and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from distmatch.base.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor  # options are checked without it, so that --help is fast


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Accepts only a name of a list.

    Args:
        kind: What the name names, for example ``"divergence"``.
        name: What the user wrote.
        known: All valid names.

    Raises:
        UserError: It is another one.
    """
    names = list(known)
    if name not in names:
        raise unknown_name(kind, name, names)


def check_number(what: str, value: Any, interval: str = "(-inf, inf)", *, fix: str | None = None) -> None:
    """Accepts only numbers of an interval; NaN is in none.

    Args:
        what: The name of the number in the message.
        value: The number.
        interval: In the usual notation: ``"(0, 1]"`` for above 0 and at most 1, ``"[0, inf)"`` for finite
            and not negative.
        fix: What to do about another value.

    Raises:
        UserError: It is outside of the interval, or no number.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    try:
        right = low < value < high
        right |= (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
    except TypeError:
        right = False
    if not right:
        words = {"(0, inf)": "be positive", "[0, inf)": "not be negative", "(-inf, inf)": "be finite"}
        raise UserError(f"{what} must {words.get(interval, f'be in {interval}')}", got=value, fix=fix)


def check_count(
    what: str, value: Any, least: int = 1, most: float = math.inf, *, fix: str | None = None
) -> None:
    """Accepts only whole numbers from ``least`` to ``most``, both included.

    Raises:
        UserError: It is another number, or none.
    """
    try:
        right = least <= value <= most and value == int(value)
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        kind = "positive whole number" if least == 1 and most == math.inf else f"whole number {limits}"
        raise UserError(f"{what} must be a {kind}", got=value, fix=fix)


def batch_of(shape: Sequence[int], rows: str = "B") -> str:
    """The shape of a batch of samples in words, for messages: ``(B, 3, 32, 32)``."""
    return f"({', '.join([rows, *map(str, shape)])}{',' if not shape else ''})"


def check_batch(what: str, x: Tensor, shape: Sequence[int], *, fix: str | None = None) -> None:
    """Accepts only a batch of floating-point samples of the given shape.

    Args:
        what: The name of the batch in the message, as a plural.
        x: The batch, right if it is (B, *shape).
        shape: The shape of one sample.
        fix: What to do about another shape.

    Raises:
        UserError: It has another shape, or holds no floating-point numbers.
    """
    if x.ndim == 0 or tuple(x.shape[1:]) != tuple(shape) or not x.is_floating_point():
        raise UserError(
            f"{what} have the wrong shape or dtype",
            got=f"{tuple(x.shape)}, {x.dtype}",
            expected=f"{batch_of(shape)}, floating point",
            fix=fix,
        )


def check_finite(what: str, x: Tensor, *, fix: str = "find out where NaN or infinity comes from") -> None:
    """Accepts only finite values; on the meta device, where there are none, everything.

    Args:
        what: The name of the samples in the message, as a plural.
        x: Values, one sample a row.
        fix: What to do about others.

    Raises:
        UserError: Some are NaN or infinite.
    """
    if x.is_meta or x.numel() == 0:
        return
    least, most = x.aminmax()  # NaN or infinite where any value is, and found ten times as fast as by value
    if bool(least.isfinite() & most.isfinite()):
        return
    bad = int((~x.isfinite()).reshape(len(x), -1).any(1).sum())
    if bad:  # fake tensors, by which memory is predicted, have no values: every answer of theirs is 0
        raise UserError(
            f"{what} are not finite",
            got=f"NaN or infinity in {bad} of {len(x)} samples",
            expected="finite numbers",
            fix=fix,
        )


def check_one_each(what: str, values: Tensor, n: int) -> None:
    """Accepts only one number for each sample.

    Args:
        what: What there must be one of, for example ``"label"``.
        values: The numbers, right if they are (n,).
        n: The number of samples.

    Raises:
        UserError: The shape is another one.
    """
    if tuple(values.shape) != (n,):
        raise UserError(f"there must be one {what} per sample", got=tuple(values.shape), expected=(n,))


def check_equal(what: str, first: Any, second: Any, *, fix: str | None = None) -> None:
    """Accepts only two values that are the same.

    Args:
        what: What must be the same, as a plural: ``"the dimensions of the Gaussians"``.
        first: One value.
        second: The other.
        fix: What to do where they differ.

    Raises:
        UserError: They differ.
    """
    if first != second:
        raise UserError(f"{what} differ", got=f"{first} and {second}", expected="the same", fix=fix)


def check_rising(**levels: float) -> None:
    """Accepts only positive, finite noise levels in strictly ascending order.

    Args:
        levels: The levels by name, the lowest first.

    Raises:
        UserError: They are others.
    """
    ends = [0.0, *levels.values(), math.inf]
    if not all(low < high for low, high in pairwise(ends)):
        raise UserError(
            f"noise levels must satisfy 0 < {' < '.join(levels)}",
            got=", ".join(f"{name}={level}" for name, level in levels.items()),
        )
