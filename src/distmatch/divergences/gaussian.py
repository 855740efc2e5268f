"""A checked Gaussian, the argument of the closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError


def _check(mean: Tensor, covariance: Tensor) -> None:
    for what, x, ndim in (("mean", mean, 1), ("covariance", covariance, 2)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the {what} of a Gaussian must be a float32 or float64 tensor",
                got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
                fix="call .double() on it",
            )
        if x.ndim != ndim or x.numel() == 0:
            raise UserError(
                f"the {what} of a Gaussian has a wrong shape",
                got=tuple(x.shape),
                expected="(d,) for the mean and (d, d) for the covariance, d >= 1",
            )
        if not bool(x.isfinite().all()):
            raise UserError(f"the {what} of a Gaussian is not finite", got="NaN or inf", expected="numbers")
    d = len(mean)
    if covariance.shape != (d, d):
        raise UserError(
            "the covariance does not match the mean",
            got=tuple(covariance.shape),
            expected=(d, d),
        )
    exact = covariance.detach()
    size = float(exact.abs().max())
    if float((exact - exact.T).abs().max()) > 1e3 * torch.finfo(exact.dtype).eps * size:
        raise UserError("the covariance of a Gaussian must be symmetric", fix="use (S + S.T) / 2")
    if bool(torch.linalg.cholesky_ex(exact).info):
        raise UserError(
            "the covariance of a Gaussian must be positive definite",
            got=f"a smallest eigenvalue of {float(torch.linalg.eigvalsh(exact)[0]):.3g}",
            expected="eigenvalues above 0",
            fix="add a small multiple of the identity if it is the covariance of too few samples",
        )


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance).

    Attributes:
        mean: Shape (d,), float32 or float64.
        covariance: Shape (d, d), symmetric and positive definite, of the same dtype and device.

    Raises:
        UserError: They are no mean and covariance.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        _check(self.mean, self.covariance)
        check_equal("the dtypes of mean and covariance", self.mean.dtype, self.covariance.dtype)
        check_equal("the devices of mean and covariance", self.mean.device, self.covariance.device)

    @property
    def dimension(self) -> int:
        """The number of coordinates, d."""
        return len(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density at positions of shape (M, d), or (M,) in one dimension; shape (M,)."""
        points = x[:, None] if x.ndim == 1 and self.dimension == 1 else x
        if points.ndim != 2 or points.shape[1] != self.dimension:
            raise UserError(
                "positions do not match the Gaussian", got=tuple(x.shape), expected=f"(M, {self.dimension})"
            )
        gap = points - self.mean
        factor = torch.linalg.cholesky(self.covariance.to(gap.dtype))
        white = torch.linalg.solve_triangular(factor, gap.T, upper=False)
        constant = 0.5 * self.dimension * math.log(2.0 * math.pi) + factor.diagonal().log().sum()
        return -0.5 * (white * white).sum(0) - constant
