"""Two samples made ready for a ratio: checked, flattened, standardized and split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
