r"""Positive definite kernels k(x, y), and the energy kernel -\|x - y\|^e, as plain data.

Bandwidths s are in the unit of the samples. Conventions of others: scikit-learn's ``rbf_kernel`` has
gamma = 1 / (2 s^2); its ``laplacian_kernel`` is built on the city-block distance, ours on the Euclidean one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.base.samples import checked_pair

KERNELS = ("gaussian", "laplace", "rational_quadratic", "imq", "energy", "polynomial")
"""The names that functions with a ``kernel`` argument take."""

_MEDIAN_FROM = 2000
_CANCELLED = 1e-11
"""Share of the largest squared norm below which a squared distance has lost digits that matter."""
_CLOSE = 1e-2
"""The same in float32: above it distances have five digits or more."""
_WIDE = 64
"""Coordinates from which on a product in float64 is what takes the time."""
_PAIR_NUMBERS = 2**20
"""Coordinates of the pairs whose differences are held at once."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as a function of the squared distance, or of the inner product, of scaled samples.

    Attributes:
        name: Its name.
        profile: The function of the squared distance (or inner product) of the scaled samples.
        scale: What the samples are multiplied with first; None means 1 / sqrt(d).
        of_products: The profile takes inner products, not squared distances.
        bounded: No value exceeds one, so that float32 is enough for the matrix of float32 samples.
    """

    name: str
    profile: Callable[[Tensor], Tensor]
    scale: float | None = 1.0
    of_products: bool = False
    bounded: bool = True

    def precision(self, given: torch.dtype) -> torch.dtype:
        """What the matrix of samples of that precision is to be computed in."""
        return given if self.bounded else torch.float64

    def scaled(self, x: Tensor) -> Tensor:
        """The samples (..., d) as :meth:`of_scaled` takes them."""
        return x * (1 / math.sqrt(x.shape[-1]) if self.scale is None else self.scale)

    def of_scaled(
        self, x: Tensor, y: Tensor, precision: torch.dtype | None = None, own: int | None = None
    ) -> Tensor:
        """The matrix k(x_i, y_j), (..., n, m), for samples that are scaled already.

        ``precision`` and ``own`` are as for :func:`squared_distances`.
        """
        if self.of_products:
            return self.profile((x @ y.mT).to(precision or x.dtype))
        return self.profile(squared_distances(x, y, precision, own))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The matrix k(x_i, y_j), (..., n, m), for samples (..., n, d) and (..., m, d)."""
        return self.of_scaled(self.scaled(x), self.scaled(y))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """The values k(x_i, y_i), (..., n)."""
        x, y = self.scaled(x), self.scaled(y)
        return self.profile((x * y).sum(-1) if self.of_products else (x - y).square().sum(-1))


def squared_distances(
    x: Tensor, y: Tensor, precision: torch.dtype | None = None, own: int | None = None
) -> Tensor:
    """Squared Euclidean distances (..., n, m), never negative.

    By one product of matrices in float64. Pairs so close for their distance from the origin that it loses
    their digits are taken by differences, so that equal points are at distance zero. Subtract a common center
    first, in float64, where the samples are far from the origin: that leaves fewer of these pairs. Where the
    result is float32, samples of many coordinates without any close pair are multiplied in float32.

    Args:
        x: Samples (..., n, d).
        y: Samples (..., m, d).
        precision: Of the result; None for that of the samples.
        own: Where ``x`` is a part of ``y``, the row of ``y`` that it starts at.
    """
    precision = precision or torch.promote_types(x.dtype, y.dtype)
    if x.shape[-1] == 1:
        return (x.double() - y.double().mT).square().to(precision)
    if precision == torch.float32 and x.shape[-1] >= _WIDE:
        squares, close = _by_product(x.float(), y.float(), own, _CLOSE)
    if precision != torch.float32 or x.shape[-1] < _WIDE or close is not None:
        x, y = x.double(), y.double()
        squares, close = _by_product(x, y, own, _CANCELLED)
        if close is not None:
            squares = _repaired(squares, x, y, close.nonzero(as_tuple=True))
    if own is not None:
        squares.diagonal(own, -2, -1).zero_()
    return squares.to(precision).clamp_min(0)


def _by_product(x: Tensor, y: Tensor, own: int | None, share: float) -> tuple[Tensor, Tensor | None]:
    """Squared distances, infinite for ``own``, and which are below a share of the largest squared norm."""
    of_x, of_y = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    squares = (
        torch.cat([-2 * x, of_x, torch.ones_like(of_x)], -1)
        @ torch.cat([y, torch.ones_like(of_y), of_y], -1).mT
    )
    if own is not None:
        squares.diagonal(own, -2, -1).fill_(math.inf)
    with torch.no_grad():
        least = share * torch.maximum(of_x.amax(), of_y.amax())
        return squares, squares < least if bool(squares.amin() < least) else None


