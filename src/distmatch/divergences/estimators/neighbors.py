"""KL(p || q) from samples alone, by the distances to the k-th nearest neighbors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_count
from distmatch.base.estimate import Estimate
from distmatch.base.neighbors import nearest
from distmatch.base.samples import checked_pair
from distmatch.divergences.estimators.results import joined

# A jackknife overstates the spread of nearest-neighbor statistics by a fifth or more; half-samples do not.
_HALVES = 40
_EXTRA = 30  # neighbors beyond twice those needed that are kept, so that half of them can be left out
_LOCAL = 0.02  # (k/n)^(2/d) above this: the k nearest are not near
_RING = 15  # neighbors by which a sample of p is judged to be among the samples of q or beyond them
_CHANCE = 0.0008  # how often one that is among them is taken to be beyond
_BEYOND = 0.01  # share of samples beyond, above which what they add is not known
_TIES = 0.01  # share of samples that coincide with another, above which there is no density


def kl_neighbors(x_p: Tensor, x_q: Tensor, *, k: int = 5, seed: int = 0) -> Estimate:
    """KL(p || q) by k nearest neighbors (Wang, Kulkarni, Verdu 2009).

    The mean over samples of p of d log(nu / rho) + log(m / (n - 1)), where rho and nu are the distances to
    the k-th nearest other sample of p and to the k-th nearest sample of q. It needs no density, but its bias
    shrinks only like n^(-1/d) or so: in three dimensions it takes thousands of samples, beyond about five
    there are never enough.

    The standard error joins three parts in quadrature: the spread over 40 random halves of both samples, the
    bias as it shows when the 3k-th neighbors take the place of the k-th (it is taken to grow like
    (k/n)^(1/d)), and the error of that bias. There is a warning, and no standard error: where that bias is
    significant and larger than that spread; where (k/n)^(2/d) > 0.02; where more than 1 % of the samples of p
    are outside those of q, as in heavier tails; where no sample of q is among those of p, so that KL may be
    infinite; where more than 1 % of the samples coincide. Fewer samples that coincide have their neighbors
    counted from the first at another position.

    Args:
        x_p: Samples of p, (n,) or (n, *shape), at least 8 k.
        x_q: Samples of q, (m,) or (m, *shape), likewise.
        k: Which neighbor: a larger one has a smaller variance and a larger bias.
        seed: Fixes the halves.

    Returns:
        The value in nats, on the scale of KL although it can be below zero.

    Raises:
        UserError: The samples cannot be used, see the message.
    """
    check_count("the number of neighbors", k)
    wide = 3 * k
    p, q = (x.detach().double() for x in checked_pair(x_p, x_q, 8 * k, ("p", "q"), vary=True))
    n, d, m = len(p), p.shape[1], len(q)
    keep = 2 * wide + _EXTRA
    rho, near_p = nearest(p, p, min(keep, n - 1), without=torch.arange(n, device=p.device))
    nu, near_q = nearest(p, q, min(keep, m))
    ties = float(((rho[:, 0] == 0) | (nu[:, 0] == 0)).double().mean())
    rho, nu = _beyond_ties(rho, p), _beyond_ties(nu, p)

    def mean_log(first: Tensor, second: Tensor, own: Tensor | None = None) -> Tensor:
        logs = torch.log(second) - torch.log(first)
        return d * (logs.mean() if own is None else logs[own].mean())

    value = float(mean_log(rho[:, k - 1], nu[:, k - 1])) + math.log(m / (n - 1))
    drift = float(mean_log(rho[:, wide - 1], nu[:, wide - 1])) + math.log(m / (n - 1)) - value
    stream = seeds.generator(seed, "neighbours/halves")
    halves = []
    for _ in range(_HALVES):
        gone_p = (torch.randperm(n, generator=stream) < n // 2).to(p.device)
        gone_q = (torch.randperm(m, generator=stream) < m // 2).to(q.device)
        kept = [
            mean_log(
                _kth_of_others(rho, gone_p[near_p], rank),
                _kth_of_others(nu, gone_q[near_q], rank),
                ~gone_p,
            )
            for rank in (k, wide)
        ]
        halves.append(torch.stack(kept).cpu())  # less a constant
    values = torch.stack(halves)
    stderr, drift_error = float(values[:, 0].std()), float((values[:, 1] - values[:, 0]).std())
    growth = 3.0 ** (1.0 / d) - 1.0  # of the bias, from k to 3k
    bias, bias_error = drift / growth, drift_error / growth
    biased = abs(drift) > 2.0 * drift_error and abs(bias) > stderr
    warning = _warning(d, min(n, m), k, ties, rho, nu, bias if biased else None)
    return Estimate(value, math.nan if warning else math.hypot(stderr, bias, bias_error), min(n, m), warning)


def _warning(d: int, n: int, k: int, ties: float, rho: Tensor, nu: Tensor, bias: float | None) -> str | None:
    far = (k / n) ** (2.0 / d)
    beyond = _share_beyond(nu, d)
    return joined(
        f"{ties:.0%} of the samples coincide with others: there is no density to compare"
        if ties > _TIES
        else None,
        f"{n} samples are too few for nearest neighbors in {d} dimensions: the bias is not known"
        if far > _LOCAL
        else None,
        f"{beyond:.1%} of the samples of p lie outside those of q: their contribution is not known"
        if beyond > _BEYOND
        else None,
        "no sample of q is near the samples of p: KL may be infinite"
        if bool((nu[:, 0] > rho[:, -1]).all())
        else None,
        f"biased by about {bias:.2g}, as three times as many neighbors show" if bias is not None else None,
    )


def _share_beyond(nu: Tensor, d: int) -> float:
    """The share of samples of p that have all their nearest samples of q at about one distance.

    Where q has a density, the volumes within the distances to its w nearest samples are those of uniform
    draws, so (nu_1 / nu_w)^d is the least of w - 1 of them, above u with probability (1 - u)^(w - 1). Beyond
    the last samples of q even the nearest one is far, and it is near 1.
    """
    ring = min(_RING, nu.shape[1])
    bound = 1.0 - _CHANCE ** (1.0 / (ring - 1))
    return float(((nu[:, 0] / nu[:, ring - 1]) ** d > bound).double().mean())


def _kth_of_others(distances: Tensor, gone: Tensor, k: int) -> Tensor:
    """The k-th smallest of each sorted row among those not gone; the largest known where too few are left."""
    rank = (~gone).cumsum(1)
    first = (rank >= k).int().argmax(1)  # 0 where none is; the k-th itself is never beyond it
    enough = rank[:, -1] >= k
    chosen = torch.where(enough, first, torch.full_like(first, distances.shape[1] - 1))
    return distances.gather(1, chosen[:, None]).squeeze(1)


def _beyond_ties(distances: Tensor, x: Tensor) -> Tensor:
    """Replaces distances of zero by the smallest that is not: of the row, or of all if the row has none."""
    positive = torch.where(distances > 0, distances, torch.full_like(distances, math.inf))
    smallest = positive.min(1, keepdim=True).values
    overall = positive.min()
    if not bool(overall.isfinite()):
        # Every neighbor kept is a copy: any positive length will do, the warning says the rest.
        overall = x.std(0).norm() * torch.finfo(x.dtype).eps
    smallest = torch.where(smallest.isfinite(), smallest, overall)
    return torch.where(distances > 0, distances, smallest)
