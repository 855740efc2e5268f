"""The protocol: a model and the reference itself, measured in the same way at the same number of samples.

The reference is split by the seed into disjoint blocks A and B of N samples, the generated set into G1 and
G2. A metric of the model is the mean over (G1, A) and (G2, B); the floor is the metric between A and B. So
both have the same finite-sample bias, and a model as good as new data reaches the floor up to noise. Blocks
stratified by label differ less than independent samples do, so a ``kid`` below zero is then expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import batch_of, check_finite, check_one_each
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.ranks import ALONE, Ranks
from distmatch.metrics.chosen import Chosen
from distmatch.metrics.features import Features
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.kid import kid_replicates
from distmatch.metrics.modes import Mixture, mode_counts, smoothed_share
from distmatch.metrics.prdc import prdc_replicates
from distmatch.metrics.reference import Reference, reference_rows, stratified_order
from distmatch.metrics.resampling import COPIES, half_sample_stderr, jackknife_stderr, repeats
from distmatch.metrics.settings import GROUPS, K_COVERAGE, K_PRECISION, plan
from distmatch.metrics.spaces import FeatureChoice, resolve_features
from distmatch.metrics.vendi import vendi_replicates
from distmatch.metrics.video import frames_of, motion, video_estimates

_NAMES = ("fd", "kid", "precision", "recall", "density", "coverage", "vendi")
_HALVED = ("precision", "recall", "density", "coverage")
_FAR_OUT = 0.05  # how far value and error may exceed [0, 1]: near its ends this is acceptable


@dataclass(frozen=True)
class Evaluation:
    """Estimates, and the values on parts of the samples that their errors come from.

    Attributes:
        estimates: As :func:`evaluate` gives them.
        replicates: By metric (2 blocks, R): the value on the whole block, then those on parts of it. Two
            models that were sampled with the same labels from the same initial noise have the same samples
            left out in the same column, so that differences of replicates give the error of the difference.
    """

    estimates: dict[str, Estimate]
    replicates: dict[str, Tensor]


def replicate_stderr(name: str, replicates: Tensor) -> float:
    """The standard error of a metric, or of any linear combination of models' values of it.

    Args:
        name: The metric, which determines how samples are left out.
        replicates: (2, R) as in :class:`Evaluation`, or a linear combination of such tables.
    """
    rule = half_sample_stderr if name in _HALVED else jackknife_stderr
    return float(rule(replicates.T).square().sum().sqrt()) / len(replicates)


def evaluate(
    x: Reference | Tensor,
    reference: Reference | Tensor,
    *,
    labels: Tensor | None = None,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
    mixture: Mixture | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Estimate]:
    """Measures generated samples against a reference.

    ``fd`` and ``kid`` are better small; ``precision``, ``density`` (fidelity), ``recall``, ``coverage`` and
    ``vendi`` (diversity) should reach :func:`reference_floor`. Standard errors are from a jackknife over ten
    groups in each block, those of precision, recall, density and coverage from seven halvings. At a model
    equal to the reference they are conservative for ``fd`` and ``kid``, whose first derivative vanishes
    there.

    Where the reference is a table with words or whole numbers, samples are measured as rows of such a table
    (:meth:`~distmatch.data.Dataset.as_rows`): no value between two words would ever be written.

    Args:
        x: Generated samples (M, *shape), floating, in model space ([-1, 1] for images); or a data set of
            them, of which a part at a time is in memory.
        reference: The reference set, or a tensor like ``x``.
        labels: The requested labels (M,), -1 for none. With them all blocks are stratified, and
            ``label_accuracy`` is the share that the classifier predicts. Ask for labels in the shares of the
            reference (:func:`reference_labels`): other shares are a difference that ``fd`` and ``kid`` see.
        features: ``"auto"``, ``"classifier"``, ``"pixels"``, ready :class:`Features`, or a function.
        n: Upper bound for the block size; 5000 by default. Values at different block sizes do not compare.
        seed: Chooses the blocks.
        mixture: The exact mixture behind the reference; adds ``modes``, ``kl``, ``reverse_kl``, ``js``.
        ranks: Processes that call this together, with the same samples, and share the work.

    Returns:
        Estimates under ``fd``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage``, ``vendi`` with
        ``n`` the block size, and where they apply ``label_accuracy`` and the four mode keys, with ``n`` both
        blocks together; of video ``frame_fd`` and ``motion`` as well
        (:func:`~distmatch.metrics.video.video_estimates`).

    Raises:
        UserError: Too few samples, another shape than the reference, or values that are not finite.
    """
    chosen = {"labels": labels, "features": features, "n": n, "seed": seed, "mixture": mixture}
    return evaluate_replicates(x, reference, **chosen, ranks=ranks).estimates  # type: ignore[arg-type]


def evaluate_replicates(
    x: Reference | Tensor,
    reference: Reference | Tensor,
    *,
    labels: Tensor | None = None,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
    mixture: Mixture | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """:func:`evaluate` with the replicates, for models that are to be compared with each other."""
    _check(x, reference, labels)
    space = resolve_features(features, None if isinstance(reference, Tensor) else reference)
    size = plan(reference, len(x), features=space, n=n, seed=seed).n
    if labels is not None:
        labels = labels.to("cpu", torch.int64)
    order = stratified_order(labels, len(x), seeds.generator(seed, "evaluate/generated"))[: 2 * size]
    chosen = Chosen(x, order, partial(_check_finite, name="x"), reference, ranks)
    samples = _real(reference, size, seed, stratified=labels is not None, ranks=ranks)
    where = _device(chosen.device)
    generated, real = (_features(space, side, where, chosen.device).split(size) for side in (chosen, samples))
    blocks = [_replicates(g, r) for g, r in zip(generated, real, strict=True)]
    result = _doubtful(_combine([_summary(block) for block in blocks], size), blocks, real)
    if labels is not None and space.classify is not None:
        asked = labels[order]
        right = (chosen.map(lambda part, _: space.predict(part)).cpu() == asked)[asked >= 0]
        if len(right):
            result["label_accuracy"] = smoothed_share(float(right.sum()), len(right))
    replicates = {name: torch.stack([block[name] for block in blocks]).cpu() for name in _NAMES}
    extra = _mode_estimates(chosen, mixture)
    if len(_shape(x)) == 4:
        frames = [frames_of(side, size).to(where).split(size) for side in (chosen, samples)]
        extra |= video_estimates(_motion(chosen), zip(*frames, strict=True))
    return Evaluation(result | extra, replicates)


def reference_floor(
    reference: Reference | Tensor,
    *,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
    mixture: Mixture | None = None,
    stratified: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Estimate]:
    """What fresh data would score: the metrics between the two blocks of the reference.

    Metrics that have a direction are averaged over both. ``label_accuracy`` is the accuracy of the classifier
    on the reference samples held out from its training.

    Args:
        reference: The reference set.
        features: As in :func:`evaluate`.
        n: Upper bound for the block size; give the ``n`` of the models (see :func:`plan`) to compare with
            them.
        seed: As in :func:`evaluate`.
        mixture: As in :func:`evaluate`.
        stratified: Whether both blocks get the same share of every label, as for models evaluated with
            ``labels``. Set it to False to compare with models evaluated without: their shares vary by chance,
            and so must those of the blocks.
        ranks: As in :func:`evaluate`.

    Returns:
        Estimates under the keys of :func:`evaluate`.

    Raises:
        UserError: The reference has too few samples or values that are not finite.
    """
    space = resolve_features(features, None if isinstance(reference, Tensor) else reference)
    size = plan(reference, features=space, n=n, seed=seed).n
    samples = _real(reference, size, seed, stratified=stratified, ranks=ranks)
    where = _device(samples.device)
    first, second = _features(space, samples, where, samples.device).split(size)
    block = _replicates(first, second, both_ways=True)
    result = _doubtful(_combine([_summary(block)], size), [block], (first, second))
    if space.heldout_accuracy is not None:
        result["label_accuracy"] = space.heldout_accuracy
    result |= _mode_estimates(samples, mixture)
    if len(_shape(reference)) == 4:
        frames = frames_of(samples, size).to(where).split(size)
        result |= video_estimates(_motion(samples), [(frames[0], frames[1])])
    return result


def _device(device: torch.device) -> torch.device:
    """Where the statistics run: on the device of the samples, except where float64 does not exist."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _features(space: Features, samples: Chosen, to: torch.device, computed: torch.device) -> Tensor:
    return samples.map(lambda part, _: space(part.to(computed)).to(to))


