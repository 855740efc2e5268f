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

from distmatch.base.errors import UserError, unknown_name
from distmatch.discrepancies.samples import checked_pair

KERNELS = ("gaussian", "laplace", "rational_quadratic", "imq", "energy", "polynomial")
"""The names that functions with a ``kernel`` argument take."""

_MEDIAN_FROM = 2000


@dataclass(frozen=True)
class Kernel:
    """A kernel as a function of the squared distance, or of the inner product, of scaled samples.

    Attributes:
        name: Its name.
        profile: The function of the squared distance (or inner product) of the scaled samples.
        scale: What the samples are multiplied with first; None means 1 / sqrt(d).
        of_products: The profile takes inner products, not squared distances.
    """

    name: str
    profile: Callable[[Tensor], Tensor]
    scale: float | None = 1.0
    of_products: bool = False

    def scaled(self, x: Tensor) -> Tensor:
        """The samples (..., d) as :meth:`of_scaled` takes them."""
        return x * (1 / math.sqrt(x.shape[-1]) if self.scale is None else self.scale)

    def of_scaled(self, x: Tensor, y: Tensor) -> Tensor:
        """The matrix k(x_i, y_j), (..., n, m), for samples that are scaled already."""
        return self.profile(x @ y.mT if self.of_products else squared_distances(x, y))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The matrix k(x_i, y_j), (..., n, m), for samples (..., n, d) and (..., m, d)."""
        return self.of_scaled(self.scaled(x), self.scaled(y))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """The values k(x_i, y_i), (..., n)."""
        x, y = self.scaled(x), self.scaled(y)
        return self.profile((x * y).sum(-1) if self.of_products else (x - y).square().sum(-1))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances (..., n, m), never negative.

    By inner products, so subtract a common centre first where the samples are far from the origin.
    """
    if x.shape[-1] == 1:
        return (x - y.mT).square()
    products = torch.baddbmm if x.ndim == 3 else torch.addmm
    squares = products(y.square().sum(-1)[..., None, :], x, y.mT, alpha=-2) + x.square().sum(-1)[..., :, None]
    return squares.clamp_min(0)


def root(squares: Tensor) -> Tensor:
    """The square root with gradient zero, not infinite, at zero."""
    positive = squares > 0
    if not squares.requires_grad:
        return squares.sqrt()
    return torch.where(positive, squares, 1.0).sqrt() * positive


def _positive(value: float, what: str) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} must be a positive number", got=value, fix="choose a positive one")
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
    if not -1 < exponent < 0:
        raise UserError(
            "the exponent of the inverse multiquadric is out of range", got=exponent, expected="(-1, 0)"
        )
    return Kernel("imq", lambda d2: (1 + d2) ** exponent, 1 / _positive(bandwidth, "the bandwidth"))


def energy(exponent: float = 1.0) -> Kernel:
    r"""-\|x - y\|^e with e in (0, 2): conditionally positive definite, MMD^2 is the energy distance."""
    if not 0 < exponent < 2:
        raise UserError(
            "the exponent of the energy distance is out of range",
            got=exponent,
            expected="a number between 0 and 2, both excluded (2 sees only the means)",
        )
    if exponent == 1:
        return Kernel("energy", lambda d2: -root(d2))
    return Kernel("energy", lambda d2: -(root(d2) ** exponent))


def polynomial(degree: int = 3, gamma: float | None = None, offset: float = 1.0) -> Kernel:
    """(gamma x.y + c)^degree; gamma defaults to 1/d. Sees only the first ``degree`` moments.

    Raises:
        UserError: The degree is no positive whole number, gamma not positive, or c negative.
    """
    if degree != int(degree) or degree < 1:
        raise UserError("the degree must be a positive whole number", got=degree)
    if not (math.isfinite(offset) and offset >= 0):
        raise UserError("the offset must not be negative (the kernel would be indefinite)", got=offset)
    scale = None if gamma is None else math.sqrt(_positive(gamma, "gamma"))
    return Kernel("polynomial", lambda xy: (xy + offset) ** int(degree), scale, of_products=True)


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
        kernel: One of :data:`KERNELS`, or a kernel, which is handed back as it is.
        x: Samples (n, d) for the bandwidth.
        y: More samples.

    Raises:
        UserError: There is no such kernel.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if kernel == "energy":
        return energy()
    if kernel == "polynomial":
        return polynomial()
    with_bandwidth = {
        "gaussian": gaussian,
        "laplace": laplace,
        "rational_quadratic": rational_quadratic,
        "imq": imq,
    }
    if kernel not in with_bandwidth:
        raise unknown_name("kernel", kernel, KERNELS)
    return with_bandwidth[kernel](median_bandwidth(x, y))
