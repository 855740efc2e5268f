"""Linear measurements of samples: a map and its transpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.diffusion.geometry.jacobian import slopes

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearMap:
    """A x, from samples (B, *shape) to measurements (B, *out_shape).

    Attributes:
        apply: A.
        transpose: A^T, from (B, *out_shape) to (B, *shape).
        shape: Shape of one sample.
        out_shape: Shape of one measurement.
        orthonormal: Whether A A^T is the identity: measurements do not overlap and keep lengths.
    """

    apply: Map
    transpose: Map
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    orthonormal: bool

    def check_value(self, value: Tensor) -> None:
        """Refuses what is no measurement of this kind.

        Raises:
            UserError: ``value`` is neither (*out_shape) nor (B, *out_shape).
        """
        if tuple(value.shape) != self.out_shape and tuple(value.shape[1:]) != self.out_shape:
            raise UserError(
                "the measured value does not match the measurement",
                got=tuple(value.shape),
                expected=f"{self.out_shape}, or (B, {', '.join(map(str, self.out_shape))})",
            )


def linear_map(
    operator: Tensor | Map, shape: tuple[int, ...], transpose: Map | None = None, device: str = "cpu"
) -> LinearMap:
    """A linear map from a matrix or a function.

    Args:
        operator: A matrix (M, D), D the numbers in a sample, which is applied to flattened samples; or a
            function from (B, *shape) to (B, *out_shape).
        shape: Shape of one sample.
        transpose: A^T as a function; without it the derivative of the function is used.
        device: The device on which to test a function.

    Raises:
        UserError: The matrix does not fit, the function is not linear, or the transpose is not its transpose.
    """
    dim = math.prod(shape)
    if isinstance(operator, Tensor):
        if operator.ndim != 2 or operator.shape[1] != dim:
            raise UserError(
                "the matrix does not match the samples",
                got=tuple(operator.shape),
                expected=f"(M, {dim}) for samples of shape {tuple(shape)}",
            )
        return _checked(
            lambda x: x.flatten(1) @ operator.to(x).mT,
            lambda v: (v @ operator.to(v)).reshape(-1, *shape),
            shape,
            str(operator.device),
        )
    return _checked(operator, transpose or _by_derivative(operator, shape), shape, device)


def observed(mask: Tensor, shape: tuple[int, ...]) -> LinearMap:
    """The coordinates of a sample where ``mask`` is True, as a vector.

    Args:
        mask: Boolean, of the shape of one sample.
        shape: Shape of one sample.

    Raises:
        UserError: The mask has another shape or dtype, or shows nothing.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape) or not bool(mask.any()):
        raise UserError(
            "a mask must be boolean, of the shape of one sample, and True somewhere (where values are known)",
            got=f"{tuple(mask.shape)}, {mask.dtype}, {int(mask.sum())} known",
            expected=f"{tuple(shape)}, torch.bool",
            fix="expand the mask of an image to its channels, or call .bool()",
        )
    places = mask.flatten().nonzero()[:, 0]

    def back(v: Tensor) -> Tensor:
        full = torch.zeros(len(v), mask.numel(), dtype=v.dtype, device=v.device)
        return full.index_copy(1, places.to(v.device), v).reshape(-1, *shape)

    def pick(x: Tensor) -> Tensor:
        return x.flatten(1).index_select(1, places.to(x.device))

    return LinearMap(pick, back, tuple(shape), (len(places),), orthonormal=True)


def masked(masks: Tensor) -> LinearMap:
    """Samples with 0 where they are hidden, each by its own mask.

    Args:
        masks: What is seen of each sample of a call, (B, *shape) boolean.
    """

    def seen(x: Tensor) -> Tensor:
        return x * masks.to(x)

    shape = tuple(masks.shape[1:])
    return LinearMap(seen, seen, shape, shape, orthonormal=False)


def blurring(width: float, shape: tuple[int, ...]) -> LinearMap:
    """Images or video blurred by a Gaussian along their last two axes, whose weights sum to 1 at borders too.

    Args:
        width: Standard deviation in pixels.
        shape: Shape of one sample.
    """
    down, across = (blur_matrix(width, n) for n in shape[-2:])

    def apply(x: Tensor) -> Tensor:
        return down.to(x) @ x @ across.to(x).mT

    def transpose(v: Tensor) -> Tensor:
        return down.to(v).mT @ v @ across.to(v)

    return LinearMap(apply, transpose, tuple(shape), tuple(shape), orthonormal=False)


def blur_matrix(width: float, n: int) -> Tensor:
    """The blur of :func:`blurring` along one axis of n pixels, (n, n) float64."""
    place = torch.arange(n, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / width) ** 2)
    return weights / weights.sum(1, keepdim=True)


def _by_derivative(operator: Map, shape: tuple[int, ...]) -> Map:
    def transpose(v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = torch.zeros(len(v), *shape, dtype=v.dtype, device=v.device, requires_grad=True)
            image = operator(leaf)
            # A map that hides its graph gets the transpose 0 here, and is found out by the check of it.
            (back,) = slopes((image * v).flatten(1).sum(1), (leaf,))
        return back

    return transpose


def _checked(apply: Map, transpose: Map, shape: tuple[int, ...], device: str) -> LinearMap:
    """Tries A and A^T on random vectors."""
    gen = generator(0, "linear map", device)
    x, y = torch.randn(2, 2, *shape, generator=gen, device=device, dtype=torch.float64)
    image = apply(x)
    both = apply(2 * x - 3 * y) - (2 * image - 3 * apply(y))
    size = float(image.abs().max())
    if not float(both.abs().max()) <= 1e-5 * size:
        raise UserError(
            "this measurement is not linear",
            got=f"A(2x - 3y) differs from 2 A x - 3 A y by {float(both.abs().max()):.3g}",
            fix="for other measurements use guidance by a forward model",
        )
    v = torch.randn(image.shape, generator=gen, device=device, dtype=torch.float64)
    back = transpose(v)
    left, right = float((image * v).sum()), float((x * back).sum()) if back.shape == x.shape else math.nan
    if not abs(left - right) <= 1e-5 * size * math.sqrt(image.numel()):
        raise UserError(
            "the transpose does not match the measurement",
            got=f"(A x) . v = {left:.6g} but x . (A^T v) = {right:.6g}, from shape {tuple(back.shape)}",
            expected="equal numbers",
            fix="omit transpose, and it is derived",
        )
    orthonormal = bool(torch.allclose(apply(back), v, rtol=1e-6, atol=1e-6))
    return LinearMap(apply, transpose, tuple(shape), tuple(image.shape[1:]), orthonormal)
