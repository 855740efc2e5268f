"""Mode coverage against an exact Gaussian mixture: which components were hit, and how the mass is shared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate

_ELEMENTS = 2**23  # of the (rows, K, D) differences held at once


class Mixture(Protocol):
    """What is needed of a Gaussian mixture.

    Attributes:
        weights: (K,), summing to one.
        means: (K, D).
        covariances: (K, D, D).
    """

    @property
    def weights(self) -> Tensor: ...  # noqa: D102

    @property
    def means(self) -> Tensor: ...  # noqa: D102

    @property
    def covariances(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class ModeReport:
    """How samples fall on the components of a mixture.

    Attributes:
        modes: Number of components with at least one sample within the radius.
        high_quality: Share of samples within the radius of their nearest component.
        histogram: Float64 (K,), the smoothed mass of each component.
        kl: KL(p || q) in nats, p the true weights and q the histogram; large when a mode is dropped.
        reverse_kl: KL(q || p) in nats.
        js: Jensen-Shannon divergence in nats, at most log 2.
    """

    modes: Estimate
    high_quality: Estimate
    histogram: Tensor
    kl: Estimate
    reverse_kl: Estimate
    js: Estimate


def _distances(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Mahalanobis distances and posterior responsibilities, both float64 (N, K)."""
    weights, means, covariances = (
        t.to(device=x.device, dtype=torch.float64)
        for t in (mixture.weights, mixture.means, mixture.covariances)
    )
    factors = torch.linalg.cholesky(covariances)
    log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    rows = max(1, _ELEMENTS // means.numel())
    squared = []
    for chunk in x.double().split(rows):
        difference = (chunk[None] - means[:, None]).transpose(1, 2)
        squared.append(torch.linalg.solve_triangular(factors, difference, upper=False).square().sum(1).T)
    distances = torch.cat(squared)
    return distances.sqrt(), torch.softmax(weights.log() - log_det - distances / 2, dim=1)


def _delta_estimate(value: Tensor, gradient: Tensor, shares: Tensor) -> Estimate:
    """``value`` of the mean shares, with the delta-method standard error from the spread over samples."""
    n = shares.shape[0]
    influence = shares @ gradient
    return Estimate(float(value), float(influence.std(correction=0) / math.sqrt(n)), n)


def smoothed_share(count: float, n: int) -> Estimate:
    """The share ``count / n``; its binomial standard error, at (count + 1/2) / (n + 1), is never 0."""
    middle = (count + 0.5) / (n + 1)
    return Estimate(count / n, math.sqrt(middle * (1 - middle) / n), n)


def mode_counts(x: Tensor, mixture: Mixture, radius: float = 3.0) -> ModeReport:
    r"""Compares samples with the components of an exact mixture.

    A sample *hits* the component nearest to it in Mahalanobis distance if that distance is at most ``radius``
    standard deviations. The histogram does not use the radius: each sample gives its posterior
    responsibilities, so its expectation is exactly the weights when the samples follow the mixture, also
    where components overlap. Half a sample is added to every component (:math:`q_k = (c_k + 1/2) / (n +
    K/2)`), which keeps KL(p || q) finite when a mode is dropped and bounds it by about :math:`\sum_{dropped}
    p_k \log(2 n p_k)`.

    Standard errors: for the divergences the delta method on the shares (multinomial where components are
    apart; conservative by up to sqrt(2) when q equals p, where the derivative vanishes); for the number of
    modes the chance that a hit mode would be missed by a repetition, with Poisson counts; a mode never hit
    adds nothing.

    Args:
        x: Samples (N, D) or (N, *shape) with D elements each, in the mixture's space.
        mixture: The exact mixture.
        radius: In standard deviations.

    Returns:
        The report.

    Raises:
        UserError: The samples have another dimension than the mixture, or there are none.
    """
    flat = x.flatten(1)
    n, k = flat.shape[0], mixture.means.shape[0]
    if n == 0 or flat.shape[1] != mixture.means.shape[1]:
        raise UserError(
            "the samples do not match the mixture",
            got=f"shape {tuple(x.shape)}",
            expected=f"(N, {mixture.means.shape[1]}) with N >= 1",
            fix="evaluate samples in the space of the mixture",
        )
    distances, shares = _distances(flat, mixture)
    nearest, component = distances.min(1)
    within = nearest <= radius
    hits = torch.bincount(component[within], minlength=k).double()
    missed = torch.exp(-hits[hits > 0])
    modes = Estimate(float((hits > 0).sum()), float((missed * (1 - missed)).sum().sqrt()), n)

    p = mixture.weights.to(shares)
    p = p / p.sum()
    shrink = n / (n + k / 2)  # derivative of the smoothed histogram with respect to the mean share
    q = shares.mean(0) * shrink + 0.5 / (n + k / 2)
    middle = (p + q) / 2
    kl = torch.xlogy(p, p / q).sum()
    reverse_kl = (q * (q / p).log()).sum()
    js = (torch.xlogy(p, p / middle).sum() + (q * (q / middle).log()).sum()) / 2
    return ModeReport(
        modes=modes,
        high_quality=smoothed_share(float(within.sum()), n),
        histogram=q,
        kl=_delta_estimate(kl, -shrink * p / q, shares),
        reverse_kl=_delta_estimate(reverse_kl, shrink * (q / p).log(), shares),
        js=_delta_estimate(js, shrink * (q / middle).log() / 2, shares),
    )
