"""uLSIF and RuLSIF: the ratio that is nearest in mean square, in closed form.

The relative ratio r_a = p / (a p + (1 - a) q) minimizes

    J(r) = a/2 E_p[r^2] + (1 - a)/2 E_q[r^2] - E_p[r].

With r = theta . phi and a ridge this is theta = (H + lambda I)^-1 h, where H = a E_p[phi phi^T] +
(1 - a) E_q[phi phi^T] and h = E_p[phi]; negative coefficients are set to 0, which keeps r positive. a = 0 is
uLSIF (Kanamori, Hido and Sugiyama 2009), a > 0 RuLSIF (Yamada et al. 2011), whose ratio is bounded by 1/a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.ratio.kernels import (
    candidate_widths,
    choose_centers,
    first_moment,
    log_kernel,
    positive,
    second_moment,
)
from distmatch.ratio.samples import Fitted, high_dimension

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LEFT_OUT = 2000  # pairs that are left out, one pair at a time; the others take part in every fit


@dataclass(frozen=True)
class LeastSquaresSettings:
    """How the least-squares ratio is fitted.

    Attributes:
        alpha: The share a of p in the denominator; 0 is uLSIF.
        centers: Kernels, at most.
        widths: Kernel widths to choose from, in the unit of standardized samples; None takes multiples of the
            median distance.
        ridges: Ridges lambda to choose from.
    """

    alpha: float = 0.0
    centers: int = 100
    widths: Sequence[float] | None = None
    ridges: Sequence[float] = _RIDGES

    def __post_init__(self) -> None:
        check_number("alpha of a relative ratio", self.alpha, "[0, 1)")


def fit_least_squares(p: Tensor, q: Tensor, settings: LeastSquaresSettings, seed: int) -> Fitted:
    """Fits the (relative) ratio with width and ridge chosen by leave-one-out loss.

    Args:
        p: Samples of p, (n, d) float64, standardized, in random order.
        q: Samples of q, (m, d), likewise.
        settings: The settings.
        seed: Seed of the choice of centers.
    """
    a = settings.alpha
    centers = choose_centers(p, settings.centers, seeds.generator(seed, "ratio/centres"))
    ridges = positive(settings.ridges, "ridge")
    trials = []
    for width in candidate_widths(settings.widths, p, q):
        losses = leave_one_out(p, q, centers, width, ridges, a)
        index = int(losses.mean(1).argmin())
        trials.append((width, ridges[index], losses[index]))
    best = min((losses for _, _, losses in trials), key=lambda losses: losses.mean().item())
    # The widest that is not worse than the best by more than one standard error: the smoother ratio.
    gaps = [losses - best for _, _, losses in trials]
    tied = [t for t, gap in zip(trials, gaps, strict=True) if gap.mean() <= gap.std() / math.sqrt(len(gap))]
    width, ridge, losses = max(tied, key=lambda trial: trial[0])
    loss = losses.mean().item()
    theta = solve(p, q, centers, width, ridge, a)
    if not bool((theta > 0).any()):
        raise UserError(
            "the least-squares ratio vanishes everywhere",
            got=f"no positive coefficient at width {width:.3g} and ridge {ridge:.3g}",
            expected="samples that overlap at the scale of the kernels",
            fix="give other widths or ridges, or use method='classifier'",
        )
    log_theta = theta[theta > 0].log()
    used = centers[theta > 0]
    chosen: dict[str, float | int | str] = {
        "width": width,
        "ridge": ridge,
        "centers": len(used),
        "loss": loss,
    }
    return Fitted(
        lambda x: torch.logsumexp(log_kernel(x, used, width) + log_theta, 1),
        chosen,
        high_dimension("kernels", p.shape[1]),
        relative=a,
    )


def solve(p: Tensor, q: Tensor, centers: Tensor, width: float, ridge: float, a: float) -> Tensor:
    """The coefficients theta (b,) of one width and ridge, negative ones set to 0."""
    h_matrix = (1 - a) * second_moment(q, centers, width)
    if a > 0:
        h_matrix = h_matrix + a * second_moment(p, centers, width)
    return _solve(h_matrix, ridge, first_moment(p, centers, width)[:, None])[:, 0].clamp_min(0.0)


def _solve(matrix: Tensor, ridge: float, right: Tensor) -> Tensor:
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix + ridge * eye))


def leave_one_out(
    p: Tensor, q: Tensor, centers: Tensor, width: float, ridges: Sequence[float], a: float
) -> Tensor:
    """Leave-one-out losses of each ridge, without refitting.

    Fold i leaves out sample i of p and sample i of q together, and its loss is J at those two, with negative
    coefficients set to 0 as in the final ratio. Leaving them out changes the matrix by two rank-one terms, so
    its inverse follows from the full one by the Woodbury formula. The value is that of refitting every time.

    Args:
        p: Samples of p, (n, d) float64, standardized.
        q: Samples of q, (m, d), likewise.
        centers: Kernel centers (b, d); they stay when their own sample is left out.
        width: Kernel width.
        ridges: Ridges.
        a: Share of p in the denominator.

    Returns:
        The loss of every fold, (ridges, folds) float64. There are min(n, m, 2000) folds.
    """
    n, m = len(p), len(q)
    folds = min(n, m, _LEFT_OUT)
    phi_p = log_kernel(p[:folds], centers, width).exp()
    phi_q = log_kernel(q[:folds], centers, width).exp()
    out_p, out_q = a / (n - 1), (1 - a) / (m - 1)  # weight of one sample in the smaller means
    matrix = out_q * m * second_moment(q, centers, width)
    if a > 0:
        matrix = matrix + out_p * n * second_moment(p, centers, width)
    h = first_moment(p, centers, width)
    right = (n * h - phi_p) / (n - 1)  # h of each fold, (folds, b)
    removed = torch.stack([math.sqrt(out_p) * phi_p, math.sqrt(out_q) * phi_q], 1)  # (folds, 2, b)
    losses = []
    for ridge in ridges:
        stacked = torch.cat([right, removed.reshape(2 * folds, -1)]).T
        solved = _solve(matrix, ridge, stacked).T
        inner, spread = solved[:folds], solved[folds:].reshape(folds, 2, -1)
        small = torch.eye(2, dtype=p.dtype, device=p.device) - removed @ spread.mT
        pull = torch.linalg.solve(small, removed @ inner[:, :, None])  # (folds, 2, 1)
        theta = inner + (spread * pull).sum(1)
        theta = theta.clamp_min(0.0)
        r_p, r_q = (theta * phi_p).sum(1), (theta * phi_q).sum(1)
        losses.append(0.5 * a * r_p.square() + 0.5 * (1 - a) * r_q.square() - r_p)
    return torch.stack(losses)
