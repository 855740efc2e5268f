"""Joint distance covariance of several variables (Chakraborty and Zhang 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.discrepancies.chunks import in_chunks
from distmatch.discrepancies.distance_covariance import checked_list
from distmatch.discrepancies.distance_products import centred, distances


def _row_sums(
    variables: list[Tensor],
    margins: list[Tensor],
    weights: Tensor,
    c: float,
    about_first: bool,
    self_pairs: bool,
) -> Tensor:
    """The sums over j of w_j prod_k (U^k_ij + c), (n,), U^k_ij = margin_i + margin_j - distance.

    With ``about_first`` the c of the first factor is missing; without ``self_pairs`` U_ii = 0.
    """

    def of_rows(low: int, high: int, *tensors: Tensor) -> Tensor:
        points, own, w = tensors[: len(variables)], tensors[len(variables) : -1], tensors[-1]
        apart = torch.ones(high - low, len(w), dtype=torch.bool, device=w.device)
        if not self_pairs:
            apart.diagonal(low).zero_()
        product: Tensor | None = None
        for k, (x, margin) in enumerate(zip(points, own, strict=True)):
            u = (margin[low:high, None] + margin - distances(x[low:high], x)) * apart
            factor = u if k == 0 and about_first else u + c
            product = factor if product is None else product * factor
        if product is None:
            raise UserError("too few variables", got=0)
        return (product * w).sum(1).double()

    return in_chunks(of_rows, *variables, *margins, weights)


def _margins(x: Tensor, weights: Tensor, shrink: float) -> Tensor:
    """Weighted row sums of the distances less half of their total, so that two of them centre an entry."""
    rows = in_chunks(lambda low, high, x, w: distances(x[low:high], x) @ w, x, weights)
    return rows - shrink * rows.dot(weights) / 2


def _unbiased(variables: list[Tensor], c: float, about_first: bool) -> Tensor:
    n, first = len(variables[0]), variables[0]
    weights = first.new_full((n,), 1 / (n - 2))
    margins = [_margins(x, weights, (n - 2) / (n - 1)) for x in variables]
    sums = _row_sums(variables, margins, torch.ones_like(weights), c, about_first, self_pairs=False)
    constant = 0.0 if about_first else c ** len(variables) * n / (n - 3)
    return sums.sum() / (n * (n - 3)) - constant


def _influences(variables: list[Tensor], c: float, about_first: bool) -> Tensor:
    """How the statistic changes with the weight of each sample, (n,), about its mean."""
    n = len(variables[0])
    variables = [x.detach().double() for x in variables]
    with torch.enable_grad():
        weights = torch.full_like(variables[0][:, 0], 1 / n).requires_grad_()
        margins = [_margins(x, weights, 1.0) for x in variables]
        sums = _row_sums(variables, margins, weights, c, about_first, self_pairs=True)
        (gradient,) = torch.autograd.grad(sums.dot(weights), weights)
    return gradient - gradient.mean()


def _prepared(variables: Sequence[Tensor], c: float) -> list[Tensor]:
    if not (math.isfinite(c) and c > 0):
        raise UserError("c must be a positive number", got=c, fix="1 weighs all orders of interaction alike")
    return [centred(x) for x in checked_list(variables, 2)]


def joint_distance_covariance_loss(
    variables: Sequence[Tensor], *, c: float = 1.0, about_first: bool = False
) -> Tensor:
    """JdCov as a penalty, differentiable in all variables in bounded memory.

    Args:
        variables: As in :func:`joint_distance_covariance`.
        c: As there.
        about_first: As there.

    Returns:
        () in the precision of the variables.

    Raises:
        UserError: Bad or unpaired samples, fewer than two variables, or c not positive.
    """
    points = _prepared(variables, c)
    return _unbiased(points, c, about_first).to(points[0].dtype)


def joint_distance_covariance(
    variables: Sequence[Tensor], *, c: float = 1.0, about_first: bool = False
) -> Estimate:
    """JdCov: zero only if all variables are independent jointly, not just in pairs (U-centred form).

    mean over pairs of prod_k (U^k + c), less c^d: for two variables the squared distance covariance (c = 1),
    for three the sum of the three pairwise ones, times c, and a triple term.

    Args:
        variables: Two or more paired samples (n, d_k), n >= 4.
        c: Small c weighs the high orders of interaction, large c the pairs.
        about_first: Leave out every term without the first variable. Those are constant in it, so the
            gradient is the same; what is left says how the first depends on the others, whatever these do
            among themselves.

    Returns:
        The estimate with its standard error; it can be negative. The pairwise terms are unbiased; those of
        three and more variables are too small by a relative error of order 1/n.

    Raises:
        UserError: Bad or unpaired samples, fewer than two variables, or c not positive.
    """
    with torch.no_grad():
        points = _prepared(variables, c)
        n = len(points[0])
        stderr = math.sqrt(float(_influences(points, c, about_first).square().sum())) / n
        return Estimate(float(_unbiased(points, c, about_first)), stderr, n)
