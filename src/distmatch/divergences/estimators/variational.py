"""Lower bounds of divergences from samples alone: a critic is trained, its bound taken on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_name
from distmatch.base.errors import UserError, unknown_name
from distmatch.base.samples import checked_pair
from distmatch.divergences import NAMES, Divergence, divergence
from distmatch.divergences.estimators.bounds import (
    chi_square_bound,
    donsker_varadhan_bound,
    f_gan_bound,
    f_gan_terms,
    nwj_bound,
)
from distmatch.divergences.estimators.critic import Critic, Objective, Training, ascend, logistic, split
from distmatch.divergences.estimators.results import LowerBound, joined

DONSKER_VARADHAN = "donsker_varadhan"
NWJ = "nwj"
CHI_SQUARE = "chi_square"
BOUNDS = (DONSKER_VARADHAN, NWJ, CHI_SQUARE)
"""Named bounds, in addition to the f-GAN bound of every divergence."""

Pair = tuple[Tensor, Tensor]

_LEAST = 30  # samples of p and of q: fewer cannot be split in three
_CLEAR = (
    4.0  # standard errors by which training samples must show something before it counts as learnt by heart
)
_LASTING = 1 / 3  # and the part of it that other samples must fall short of
_NEAR = 3.0  # a bound within this many standard errors of 0 is near 0
_SCALES = (*(0.05 * i for i in range(26)), 1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class VariationalEstimator:
    """A divergence from samples of p and q, as a lower bound by a critic trained for it.

    Half of the samples train the critic, a sixth is for early stopping and for scaling its log-ratio by the
    best factor between 0 and 5, and the last third, used for neither, gives the bound and its standard error.
    The three parts must be independent: samples that occur more than once make the bound too large.

    Attributes:
        bound: A divergence or its name for the f-GAN bound, ``"donsker_varadhan"`` or ``"nwj"`` for
            KL(p || q), or ``"chi_square"`` for Pearson's chi-square by Hammersley, Chapman and Robbins.
        train_on: ``"bound"`` warms the critic up as a classifier and then maximizes the bound itself, which
            is tighter where the critic cannot be perfect; ``"classification"`` leaves it a classifier, which
            is steadier. Total variation, whose bound has no gradient, is always trained as a classifier.
        training: The network and its training.
    """

    bound: str | Divergence = "js"
    train_on: Literal["bound", "classification"] = "bound"
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not (isinstance(self.bound, str) and self.bound in BOUNDS):
            try:
                divergence(self.bound)
            except UserError as error:
                if isinstance(self.bound, str) and ":" in self.bound:
                    raise
                raise unknown_name("bound", self.bound, [*BOUNDS, *NAMES]) from error
        check_name("training objective", self.train_on, ["bound", "classification"])

    def fit(self, x_p: Tensor, x_q: Tensor, seed: int = 0) -> LowerBound:
        """Trains a critic and estimates its bound.

        Args:
            x_p: Samples of p, (n,) or (n, *shape), at least 30.
            x_q: Samples of q, (m,) or (m, *shape), likewise, on the same device.
            seed: Fixes the split, the initial weights and the batches.

        Returns:
            The bound in nats; its standard error is for the critic found; n is the number of test samples.
            There is a warning where the samples support only a part of the critic's log-ratio, and where it
            may have missed a difference: in many dimensions, or when it has memorized its training samples.

        Raises:
            UserError: The samples cannot be used, see the message.
        """
        critic, test_p, test_q = self.train(x_p, x_q, seed)
        return self.evaluate(critic, test_p, test_q)

    def train(self, x_p: Tensor, x_q: Tensor, seed: int = 0) -> tuple[Critic, Tensor, Tensor]:
        """Trains a critic; returns it with the samples of p and of q that it has not seen.

        Args:
            x_p: As for :meth:`fit`.
            x_q: As for :meth:`fit`.
            seed: As for :meth:`fit`.
        """
        critic, train, validation, test = _classifier(x_p, x_q, seed, self.training)
        objective = self._objective()
        if objective is not None:
            # From a trained classifier small steps are enough, and large ones can throw it away.
            how = replace(self.training, lr=0.2 * self.training.lr)
            ascend(critic, objective, train, validation, how, seeds.generator(seed, "critic/bound"))
        _set_scale(critic, self._bound, critic.at(validation[0]), critic.at(validation[1]))
        critic.eval().requires_grad_(False)
        return critic, *test

    def evaluate(self, critic: Critic, x_p: Tensor, x_q: Tensor) -> LowerBound:
        """The bound of a trained critic on held-out samples.

        Args:
            critic: From :meth:`train`.
            x_p: Held-out samples of p, (n, d).
            x_q: Held-out samples of q, (m, d).
        """
        return _said(critic, self._bound(critic.at(x_p), critic.at(x_q)))

    def _bound(self, log_r_p: Tensor, log_r_q: Tensor) -> LowerBound:
        if self.bound == DONSKER_VARADHAN:
            return donsker_varadhan_bound(log_r_p, log_r_q)
        if self.bound == NWJ:
            return nwj_bound(1.0 + log_r_p, 1.0 + log_r_q)
        if self.bound == CHI_SQUARE:
            top = torch.maximum(log_r_p.max(), log_r_q.max())  # a factor changes nothing
            return chi_square_bound(torch.exp(log_r_p - top), torch.exp(log_r_q - top))
        return f_gan_bound(self.bound, log_r_p, log_r_q)

    def _objective(self) -> Objective | None:
        """What the second phase makes large; None where there is no second phase."""
        if self.train_on == "classification":
            return None
        if self.bound == DONSKER_VARADHAN:
            return lambda p, q: p.mean() - (torch.logsumexp(q, 0) - math.log(len(q)))
        # Raising the bound of Pearson's chi-square that is linear in the means raises the quotient as well.
        names = {NWJ: "kl", CHI_SQUARE: "pearson"}
        measure = divergence(names.get(self.bound, self.bound) if isinstance(self.bound, str) else self.bound)
        if not measure.differentiable:
            return None

        def f_gan(on_p: Tensor, on_q: Tensor) -> Tensor:
            from_p, from_q = f_gan_terms(measure, on_p, on_q)
            return from_p.mean() + from_q.mean()

        return f_gan


def _classifier(x_p: Tensor, x_q: Tensor, seed: int, how: Training) -> tuple[Critic, Pair, Pair, Pair]:
    """A critic trained as a classifier, and the training, validation and test parts of the samples."""
    first, second = (x.detach() for x in checked_pair(x_p, x_q, _LEAST, ("p", "q"), vary=True))
    stream = seeds.generator(seed, "critic/split")
    train, validation, test = zip(split(first, stream), split(second, stream), strict=True)
    critic = Critic(torch.cat(train), how.width, seed)
    ascend(critic, logistic, train, validation, how, seeds.generator(seed, "critic/batches"))
    critic.blind = _blindness(critic, train, validation)
    return critic, train, validation, test


def _blindness(critic: Critic, train: Pair, validation: Pair) -> str | None:
    """Why a bound near 0 would not mean that p and q are alike, or None."""
    n, d = min(len(x) for x in train), train[0].shape[1]
    seen, held_out = (f_gan_bound("js", critic.at(p), critic.at(q)) for p, q in (train, validation))
    if held_out.value > _NEAR * held_out.stderr:
        return None
    if d * (d + 3) // 2 > n:  # the coefficients of a quadratic critic, which a change of spread needs
        return f"{n} training samples are too few to detect every difference in {d} dimensions"
    if seen.value > _CLEAR * seen.stderr and held_out.value < _LASTING * seen.value:
        return (
            f"the critic has memorized its {n} training samples (JS {seen.value:.2g} there, "
            f"{held_out.value:.2g} on others)"
        )
    return None


def _set_scale(
    critic: Critic, bound: Callable[[Tensor, Tensor], LowerBound], on_p: Tensor, on_q: Tensor
) -> None:
    """Scales the log-ratios by the factor with the largest bound less its error among the reliable ones.

    Less its error, because a bound that rests on a few lucky samples is large only on those. With factor 0
    both are 0, so there is always one. Where a bound that is not reliable would be clearly larger, the
    samples do not support the critic's log-ratio, and ``critic.capped`` is set.
    """
    found = [(bound(scale * on_p, scale * on_q), scale) for scale in _SCALES]
    finite = [(b.value - b.stderr, b, scale) for b, scale in found if math.isfinite(b.value - b.stderr)]
    _, best, critic.scale = max((f for f in finite if f[1].reliable), key=lambda f: f[0])
    critic.capped = max(f[0] for f in finite) > best.value + best.stderr


def _said(critic: Critic, found: LowerBound) -> LowerBound:
    """Adds a warning to a bound whose critic was scaled down, or found almost nothing."""
    held = (
        f"the number of samples supports only {critic.scale:.2g} times the critic's log-ratio: the "
        f"divergence may be "
        "far above this bound"
    )
    nothing = f"{critic.blind}: a bound near 0 is uninformative about the divergence"
    near_zero = critic.blind is not None and not found.value > _NEAR * found.stderr
    warning = joined(found.warning, held if critic.capped else None, nothing if near_zero else None)
    return replace(found, warning=warning)


def classifier_estimates(
    x_p: Tensor,
    x_q: Tensor,
    which: Iterable[str | Divergence] = NAMES,
    *,
    seed: int = 0,
    training: Training | None = None,
) -> dict[str, LowerBound]:
    """Lower bounds of many divergences from one classifier between samples of p and of q.

    The classifier is trained once; for each divergence its logit is scaled by the factor that is best on the
    validation part, and the bound is taken on the test part (:func:`classifier_bound`).

    Args:
        x_p: Samples of p, (n,) or (n, *shape), at least 30.
        x_q: Samples of q, (m,) or (m, *shape), likewise.
        which: Divergences or their names.
        seed: Fixes the split, the initial weights and the batches.
        training: The network and its training.

    Returns:
        One bound for each name.

    Raises:
        UserError: The samples cannot be used, or there is no such divergence.
    """
    measures = [divergence(w) for w in which]
    critic, _, validation, test = _classifier(x_p, x_q, seed, training or Training())
    chosen_p, chosen_q = critic.at(validation[0]), critic.at(validation[1])
    on_p, on_q = critic.at(test[0]), critic.at(test[1])
    bounds = {}
    for measure in measures:
        bound = partial(f_gan_bound, measure)
        _set_scale(critic, bound, chosen_p, chosen_q)
        bounds[measure.name] = _said(critic, bound(critic.scale * on_p, critic.scale * on_q))
    return bounds
