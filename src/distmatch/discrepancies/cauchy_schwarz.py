r"""Cauchy-Schwarz divergence -log[(int p q)^2 / (int p^2 int q^2)], with kernel density estimates plugged in.

The kernel density estimate has bandwidth h, so the product of two of them integrates to a mean of Gaussians
of bandwidth sqrt(2) h: what is estimated is the divergence of p and q both blurred by h. All in the log
domain: supports that are far apart give the large number they should, not infinity.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.base.estimate import Estimate
from distmatch.base.samples import about_center, checked_pair, same_count
from distmatch.discrepancies.chunks import in_chunks
from distmatch.discrepancies.kernels import squared_distances
from distmatch.discrepancies.pairwise_sums import (
    PairSums,
    degenerate_across,
    degenerate_within,
    two_sample_variances,
)
from distmatch.discrepancies.u_statistics import near_zero

ESTIMATORS = ("unbiased", "biased")
_OVERLAP_ERROR = 0.5


def silverman_bandwidth(x: Tensor, y: Tensor | None = None) -> float:
    """The bandwidth of a kernel density estimate by the normal reference rule, for an isotropic kernel.

    s (4 / ((d + 2) n))^(1 / (d + 4)) with s the root mean square of the coordinates' standard deviations, and
    n the smaller number of samples. For constant samples s is 1.

    Args:
        x: Samples (n, d).
        y: More samples (m, d); the spreads are averaged, so a distance between the sets does not count.
    """
    parts = checked_pair(x, x if y is None else y)
    spread = math.sqrt(sum(float(z.detach().double().var(0).mean()) for z in parts) / 2)
    n, d = min(len(z) for z in parts), parts[0].shape[1]
    return (spread or 1.0) * (4 / ((d + 2) * n)) ** (1 / (d + 4))


def _bandwidth(bandwidth: float | None, x: Tensor, y: Tensor) -> float:
    if bandwidth is None:
        return silverman_bandwidth(x, y)
    check_number("the bandwidth", bandwidth, "(0, inf)", fix="None chooses one")
    return float(bandwidth)


def _log_rows(x: Tensor, y: Tensor, leave_out_diagonal: bool, precision: torch.dtype) -> Tensor:
    """Log of the sums over j of exp(-|x_i - y_j|^2), (n,) in float64, of a matrix in ``precision``."""

    def of_rows(low: int, high: int, x: Tensor, y: Tensor) -> Tensor:
        logs = -squared_distances(x[low:high], y, precision, low if leave_out_diagonal else None)
        if leave_out_diagonal:
            logs.diagonal(low).fill_(-math.inf)
        return logs.logsumexp(1).double()

    return in_chunks(of_rows, x, y)


def _prepared(
    x: Tensor, y: Tensor, bandwidth: float | None, estimator: str
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both sets in float64, scaled so that the kernel is exp(-squared distance); their own precision."""
    check_name("estimator", estimator, ESTIMATORS)
    x, y = checked_pair(x, y)
    scale = 1 / (2 * _bandwidth(bandwidth, x, y))
    given = x.dtype
    x, y = about_center(x, y)
    return x * scale, y * scale, given


def cauchy_schwarz_loss(
    x: Tensor, y: Tensor, *, bandwidth: float | None = None, estimator: str = "unbiased"
) -> Tensor:
    """The Cauchy-Schwarz divergence as a number to minimize, differentiable in bounded memory.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        bandwidth: As in :func:`cauchy_schwarz`; no gradient runs through the default.
        estimator: ``"unbiased"`` omits self-pairs (each of the three means is unbiased, their logarithm
            nearly); ``"biased"`` keeps them: never negative, and zero for equal sets.

    Returns:
        () in the precision of the samples, in nats.

    Raises:
        UserError: Bad samples, bandwidth or estimator.
    """
    x, y, given = _prepared(x, y, bandwidth, estimator)
    own = estimator == "unbiased"
    m, n = len(x), len(y)
    inner = sum(_log_rows(z, z, own, given).logsumexp(0) for z in (x, y))
    pairs = math.log(m * (m - own)) + math.log(n * (n - own)) - 2 * math.log(m * n)
    return (inner - 2 * _log_rows(x, y, False, given).logsumexp(0) - pairs).to(given)


def _relative(x: Tensor, y: Tensor, within: bool, precision: torch.dtype) -> tuple[float, PairSums]:
    """The log of the mean of the kernel matrix, and the sums of the matrix divided by that mean.

    The degenerate part of the logarithm of three means has the entries k_ij - r_i c_j: their double
    centering, less the product of the relative row and column means that the curvature of the logarithm adds.
    """
    pairs = len(x) * (len(y) - within)
    rows = _log_rows(x, y, within, precision)
    columns = rows if within else _log_rows(y, x, False, precision)
    log_mean = rows.logsumexp(0) - math.log(pairs)
    row_means = rows - log_mean - math.log(pairs / len(x))
    column_means = columns - log_mean - math.log(pairs / len(y))

    def squares(low: int, high: int, x: Tensor, y: Tensor) -> Tensor:
        own = low if within else None
        kernel = (-squared_distances(x[low:high], y, precision, own) - log_mean).exp()
        entries = kernel - (row_means[low:high, None] + column_means).exp()
        if within:
            entries.diagonal(low).zero_()
        return entries.square().sum(1).double()

    total = in_chunks(squares, x, y).sum()
    r, c = row_means.exp(), column_means.exp()
    if within:
        degenerate = degenerate_within(total, r * (r - 1))
    else:
        degenerate = degenerate_across(total, torch.zeros_like(r), torch.zeros_like(c))
    sums = PairSums(r * (pairs / len(x)), c * (pairs / len(y)), degenerate, within)
    return float(log_mean), sums


