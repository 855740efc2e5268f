"""The protocol: a model and the reference itself, measured in the same way at the same number of samples.

The reference is split by the seed into disjoint blocks A and B of N samples, the generated set into G1 and
G2. A metric of the model is the mean over (G1, A) and (G2, B); the floor is the metric between A and B. So
both have the same finite-sample bias, and a model as good as new data reaches the floor up to noise. Blocks
stratified by label differ less than independent samples do, so a ``kid`` below zero is then expected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import batch_of, check_finite, check_one_each
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import key_in
from distmatch.base.ranks import ALONE, Ranks
from distmatch.metrics.blocks import block_estimates, block_replicates
from distmatch.metrics.chosen import Chosen
from distmatch.metrics.features import Features
from distmatch.metrics.modes import Mixture, mode_counts, smoothed_share
from distmatch.metrics.reference import Reference, labels_of_rows, reference_rows, stratified_order
from distmatch.metrics.settings import plan
from distmatch.metrics.spaces import FeatureChoice, resolve_features
from distmatch.metrics.video import frames_of, motion, video_estimates


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

    ``fd``, ``kid`` and ``mmd`` are better small; ``precision``, ``density`` (fidelity), ``recall``,
    ``coverage``, ``vendi``, ``class_distance`` (diversity), ``authentic`` and ``memorized`` (copies)
    should reach :func:`reference_floor`. Standard errors are from a jackknife over ten groups in each
    block, those of shares of samples from seven halvings. At a model equal to the reference they are
    conservative for ``fd``, ``kid`` and ``mmd``, whose first derivative vanishes there.

    Where the reference is a table with words or whole numbers, samples are measured as rows of such a table
    (:meth:`~distmatch.data.Dataset.as_rows`): no value between two words would ever be written.

    Args:
        x: Generated samples (M, *shape), floating, in model space ([-1, 1] for images); or a data set of
            them, of which a part at a time is in memory.
        reference: The reference set, or a tensor like ``x``.
        labels: The requested labels (M,), -1 for none. With them all blocks are stratified, and
            ``label_accuracy`` is the share that the classifier predicts. Ask for labels in the shares of the
            reference (:func:`reference_labels`): other shares are a difference that ``fd`` and ``kid`` see.
        features: ``"auto"``, ``"classifier"``, ``"pixels"``, a pretrained network, several names with commas,
            ready :class:`Features`, or a function.
        n: Upper bound for the block size; 5000 by default. Values at different block sizes do not compare.
        seed: Chooses the blocks.
        mixture: The exact mixture behind the reference; adds ``modes``, ``kl``, ``reverse_kl``, ``js``.
        ranks: Processes that call this together, with the same samples, and share the work.

    Returns:
        Estimates under ``fd``, ``kid``, ``mmd``, ``precision``, ``recall``, ``density``, ``coverage``,
        ``vendi``, ``authentic``, ``memorized``, and with labels ``class_distance``, with ``n`` the block
        size; in further feature spaces under ``fd@NAME`` and so on. Where they apply ``label_accuracy``
        and the four mode keys, with ``n`` both blocks together; of video ``frame_fd`` and ``motion`` as well
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
    both = (None if labels is None else labels[order], labels_of_rows(reference, samples.rows))
    classes = tuple(side.split(size) for side in both if side is not None) if labels is not None else ()
    result: dict[str, Estimate] = {}
    replicates: dict[str, Tensor] = {}
    for own in (space, *space.also):
        generated, real = (
            _features(own, side, where, chosen.device).split(size) for side in (chosen, samples)
        )
        labeled = zip(*classes, strict=True) if len(classes) == 2 else [None] * len(real)
        blocks = [block_replicates(*pair) for pair in zip(generated, real, labeled, strict=True)]
        names = {
            name: key_in(name, own.name if own is not space else "")
            for name in blocks[0]
            if all(name in block for block in blocks)
        }
        found = block_estimates(blocks, real, size, own.label)
        result |= {names[name]: value for name, value in found.items()}
        replicates |= {key: torch.stack([b[name] for b in blocks]).cpu() for name, key in names.items()}
    judge = next((own for own in (space, *space.also) if own.classify is not None), None)
    if labels is not None and judge is not None:
        asked = labels[order]
        right = (chosen.map(lambda part, _: judge.predict(part)).cpu() == asked)[asked >= 0]
        if len(right):
            found_share = smoothed_share(float(right.sum()), len(right))
            result["label_accuracy"] = replace(found_share, features=judge.label)
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
    labels = labels_of_rows(reference, samples.rows) if stratified else None
    classes = None if labels is None else (labels[:size], labels[size:])
    result: dict[str, Estimate] = {}
    for own in (space, *space.also):
        first, second = _features(own, samples, where, samples.device).split(size)
        block = block_replicates(first, second, classes, both_ways=True)
        found = block_estimates([block], (first, second), size, own.label)
        result |= {key_in(name, own.name if own is not space else ""): value for name, value in found.items()}
    judge = next((own for own in (space, *space.also) if own.heldout_accuracy is not None), None)
    if judge is not None and judge.heldout_accuracy is not None:
        result["label_accuracy"] = judge.heldout_accuracy
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
