"""The metrics of a pair of blocks of features, their errors, and doubts about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import metric_of
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.kid import cmmd_replicates, kid_replicates
from distmatch.metrics.memorization import memorization_replicates
from distmatch.metrics.prdc import prdc_replicates
from distmatch.metrics.resampling import COPIES, half_sample_stderr, jackknife_stderr, repeats
from distmatch.metrics.settings import GROUPS, K_COVERAGE, K_PRECISION
from distmatch.metrics.vendi import vendi_replicates
from distmatch.metrics.within_class import class_distance_replicates

_SHARES = ("precision", "recall", "density", "coverage")
_COPIES = ("authentic", "memorized")
_FAR_OUT = 0.05  # how far value and error may exceed [0, 1]: near its ends this is acceptable


def replicate_stderr(name: str, replicates: Tensor) -> float:
    """The standard error of a metric, or of any linear combination of models' values of it.

    Args:
        name: The metric, which determines how samples are left out.
        replicates: (2, R) as in :class:`~distmatch.metrics.evaluate.Evaluation`, or a linear combination of
            such tables.
    """
    return float(_stderr(name, replicates.T).square().sum().sqrt()) / len(replicates)


def _stderr(name: str, replicates: Tensor) -> Tensor:
    rule = half_sample_stderr if metric_of(name) in _SHARES + _COPIES else jackknife_stderr
    return rule(replicates)


def block_replicates(
    generated: Tensor, real: Tensor, labels: tuple[Tensor, Tensor] | None = None, *, both_ways: bool = False
) -> dict[str, Tensor]:
    """All metrics of one pair of blocks: (R,) each, the value on all samples first.

    Args:
        generated: Features (N, D).
        real: Features (N, D).
        labels: Classes of both, int64 (N,) each, for what is measured within them; None without.
        both_ways: Whether metrics that have a direction are averaged over both; not the distances within
            classes, whose errors would cancel.
    """

    def shares(x: Tensor, y: Tensor) -> Tensor:
        neighbors = {"k_precision": K_PRECISION, "k_coverage": K_COVERAGE}
        counted = prdc_replicates(y, x, halves=True, **neighbors)
        return torch.cat([counted, memorization_replicates(y, x, halves=True)], 1)

    counted, diversity = shares(generated, real), vendi_replicates(generated, GROUPS)
    if both_ways:
        counted = (counted + shares(real, generated)) / 2
        diversity = (diversity + vendi_replicates(real, GROUPS)) / 2
    found = {
        "fd": frechet_replicates(generated, real, GROUPS),
        "kid": kid_replicates(generated, real, GROUPS),
        "mmd": cmmd_replicates(generated, real, GROUPS),
        **dict(zip(_SHARES, counted.unbind(1), strict=False)),
        "vendi": diversity,
        **dict(zip(_COPIES, counted.unbind(1)[len(_SHARES) :], strict=True)),
    }
    if labels is not None:
        within = class_distance_replicates(generated, labels[0], real, labels[1], GROUPS)
        if bool(within.isfinite().all()):
            found["class_distance"] = within
    return found


def block_estimates(
    blocks: Sequence[dict[str, Tensor]], real: Sequence[Tensor], size: int, features: str = ""
) -> dict[str, Estimate]:
    """The mean over independent pairs of blocks, with warnings where balls of neighbors mean little.

    Args:
        blocks: From :func:`block_replicates`, one for each pair.
        real: The real features of each.
        size: Samples in a block.
        features: What the features are called beside each number.
    """
    found = {}
    for name in blocks[0]:
        if all(name in block for block in blocks):
            table = torch.stack([block[name] for block in blocks])
            error = replicate_stderr(name, table)
            found[name] = Estimate(float(table[:, 0].mean()), error, size, features=features)
    share = sum(map(repeats, real)) / len(real)
    copies = (
        f"{share:.0%} of the reference samples repeat others: many nearest-neighbor balls have radius "
        f"zero, and only copies fall into them"
        if share > COPIES
        else None
    )
    for name in _SHARES:
        why = [copies, _unstable(name, found[name], torch.cat([block[name][1:] for block in blocks]))]
        if any(why):
            found[name] = replace(found[name], warning="; ".join(w for w in why if w))
    return found


def _unstable(name: str, found: Estimate, halves: Tensor) -> str | None:
    """Why an estimate cannot be read as value and error, or None.

    An error that reaches far out of [0, 1] comes from halves that say something else than the whole: radii of
    nearest-neighbor balls that a few samples decide. Density may exceed 1, so that its lower end counts.
    """
    room = found.value if name == "density" else min(found.value, 1 - found.value)
    if found.stderr <= room + _FAR_OUT:
        return None
    low, high = float(halves.min()), float(halves.max())
    return (
        f"unstable: halves of the samples give {low:.2g} to {high:.2g}, since a few of them determine "
        f"the large balls. Do not interpret it as value and error"
    )