def cauchy_schwarz(
    x: Tensor, y: Tensor, *, bandwidth: float | None = None, estimator: str = "unbiased"
) -> Estimate:
    """An estimate of the Cauchy-Schwarz divergence of the two densities, both blurred by the bandwidth.

    Args:
        x: Samples (m, d), m >= 2.
        y: Samples (n, d), n >= 2.
        bandwidth: Bandwidth h of the density estimates, in the unit of the samples; None for
            :func:`silverman_bandwidth`. For Gaussians the blurred divergence is that with covariances S + h^2
            I.
        estimator: ``"unbiased"`` omits self-pairs, so that each of the three means is unbiased;
            ``"biased"`` is the plug-in estimate, never negative, without a standard error.

    Returns:
        The estimate in nats, with a warning where too few pairs see any overlap of the two sets, or where it
        is too close to zero for an honest interval: :func:`mmd_test` with a Gaussian kernel of bandwidth
        sqrt(2) h then decides whether the blurred densities differ.

    Raises:
        UserError: Bad samples, bandwidth or estimator.
    """
    with torch.no_grad():
        if estimator == "biased":
            value = float(cauchy_schwarz_loss(x, y, bandwidth=bandwidth, estimator=estimator))
            return Estimate(value, math.nan, min(len(x), len(y)))
        x, y, given = _prepared(x, y, bandwidth, estimator)
        logs, sums = zip(
            *(_relative(a, b, w, given) for a, b, w in ((x, x, True), (y, y, True), (x, y, False))),
            strict=True,
        )
        xx, yy, xy = sums
        cross = xy.row_means.var() / len(x) + xy.column_means.var() / len(y)
        value = logs[0] + logs[1] - 2 * logs[2]
        found = near_zero(value, *two_sample_variances(xx, yy, xy), min(len(x), len(y)), "mmd_test")
        if float(cross) > _OVERLAP_ERROR**2:
            apart = "the two sets hardly overlap at this bandwidth, so a few pairs dominate: use a larger one"
            return replace(found, warning=apart)
        return found


def conditional_cauchy_schwarz_loss(
    x_p: Tensor,
    y_p: Tensor,
    x_q: Tensor,
    y_q: Tensor,
    *,
    bandwidth_x: float | None = None,
    bandwidth_y: float | None = None,
) -> Tensor:
    r"""The Cauchy-Schwarz divergence of p(y|x) and q(y|x), integrated over x (Yu et al. 2023).

    -2 log int int p(y|x) q(y|x) + log int int p(y|x)^2 + log int int q(y|x)^2 dx dy, with density estimates
    plugged in: log sum_j (K L)_j. / (K 1)_j^2 for the two squares. The cross term comes in two estimates, at
    the x of either sample, whose logarithms are added. Where both share x (targets and predictions of one
    batch) pass the same x twice. The measure is dx on the whole space: where one of the samples has few x
    the ratio is noisy.

    Args:
        x_p: Conditions of p (m, d).
        y_p: Values of p (m, e), row by row.
        x_q: Conditions of q (n, d).
        y_q: Values of q (n, e).
        bandwidth_x: Bandwidth of the density estimates in x; None for :func:`silverman_bandwidth`.
        bandwidth_y: The same in y.

    Returns:
        () in the precision of the samples, in nats; 0 if both samples are the same.

    Raises:
        UserError: Bad or unpaired samples, or a bad bandwidth.
    """
    x_p, x_q = checked_pair(x_p, x_q, names=("x_p", "x_q"))
    y_p, y_q = checked_pair(y_p, y_q, names=("y_p", "y_q"))
    same_count(x_p, y_p, ("x_p", "y_p"))
    same_count(x_q, y_q, ("x_q", "y_q"))
    x_p, x_q, given = _prepared(x_p, x_q, bandwidth_x, "biased")
    y_p, y_q, _ = _prepared(y_p, y_q, bandwidth_y, "biased")

    def of_rows(low: int, high: int, x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> Tensor:
        in_x = -squared_distances(x[low:high], other_x, given)
        joint = in_x - squared_distances(y[low:high], other_y, given)
        return torch.stack([in_x.logsumexp(1), joint.logsumexp(1)]).double()

    p_p, p_pp = in_chunks(of_rows, x_p, y_p, x_p, y_p)
    q_q, q_qq = in_chunks(of_rows, x_q, y_q, x_q, y_q)
    p_q, p_pq = in_chunks(of_rows, x_p, y_p, x_q, y_q)
    q_p, q_qp = in_chunks(of_rows, x_q, y_q, x_p, y_p)
    squares = (p_pp - 2 * p_p).logsumexp(0) + (q_qq - 2 * q_q).logsumexp(0)
    cross = (p_pq - p_p - p_q).logsumexp(0) + (q_qp - q_q - q_p).logsumexp(0)
    return (squares - cross).to(given)


def conditional_cauchy_schwarz(
    x_p: Tensor,
    y_p: Tensor,
    x_q: Tensor,
    y_q: Tensor,
    *,
    bandwidth_x: float | None = None,
    bandwidth_y: float | None = None,
) -> Estimate:
    """The conditional Cauchy-Schwarz divergence as an estimate, without an error bar (a plug-in with bias).

    Arguments and errors are those of :func:`conditional_cauchy_schwarz_loss`.
    """
    with torch.no_grad():
        value = conditional_cauchy_schwarz_loss(
            x_p, y_p, x_q, y_q, bandwidth_x=bandwidth_x, bandwidth_y=bandwidth_y
        )
        return Estimate(float(value), math.nan, min(len(x_p), len(x_q)))
