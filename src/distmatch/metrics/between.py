"""Two sets of samples against each other: every divergence and discrepancy that samples alone can give.

The first set is p, the target of the second, q: data and samples, or teacher and student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.base.samples import checked_pair
from distmatch.data.columns import decoded, is_coded
from distmatch.data.dataset import Dataset
from distmatch.discrepancies import KERNELS
from distmatch.divergences import Divergence, Renyi, divergence, measure
from distmatch.divergences.estimators import LowerBound, classifier_estimates, consistent
from distmatch.metrics.distances import DISTANCES, NEIGHBORS, Measured, Score, impossible, mmd_of, stein
from distmatch.metrics.names import ALL, EVERYTHING, STEIN, checked_names, in_nats, why_not
from distmatch.metrics.resampling import COPIES
from distmatch.metrics.spaces import FeatureChoice, resolve_features

MOST = 20_000
"""The most samples taken of a set; what costs more than n log n takes fewer, as its ``n`` says."""
LEAST = 8 * NEIGHBORS
"""The fewest samples of a set: what nearest neighbors need, and the classifier nearly."""
_MANY_DIMENSIONS = 32
_LINKS = ("tv", "js", "hellinger")  # bounded, so that their bounds imply others
_UNEVEN = 100.0  # a column so much wider than another rules every distance


@dataclass(frozen=True)
class Comparison:
    """What was found between p and q.

    Attributes:
        measured: By name.
        not_computed: Why a name has no value here.
        notes: Notes on the samples.
        features: The space they were compared in, '' for the given numbers.
    """

    measured: dict[str, Measured]
    not_computed: dict[str, str]
    notes: tuple[str, ...] = ()
    features: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form ``{"estimates", "not_computed", "notes"}``."""
        return {
            "estimates": {name: row.to_dict() for name, row in self.measured.items()},
            "not_computed": self.not_computed,
            "notes": list(self.notes),
        }


def compare_samples(
    x_p: Tensor,
    x_q: Tensor,
    which: str = ALL,
    *,
    seed: int = 0,
    score_p: Score | None = None,
    score_q: Score | None = None,
    quiet: bool = True,
) -> Comparison:
    """Measures how far two sets of independent samples are apart.

    All f-divergences are lower bounds from one classifier (:func:`classifier_estimates`), each raised to the
    largest that the others imply (:func:`consistent`); those that are means of logarithms are in nats, the
    others have no unit. The discrepancies are in the units of the samples. An impossible value is not
    reported; ``not_computed`` says why.

    Args:
        x_p: Samples of p, (n, *shape), at least 40, floating.
        x_q: Samples of q, (m, *shape), at least 40, on the same device.
        which: As for :func:`checked_names`.
        seed: Fixes the order of the samples and everything else that is drawn.
        score_p: The score of p, where it is known; adds ``kernel_stein`` of the samples of q.
        score_q: The score of q, which is used for ``kernel_stein`` of the samples of p when p's is not known.
        quiet: Whether to hide the progress bar.

    Raises:
        UserError: Unknown names, samples that cannot be compared, or nothing that could be computed.
    """
    names = checked_names(which)
    x_p, x_q = checked_pair(x_p, x_q, LEAST, ("p", "q"))
    p, q = (
        x[torch.randperm(len(x), generator=seeds.generator(seed, f"between/{side}")).to(x.device)][:MOST]
        for side, x in (("p", x_p), ("q", x_q))
    )
    computable = DISTANCES | {f"mmd:{kernel}": partial(mmd_of, kernel) for kernel in KERNELS}
    if score_p is not None:
        computable[STEIN] = lambda p, q, seed: stein(q, score_p, seed, "samples of q, score of p")
    elif score_q is not None:
        computable[STEIN] = lambda p, q, seed: stein(p, score_q, seed, "samples of p, score of q")
    everything = set(EVERYTHING) <= set(names)
    absent = {n: why for n in names if (why := why_not(n, p.shape[1], n in computable, everything))}
    bounded = [measure(n) for n in names if n not in computable and n not in absent]
    rest = [n for n in names if n in computable and n not in absent]
    if not bounded and not rest:
        reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise UserError(
            "none of these can be computed for these samples", got=reasons, fix="name others, or all"
        )
    found: dict[str, Measured] = {}
    with progress(len(rest) + bool(bounded), desc="divergences", enabled=not quiet, delay=1.0) as bar:
        if bounded:
            bounds, withheld = _bounds(bounded, p, q, seed)
            found |= bounds
            absent |= withheld
            bar.update(done="classifier")
        for name in rest:
            row = computable[name](p, q, seed)
            why = impossible(name, row)
            if why is None:
                found[name] = row
            else:
                absent[name] = why
            bar.update(done=name)
    return Comparison({name: found[name] for name in names if name in found}, absent, _copies(p, q))


