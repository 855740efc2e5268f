"""Two samples made ready for a ratio: checked, flattened, standardized and split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError

LogRatio = Callable[[Tensor], Tensor]
"""log r of points: (N, d) float64 to (N,) float64."""

LOG_LIMIT = 80.0
"""Fitted log-ratios are held within this, so that neither r nor 1/r overflows float32."""

SMALLEST = 10
"""Fewer samples than this on either side cannot be split into a fit and a test."""

CHUNK = 4096
"""Points that are evaluated together, so that memory does not grow with their number."""

_HIGH = 8  # dimensions


@dataclass(frozen=True)
class Fitted:
    """The result of a method.

    Attributes:
        log_r: The fitted log-ratio of standardized points; the relative one where ``relative`` is not 0.
        chosen: The hyperparameters that were chosen or given, and diagnostics.
        warnings: What may be wrong with it.
        relative: The share a of the relative ratio p / (a p + (1 - a) q) that was fitted.
    """

    log_r: LogRatio
    chosen: dict[str, float | int | str]
    warnings: tuple[str, ...] = ()
    relative: float = 0.0


@dataclass(frozen=True)
class Standardizer:
    """Flattens samples and gives every column zero mean and unit variance over both samples together.

    Columns that are constant over both samples are dropped: they hold nothing about the ratio.

    Attributes:
        shape: Shape of one sample.
        kept: Indices (d,) of the columns that vary.
        center: Their means (d,), float64.
        scale: Their standard deviations (d,), float64.
    """

    shape: tuple[int, ...]
    kept: Tensor
    center: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Standardized float64 points (N, d) of samples (N, *shape)."""
        return (x.reshape(len(x), -1)[:, self.kept].double() - self.center) / self.scale


def check_samples(x: Tensor, name: str, least: int = 1) -> None:
    """Refuses what is not a finite floating-point tensor of at least ``least`` samples.

    Raises:
        UserError: It is not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(
            f"{name} must be a tensor of real numbers",
            got=f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__,
            expected="a floating-point torch tensor, one sample per row",
            fix="convert it with torch.as_tensor(x).float()",
        )
    if x.ndim == 0 or len(x) < least or x[:1].numel() == 0:
        raise UserError(
            f"{name} has too few samples",
            got=f"shape {tuple(x.shape)}",
            expected=f"at least {least}, one per row",
            fix="pass more samples",
        )
    bad = int((~x.reshape(len(x), -1).isfinite().all(1)).sum())
    if bad:
        raise UserError(
            f"{name} has values that are not finite",
            got=f"NaN or infinity in {bad} of {len(x)} samples",
            expected="finite numbers",
            fix="remove those samples, or find out where they come from",
        )


def check_pair(x_p: Tensor, x_q: Tensor, least: int = SMALLEST) -> None:
    """Refuses two samples that no ratio can be taken of.

    Raises:
        UserError: They are too few, not finite, of different shapes or devices, or one of them is constant.
    """
    check_samples(x_p, "x_p", least)
    check_samples(x_q, "x_q", least)
    if x_p.shape[1:] != x_q.shape[1:]:
        raise UserError(
            "the two samples have different shapes",
            got=f"{tuple(x_p.shape[1:])} and {tuple(x_q.shape[1:])}",
            expected="the same shape per sample",
        )
    if x_p.device != x_q.device:
        raise UserError(
            "the two samples are on different devices",
            got=f"{x_p.device} and {x_q.device}",
            expected="one device",
            fix="move one of them with .to(...)",
        )
    for name, x in (("x_p", x_p), ("x_q", x_q)):
        if bool((x == x[:1]).all()):
            raise UserError(
                f"{name} is constant, so it has no density and no ratio",
                got=f"{len(x)} equal samples",
                expected="samples that vary",
            )


def standardizer(x_p: Tensor, x_q: Tensor) -> tuple[Standardizer, tuple[str, ...]]:
    """The standardizer of two checked samples, and warnings about columns that vary in one of them only."""
    p, q = x_p.reshape(len(x_p), -1).double(), x_q.reshape(len(x_q), -1).double()
    n = len(p) + len(q)
    center = (p.sum(0) + q.sum(0)) / n
    variance = ((p - center).square().sum(0) + (q - center).square().sum(0)) / n
    still_p, still_q = (p == p[:1]).all(0), (q == q[:1]).all(0)
    varies = ~(still_p & still_q & (p[0] == q[0]))
    kept = varies.nonzero().flatten()
    one_sided = int((varies & (still_p | still_q)).sum())
    warnings = (
        (
            f"{one_sided} columns are constant in one sample and not in the other: the true density "
            f"ratio is not finite, although the fitted one is",
        )
        if one_sided
        else ()
    )
    return Standardizer(tuple(x_p.shape[1:]), kept, center[kept], variance[kept].sqrt()), warnings


def split(n: int, share: float, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random division of ``n`` samples: indices to fit on, and a ``share`` (2 at least) held out.

    The random numbers are drawn on the device of ``generator``, so they are the same on every ``device``.
    """
    order = torch.randperm(n, generator=generator).to(device)
    held = min(max(2, round(share * n)), n - 2)
    return order[held:], order[:held]


def high_dimension(what: str, d: int) -> tuple[str, ...]:
    """A warning about methods that compare distances, where all distances are about equal."""
    if d <= _HIGH:
        return ()
    return (f"{what} in {d} dimensions are uninformative about densities: log-ratios are far too close to 0",)


def in_chunks(function: LogRatio, x: Tensor) -> Tensor:
    """``function`` of ``x``, evaluated :data:`CHUNK` rows at a time."""
    if len(x) <= CHUNK:
        return function(x)
    return torch.cat([function(part) for part in x.split(CHUNK)])