@torch.no_grad()
def _differences(x: Tensor, y: Tensor, found: tuple[Tensor, ...]) -> Tensor:
    """The squared distances of some pairs, given by their indices (batch, row, column)."""
    parts = zip(*(i.split(max(1, _PAIR_NUMBERS // x.shape[-1])) for i in found), strict=True)
    return torch.cat([(x[(*batch, i)] - y[(*batch, j)]).square().sum(-1) for *batch, i, j in parts])


def _repaired(squares: Tensor, x: Tensor, y: Tensor, found: tuple[Tensor, ...]) -> Tensor:
    """The squared distances with some pairs taken by differences; the gradient is that of the product.

    That needs no repair, as it is a difference of points and not of their squares.
    """
    right = _differences(x, y, found)
    if not squares.requires_grad:
        return squares.index_put_(found, right)
    repair = torch.zeros_like(squares).index_put_(found, right - squares.detach()[found])
    return squares + repair


def root(squares: Tensor) -> Tensor:
    """The square root with gradient zero, not infinite, at zero."""
    positive = squares > 0
    if not squares.requires_grad:
        return squares.sqrt()
    return torch.where(positive, squares, 1.0).sqrt() * positive


def _positive(value: float, what: str) -> float:
    value = float(value)
    check_number(what, value, "(0, inf)")
    return value


def gaussian(bandwidth: float) -> Kernel:
    r"""exp(-\|x - y\|^2 / (2 s^2))."""
    return Kernel(
        "gaussian", lambda d2: (-d2).exp(), 1 / (math.sqrt(2) * _positive(bandwidth, "the bandwidth"))
    )


def laplace(bandwidth: float) -> Kernel:
    r"""exp(-\|x - y\| / s), with the Euclidean distance."""
    return Kernel("laplace", lambda d2: (-root(d2)).exp(), 1 / _positive(bandwidth, "the bandwidth"))


def rational_quadratic(bandwidth: float, alphas: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> Kernel:
    r"""The mean over a of (1 + \|x - y\|^2 / (2 a s^2))^-a, so k(x, x) = 1 (often the sum is taken)."""
    orders = [_positive(a, "an order of the rational quadratic kernel") for a in alphas]
    if not orders:
        raise UserError("the rational quadratic kernel needs at least one order", got="none")

    def profile(d2: Tensor) -> Tensor:
        return torch.stack([(-a * torch.log1p(d2 / (2 * a))).exp() for a in orders]).mean(0)

    return Kernel("rational_quadratic", profile, 1 / _positive(bandwidth, "the bandwidth"))


def imq(bandwidth: float, exponent: float = -0.5) -> Kernel:
    r"""The inverse multiquadric (1 + \|x - y\|^2 / s^2)^b with b in (-1, 0)."""
    check_number("the exponent of the inverse multiquadric", exponent, "(-1, 0)")
    return Kernel("imq", lambda d2: (1 + d2) ** exponent, 1 / _positive(bandwidth, "the bandwidth"))


def energy(exponent: float = 1.0) -> Kernel:
    r"""-\|x - y\|^e with e in (0, 2): conditionally positive definite, MMD^2 is the energy distance."""
    check_number("the exponent of the energy distance", exponent, "(0, 2)", fix="2 compares only the means")
    if exponent == 1:
        return Kernel("energy", lambda d2: -root(d2), bounded=False)
    return Kernel("energy", lambda d2: -(root(d2) ** exponent), bounded=False)


def polynomial(degree: int = 3, gamma: float | None = None, offset: float = 1.0) -> Kernel:
    """(gamma x.y + c)^degree; gamma defaults to 1/d. Sees only the first ``degree`` moments.

    Raises:
        UserError: The degree is no positive whole number, gamma not positive, or c negative.
    """
    check_count("the degree", degree)
    check_number("the offset", offset, "[0, inf)", fix="with a negative one the kernel is indefinite")
    scale = None if gamma is None else math.sqrt(_positive(gamma, "gamma"))
    return Kernel(
        "polynomial", lambda xy: (xy + offset) ** int(degree), scale, of_products=True, bounded=False
    )


def median_bandwidth(x: Tensor, y: Tensor | None = None) -> float:
    """The median heuristic: the median distance (not squared) between different points of the pooled sample.

    At most 2000 evenly spaced points are looked at. Where more than half of the pairs coincide it is the mean
    of the other distances, where all points coincide it is 1 (every bandwidth then gives the same kernel).

    Args:
        x: Samples (n, d).
        y: More samples (m, d).

    Returns:
        The bandwidth in the unit of the samples, without a graph.
    """
    parts = checked_pair(x, x if y is None else y, least=1)
    pooled = (parts[0] if y is None else torch.cat(parts)).detach()
    chosen = (
        torch.linspace(0, len(pooled) - 1, min(len(pooled), _MEDIAN_FROM), device=pooled.device)
        .round()
        .long()
    )
    distances = torch.nn.functional.pdist(pooled[chosen].double())
    if not (distances > 0).any():
        return 1.0
    median = float(distances.median())
    return median if median > 0 else float(distances[distances > 0].mean())


def resolve_kernel(kernel: str | Kernel, x: Tensor, y: Tensor | None = None) -> Kernel:
    """The kernel of that name, with the bandwidth of the median heuristic where it has one.

    Args:
        kernel: One of :data:`KERNELS`, or a kernel, which is returned unchanged.
        x: Samples (n, d) for the bandwidth.
        y: More samples.

    Raises:
        UserError: There is no such kernel.
    """
    if isinstance(kernel, Kernel):
        return kernel
    check_name("kernel", kernel, KERNELS)
    if kernel == "energy":
        return energy()
    if kernel == "polynomial":
        return polynomial()
    of_bandwidth = {
        "gaussian": gaussian,
        "laplace": laplace,
        "rational_quadratic": rational_quadratic,
        "imq": imq,
    }
    return of_bandwidth[kernel](median_bandwidth(x, y))