def compare_datasets(
    p: Dataset,
    q: Dataset,
    which: str = ALL,
    *,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    score_p: Score | None = None,
    score_q: Score | None = None,
    quiet: bool = True,
) -> Comparison:
    """Measures how far two data sets are apart: vectors in their own units, images in [-1, 1].

    Args:
        p: What q should match.
        q: The other set, of the same shape.
        which: As for :func:`checked_names`.
        features: ``"auto"`` and ``"pixels"`` take the samples themselves (those of more than 1024 numbers
            are halved by averaging, but for vectors), ``"classifier"`` the inner layer of a classifier of p's
            labels. For f-divergences the latter give lower bounds as well, as no function of samples can add
            to them.
        n: Most samples of each set; 20,000 by default.
        seed: As for :func:`compare_samples`.
        device: Where to compute.
        score_p: As for :func:`compare_samples`; used with the samples themselves only.
        score_q: Likewise.
        quiet: Whether to hide the progress bar.

    Raises:
        UserError: As for :func:`compare_samples`, or p has no labels to train a classifier on.
    """
    checked_names(which)
    check_equal("the kinds or shapes of the samples", f"{p.kind}s {p.shape}", f"{q.kind}s {q.shape}")
    space = resolve_features("pixels" if features == "auto" else features, p)
    if space.also:
        raise UserError(
            "divergences are measured in one feature space", got=str(features), fix="name one of them"
        )
    raw = p.scaling.kind == "vector" and space.name == "pixels"
    sides = []
    for side, data in (("p", p), ("q", q)):
        order = torch.randperm(len(data), generator=seeds.generator(seed, f"between/{side}/chosen"))
        part = data.raw[order[: min(n or MOST, MOST)]]
        if side == "q":  # as rows of p, where p is a table: words and whole numbers, nothing between
            part = torch.from_numpy(decoded(p.columns, part.cpu().numpy()))
        if not raw:  # features are made for the range of the model, p's where it is a fitted one
            part = (p if p.scaling.kind == "vector" else data).scaling.to_model(part)
        sides.append(space(part.to(device)))
    if not raw:
        score_p = score_q = None  # those of the samples, not of what is made of them
    found = compare_samples(
        sides[0], sides[1], which, seed=seed, score_p=score_p, score_q=score_q, quiet=quiet
    )
    notes = _about_space(space.name, p.kind, sides[0]) + found.notes
    if is_coded(p.columns):
        notes = ("q is compared as rows of the table p, with words and whole numbers", *notes)
    return Comparison(found.measured, found.not_computed, notes, space.description)


def _bounds(
    which: list[Divergence | Renyi], p: Tensor, q: Tensor, seed: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Lower bounds from one classifier, consistent with one another, and why a name has none.

    Those of Renyi divergences are by way of alpha divergences.
    """
    needed = {m.name: m for m in (m.alpha if isinstance(m, Renyi) else m for m in which)}
    needed |= {name: divergence(name) for name in _LINKS}
    found = consistent(classifier_estimates(p, q, needed.values(), seed=seed))
    result, withheld = {}, {}
    for chosen in which:
        by_way = chosen.alpha if isinstance(chosen, Renyi) else chosen
        if by_way.name in found.withheld:
            withheld[chosen.name] = found.withheld[by_way.name]
            continue
        bound = found.bounds[by_way.name]
        if isinstance(chosen, Renyi):
            value = torch.tensor(bound.value, dtype=torch.float64)
            slope = float(chosen.slope(value))
            bound = LowerBound(float(chosen.from_alpha(value)), slope * bound.stderr, bound.n, bound.warning)
        largest = math.inf if isinstance(chosen, Renyi) else by_way.upper_bound
        source = found.implied.get(by_way.name)
        how = "classifier" if source is None else f"classifier, implied by {source}"
        unit = ", nats" if in_nats(chosen.name) else ""
        result[chosen.name] = Measured(bound, how, f"lower bound{unit}", largest)
    return result, withheld


def _copies(p: Tensor, q: Tensor) -> tuple[str, ...]:
    """What there is to say against samples as independent draws."""
    own_p, own_q = torch.unique(p, dim=0), torch.unique(q, dim=0)
    notes = []
    for side, x, own in (("p", p, own_p), ("q", q, own_q)):
        share = 1 - len(own) / len(x)
        if share > COPIES:
            notes.append(
                f"{share:.0%} of the samples of {side} repeat others: bounds and errors assume "
                f"independent draws and are too optimistic"
            )
    shared = len(own_p) + len(own_q) - len(torch.unique(torch.cat([own_p, own_q]), dim=0))
    if shared > COPIES * min(len(own_p), len(own_q)):
        notes.append(
            f"{shared} samples are in both sets, which are not independent then: all values are too small"
        )
    return tuple(notes)


def _about_space(space: str, kind: str, x: Tensor) -> tuple[str, ...]:
    d = x.shape[1]
    if space == "classifier":
        return (
            "the samples are compared on features of a classifier of p's labels, trained on p itself: "
            "it may ignore differences, and p-values are approximate",
        )
    notes = []
    if kind in ("image", "video") and d > _MANY_DIMENSIONS:
        notes.append(
            f"{d} pixel values per sample: this compares pixels, not image content; if p has labels, "
            f"use the classifier features"
        )
    elif d > _MANY_DIMENSIONS:
        notes.append(
            f"{d} numbers per sample: in so many dimensions a lower bound may be far below the "
            f"divergence, and a distance is insensitive to a difference in few of them"
        )
    spread = x.std(0)
    spread = spread[spread > 0]
    if kind == "vector" and len(spread) and float(spread.max() / spread.min()) > _UNEVEN:
        notes.append(
            f"the widest column of p has {float(spread.max() / spread.min()):.0f} times the standard "
            f"deviation of the narrowest and dominates every distance: divide each column by its "
            f"standard deviation if this is not intended"
        )
    return tuple(notes)