def _motion(clips: Chosen) -> Tensor:
    return clips.map(lambda part, _: motion(part))


def _shape(x: Reference | Tensor) -> tuple[int, ...]:
    """Shape of one sample."""
    return tuple(x.shape[1:]) if isinstance(x, Tensor) else tuple(x.shape)


def _replicates(generated: Tensor, real: Tensor, *, both_ways: bool = False) -> dict[str, Tensor]:
    """All metrics of one pair of blocks: (R,) each, the value on all samples first."""

    def shares(x: Tensor, y: Tensor) -> Tensor:
        return prdc_replicates(y, x, halves=True, k_precision=K_PRECISION, k_coverage=K_COVERAGE)

    counted, diversity = shares(generated, real), vendi_replicates(generated, GROUPS)
    if both_ways:
        counted = (counted + shares(real, generated)) / 2
        diversity = (diversity + vendi_replicates(real, GROUPS)) / 2
    smooth = [frechet_replicates(generated, real, GROUPS), kid_replicates(generated, real, GROUPS), diversity]
    return dict(zip(("fd", "kid", "vendi", *_HALVED), [*smooth, *counted.unbind(1)], strict=True))


def _summary(replicates: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The values of one pair of blocks and their standard errors, (7,) each, in the order of the names."""
    errors = [
        half_sample_stderr(replicates[k]) if k in _HALVED else jackknife_stderr(replicates[k]) for k in _NAMES
    ]
    return torch.stack([replicates[k][0] for k in _NAMES]), torch.stack(errors)


def _combine(pairs: list[tuple[Tensor, Tensor]], size: int) -> dict[str, Estimate]:
    """The mean over independent pairs of blocks."""
    values = torch.stack([v for v, _ in pairs]).mean(0).tolist()
    errors = (torch.stack([e for _, e in pairs]).square().sum(0).sqrt() / len(pairs)).tolist()
    return {name: Estimate(v, e, size) for name, v, e in zip(_NAMES, values, errors, strict=True)}


def _doubtful(
    found: dict[str, Estimate], blocks: Sequence[dict[str, Tensor]], real: Sequence[Tensor]
) -> dict[str, Estimate]:
    """The estimates, with warnings where one is unstable or nearest-neighbor balls mean little."""
    share = sum(map(repeats, real)) / len(real)
    copies = (
        f"{share:.0%} of the reference samples repeat others: many nearest-neighbor balls have radius "
        f"zero, and only copies fall into them"
        if share > COPIES
        else None
    )
    result = dict(found)
    for name in _HALVED:
        why = [copies, _unstable(name, found[name], torch.cat([block[name][1:] for block in blocks]))]
        if any(why):
            result[name] = replace(found[name], warning="; ".join(w for w in why if w))
    return result


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


def _mode_estimates(samples: Chosen, mixture: Mixture | None) -> dict[str, Estimate]:
    if mixture is None:
        return {}
    report = mode_counts(samples.all().to(_device(samples.device)), mixture)
    return {"modes": report.modes, "kl": report.kl, "reverse_kl": report.reverse_kl, "js": report.js}


def _real(reference: Reference | Tensor, size: int, seed: int, *, stratified: bool, ranks: Ranks) -> Chosen:
    """Blocks A and B, one after the other."""
    rows = reference_rows(reference, 2 * size, seed, stratified=stratified)
    return Chosen(reference, rows, partial(_check_finite, name="the reference"), ranks=ranks)


def _check_finite(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise UserError(
            f"{name} must be floating point",
            got=x.dtype,
            expected="model space: [-1, 1] for images",
            fix="for uint8 images use x.float() / 127.5 - 1",
        )
    fix = "look for divergence in the log of the run, or remove these samples deliberately"
    check_finite(f"the samples of {name}", x, fix=fix)


def _check(x: Reference | Tensor, reference: Reference | Tensor, labels: Tensor | None) -> None:
    shape = _shape(reference)
    if _shape(x) != shape:
        raise UserError(
            "the samples have another shape than the reference",
            got=(len(x), *_shape(x)),
            expected=batch_of(shape, "M"),
            fix="evaluate against the data the model was trained on",
        )
    if isinstance(x, Tensor):
        _check_finite(x, "x")
    if labels is not None:
        check_one_each("label", labels, len(x))
