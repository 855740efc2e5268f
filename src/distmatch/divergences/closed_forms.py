"""Exact divergences between two Gaussians, for tests, for calibrating estimators and as targets of plots.

Every function takes two :class:`Gaussian` of the same dimension and returns a tensor of shape () through
which autograd flows. f-divergences and Renyi work in the frame where q is standard: with S_q = L L^T, the
teacher has mean delta = L^-1 (m_p - m_q) and covariance A = L^-1 S_p L^-T. Sums such as tr A - d - log|A|
lose digits for nearly equal Gaussians: errors are about 1e-15 times the dimension, absolute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_equal, check_number
from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence
from distmatch.divergences.gaussian import Gaussian
from distmatch.divergences.lookup import measure
from distmatch.divergences.renyi import Renyi

__all__ = ["Gaussian", "cauchy_schwarz", "f_divergence", "fisher", "mmd_squared", "wasserstein2_squared"]

_NEAR_KL = 1e-8  # closer to order 0 or 1 than this it is the KL limit: either error is then about 1e-8


def _pair(p: Gaussian, q: Gaussian) -> None:
    check_equal("the dimensions of the Gaussians", p.dimension, q.dimension)
    check_equal("the dtypes of the Gaussians", p.mean.dtype, q.mean.dtype)
    check_equal("the devices of the Gaussians", p.mean.device, q.mean.device)


def _whitened(p: Gaussian, q: Gaussian) -> tuple[Tensor, Tensor]:
    """The mean and covariance of p in the frame where q is standard."""
    factor = torch.linalg.cholesky(q.covariance)
    delta = torch.linalg.solve_triangular(factor, (p.mean - q.mean)[:, None], upper=False)[:, 0]
    half = torch.linalg.solve_triangular(factor, p.covariance, upper=False)
    return delta, torch.linalg.solve_triangular(factor, half.T, upper=False)


def _logdet(matrix: Tensor) -> Tensor:
    """log|matrix| of a positive definite matrix."""
    return 2.0 * torch.linalg.cholesky(matrix).diagonal().log().sum()


def _kl(p: Gaussian, q: Gaussian) -> Tensor:
    delta, a = _whitened(p, q)
    return 0.5 * (a.diagonal().sum() - p.dimension - _logdet(a) + delta @ delta)


def _log_moment(p: Gaussian, q: Gaussian, order: float) -> Tensor:
    """The log of E_q[r^a] = int p^a q^(1-a); inf where a S_q + (1 - a) S_p is not positive definite."""
    delta, a = _whitened(p, q)
    eye = torch.eye(p.dimension, dtype=a.dtype, device=a.device)
    mixed = order * eye + (1.0 - order) * a
    factor, failed = torch.linalg.cholesky_ex(mixed)
    if bool(failed):
        return torch.full_like(delta.sum(), math.inf)
    solved = torch.cholesky_solve(delta[:, None], factor)[:, 0]
    spread = 2.0 * factor.diagonal().log().sum() - (1.0 - order) * _logdet(a)
    return 0.5 * (order * (order - 1.0) * (delta @ solved) - spread)


def _alpha(p: Gaussian, q: Gaussian, order: float) -> Tensor:
    if abs(order) < _NEAR_KL:
        return _kl(q, p)
    if abs(order - 1.0) < _NEAR_KL:
        return _kl(p, q)
    return torch.expm1(_log_moment(p, q, order)) / (order * (order - 1.0))


def _renyi(p: Gaussian, q: Gaussian, order: float) -> Tensor:
    if abs(order - 1.0) < _NEAR_KL:
        return _kl(p, q)
    return _log_moment(p, q, order) / (order - 1.0)


def _tv(p: Gaussian, q: Gaussian) -> Tensor:
    delta, a = _whitened(p, q)
    eye = torch.eye(p.dimension, dtype=a.dtype, device=a.device)
    if float((a.detach() - eye).abs().max()) > 1e4 * torch.finfo(a.dtype).eps:
        raise UserError(
            "total variation between Gaussians has a closed form for equal covariances only",
            got="two different covariances",
            expected="the same covariance",
            fix="use divergence_1d or divergence_2d, or estimate it from samples",
        )
    return torch.erf(delta.norm() / math.sqrt(8.0))


def f_divergence(which: str | Divergence | Renyi, p: Gaussian, q: Gaussian) -> Tensor:
    """The value of a divergence between two Gaussians, where it has a closed form.

    KL both ways, Jeffreys, squared Hellinger, Pearson, Neyman, every ``alpha:A`` and ``renyi:A``, and total
    variation for equal covariances. Pearson, Neyman and orders outside [0, 1] are inf where
    a S_q + (1 - a) S_p is not positive definite (Pearson: where p has twice the variance of q or more).
    Orders within 1e-8 of a KL limit are that limit.

    Args:
        which: A name accepted by :func:`distmatch.divergences.measure`, or its object.
        p: The teacher.
        q: The student.

    Returns:
        The value in nats, shape ().

    Raises:
        UserError: There is no closed form, or the dimensions differ.
    """
    _pair(p, q)
    found = measure(which)
    if isinstance(found, Renyi):
        return _renyi(p, q, found.order)
    name, _, order = found.name.partition(":")
    if name == "alpha" and order:
        return _alpha(p, q, float(order))
    if name == "kl":
        return _kl(p, q)
    if name == "reverse_kl":
        return _kl(q, p)
    if name == "jeffreys":
        return _kl(p, q) + _kl(q, p)
    if name == "hellinger":
        return -2.0 * torch.expm1(_log_moment(p, q, 0.5))
    if name in ("pearson", "neyman"):
        return torch.expm1(_log_moment(p, q, 2.0 if name == "pearson" else -1.0))
    if name == "tv":
        return _tv(p, q)
    raise UserError(
        f"{found} between Gaussians has no closed form",
        got=found.name,
        expected="kl, reverse_kl, jeffreys, hellinger, pearson, neyman, alpha:A, renyi:A, or tv",
        fix="use divergence_1d or divergence_2d, or estimate it from samples",
    )


def _log_overlap(p: Gaussian, q: Gaussian) -> Tensor:
    """The log of int p q."""
    return Gaussian(q.mean, p.covariance + q.covariance).log_prob(p.mean[None])[0]


def cauchy_schwarz(p: Gaussian, q: Gaussian) -> Tensor:
    """The Cauchy-Schwarz divergence -log[(int p q)^2 / (int p^2 int q^2)], with the square, in nats.

    For equal covariances it equals KL(p || q). The form without the square is half of it.

    Raises:
        UserError: The dimensions differ.
    """
    _pair(p, q)
    return _log_overlap(p, p) + _log_overlap(q, q) - 2.0 * _log_overlap(p, q)


def mmd_squared(p: Gaussian, q: Gaussian, width: float) -> Tensor:
    """The squared maximum mean discrepancy under the kernel exp(-|x - y|^2 / (2 width^2)).

    Args:
        p: One Gaussian.
        q: The other.
        width: The width s of the kernel, positive, in the unit of the samples.

    Raises:
        UserError: The dimensions differ, or the width is not positive.
    """
    _pair(p, q)
    check_number("the width of a kernel", width, "(0, inf)")

    def mean_kernel(a: Gaussian, b: Gaussian) -> Tensor:
        total = a.covariance + b.covariance
        widened = total + width**2 * torch.eye(a.dimension, dtype=total.dtype, device=total.device)
        gap = a.mean - b.mean
        distance = gap @ torch.linalg.solve(widened, gap)
        return torch.exp(a.dimension * math.log(width) - 0.5 * _logdet(widened) - 0.5 * distance)

    return mean_kernel(p, p) + mean_kernel(q, q) - 2.0 * mean_kernel(p, q)


def wasserstein2_squared(p: Gaussian, q: Gaussian) -> Tensor:
    """W_2^2, the squared Wasserstein distance under the squared Euclidean cost (no factor 1/2).

    |m_p - m_q|^2 + tr(S_p + S_q - 2 (S_p^{1/2} S_q S_p^{1/2})^{1/2}), squared unit of the samples.

    Raises:
        UserError: The dimensions differ.
    """
    _pair(p, q)
    # The roots of the eigenvalues of S_p^{1/2} S_q S_p^{1/2}, without squaring them first.
    crossed = torch.linalg.svdvals(
        torch.linalg.cholesky(p.covariance).T @ torch.linalg.cholesky(q.covariance)
    )
    gap = p.mean - q.mean
    traces = p.covariance.diagonal().sum() + q.covariance.diagonal().sum()
    return (gap @ gap + traces - 2.0 * crossed.sum()).clamp(min=0.0)


def fisher(p: Gaussian, q: Gaussian) -> Tensor:
    """The Fisher divergence E_p|s_p - s_q|^2 of the scores s = grad log density (no factor 1/2).

    Raises:
        UserError: The dimensions differ.
    """
    _pair(p, q)
    precision_p, precision_q = torch.linalg.inv(p.covariance), torch.linalg.inv(q.covariance)
    push = precision_q @ (p.mean - q.mean)
    gap = precision_q - precision_p
    return push @ push + (gap @ p.covariance @ gap).diagonal().sum()
