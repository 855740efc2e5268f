"""Measuring the models of a run and writing the result into its folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.files import atomic_json, atomic_write
from distmatch.base.progress import quietly
from distmatch.base.ranks import ALONE, Ranks
from distmatch.base.seeds import generator
from distmatch.data import TOY_NAMES, Dataset, toy
from distmatch.data.classes import listed, names_of
from distmatch.data.files import CONDITION
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    ConditioningLike,
    ConditioningSpec,
    as_conditioning,
    labels_of,
)
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.interop.card import OF, refresh_card
from distmatch.metrics import evaluate, plan, reference_floor, reference_labels
from distmatch.metrics.by_prompt import prompt_estimates, prompt_floor
from distmatch.metrics.features import BATCH, Features
from distmatch.metrics.notes import marked
from distmatch.metrics.settings import MOST_IN_BLOCK
from distmatch.metrics.spaces import FeatureChoice
from distmatch.training.distill_data import check_fit
from distmatch.training.log import EventLog
from distmatch.training.models import Model
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import HEUN, SampleResult, Sampling
from distmatch.training.shared_draw import draw_shared, filled, shared_features
from distmatch.training.trackers import track_evaluation


def evaluate_models(
    data: Dataset,
    models: dict[str, Model],
    folder: RunFolder,
    *,
    features: FeatureChoice = "auto",
    n: int | None = None,
    sampling: Sampling = HEUN,
    seed: int = 0,
    device: str = "auto",
    batch: int = 1024,
    spec: str = "",
    of: str = "",
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, Any]]:
    """Measures each model at the same N on the same latents and labels, and writes what was found.

    Args:
        data: The real data.
        models: By role: ``teacher``, ``student``.
        folder: Gets ``metrics.json``, ``samples/`` and an ``evaluate`` event.
        features: As in :func:`distmatch.metrics.evaluate`.
        n: Samples in a block; None takes half the data, at most 5000.
        sampling: How a teacher is sampled.
        seed: Seed of latents, labels and blocks.
        device: Where to sample.
        batch: Samples at a time.
        spec: Name of the data; an exact mixture's name adds the mode metrics.
        of: What the data are where they are not real, such as samples of the teacher.
        ranks: The processes that do this together; the first one writes.

    Returns:
        What ``metrics.json`` holds, with :class:`Estimate` values.

    Raises:
        UserError: The models do not fit the data.
    """
    for name, model in models.items():
        if model.teacher is not None:
            sampling.check(model.teacher)
        if model.shape != tuple(data.shape):
            raise UserError(
                f"the {name} and the data do not have the same shape",
                got=f"{name} {model.shape}, data {tuple(data.shape)}",
                fix="measure against the kind of data that it was trained on",
            )
        if model.num_classes and data.labels is None:
            raise UserError(
                f"the {name} is class-conditional and the data have no labels",
                got=f"{model.num_classes} classes and unlabeled {data.name}",
                fix="give labeled data",
            )
    data = _seen_by_all(models, data)
    for model in models.values():
        check_fit(model, data)
    specs = {name: model.conditioning_spec for name, model in models.items()}
    if len({tuple(sorted(spec)) for spec in specs.values()}) > 1:
        raise UserError(
            "teacher and student have different conditioning",
            got=", ".join(f"{name}: {', '.join(sorted(spec)) or 'nothing'}" for name, spec in specs.items()),
        )
    block = min(len(data) // 2, n or MOST_IN_BLOCK)
    asked = asked_of(data, next(iter(specs.values()), {}), 2 * block, seed)
    space = shared_features(features, data, ranks)  # teacher, student and floor have one feature network

    def drawer(model: Model) -> Any:
        def draw(count: int, asked: Conditioning) -> SampleResult:
            # A model's first calls pay for memory and threads; they are not part of its speed.
            with quietly():
                model.draw(min(count, 64), asked.index(slice(64)), seed, Sampling(steps=2), device=device)

            def part(count: int, asked: Conditioning, first: int) -> SampleResult:
                how: dict[str, Any] = {"batch": batch, "device": device, "first": first}
                return model.draw(count, asked, seed, sampling, **how)

            where: dict[str, Any] = {"batch": batch, "ranks": ranks, "place": folder.samples}
            return draw_shared(part, count, asked, model.shape, **where)

        return draw

    metrics, drawn = measure_samples(
        data,
        {name: drawer(model) for name, model in models.items()},
        asked=asked,
        features=space,
        n=block,
        seed=seed,
        mixture=toy(spec) if spec in TOY_NAMES else None,
        of=of,
        ranks=ranks,
        place=folder.samples,
    )
    for name, model in models.items():
        metrics[name] = marked(metrics[name], model.student.info if model.student is not None else {})
    settings = plan(data, features=space, n=n, seed=seed).to_dict()
    fingerprint = {"fingerprint": space.fingerprint} if space.fingerprint else {}
    said = {**settings, **fingerprint, **sampling.to_dict()}
    if ranks.main:
        write_evaluation(folder, metrics, drawn, data.scaling, said, data.class_names)
    ranks.wait()
    return metrics


def _seen_by_all(models: dict[str, Model], data: Dataset) -> Dataset:
    """The data as the models know them, once it is known that they agree.

    Raises:
        UserError: They number the classes or scale the columns differently.
    """
    views = {name: model.seen(data) for name, model in models.items()}
    first, *rest = views.values()
    for other in rest:
        pairs = ((first.labels, other.labels),) if first.labels is not None else ()
        same = all(b is not None and torch.equal(a, b) for a, b in pairs)
        if not same or first.scaling != other.scaling:
            raise UserError(
                "teacher and student scale these data differently",
                got=f"classes {listed(names_of(first))} and {listed(names_of(other))}"
                if not same
                else "columns that were scaled differently",
                fix="name the teacher that the student was distilled from",
            )
    return first


def measure_samples(
    data: Dataset,
    models: dict[str, Callable[[int, Conditioning], SampleResult]],
    *,
    asked: Conditioning,
    features: str | Features = "auto",
    n: int,
    seed: int = 0,
    mixture: GaussianMixture | None = None,
    of: str = "",
    ranks: Ranks = ALONE,
    place: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, SampleResult]]:
    """Draws from each model under the same conditions and from the same noise, and measures all at one N.

    Args:
        data: The real data.
        models: ``teacher`` and ``student``: functions of (count, conditioning) that draw.
        asked: What the samples are conditioned on, see :func:`asked_of`.
        features: As in :func:`distmatch.metrics.evaluate`.
        n: Samples in a block; two blocks are drawn from each model.
        seed: Chooses blocks and labels.
        mixture: The exact mixture behind the data, for the mode metrics.
        of: What the data are where they are not real.
        ranks: The processes that measure together.
        place: A folder that all of them see.

    Returns:
        The content of ``metrics.json`` as estimates, and the samples by model, the reference's included.
    """
    labels = asked.label
    common: dict[str, Any] = {"features": features, "n": n, "seed": seed, "mixture": mixture, "ranks": ranks}
    floor = reference_floor(data, stratified=labels is not None, **common)
    about = {OF: of} if of else {}
    real = reference_samples(data, labels, 2 * n, seed, ranks, place)
    result: dict[str, dict[str, Any]] = {
        "reference": {**about, "nfe": None, "seconds_per_1000": None, **floor, **prompt_floor(real.prompts)}
    }
    drawn: dict[str, SampleResult] = {"reference": real}
    for name, draw in models.items():
        samples = replace(draw(2 * n, asked), prompts=real.prompts)
        drawn[name] = samples
        measured = evaluate(samples.x, data, labels=labels, **common)
        measured |= prompt_estimates(samples.x, real.x, real.prompts)
        result[name] = {"nfe": samples.nfe, "seconds_per_1000": samples.seconds_per_1000, **measured}
    return result, drawn


def reference_samples(
    data: Dataset,
    labels: Tensor | None,
    n: int,
    seed: int,
    ranks: Ranks = ALONE,
    place: Path | None = None,
) -> SampleResult:
    """Real samples in the order of :func:`asked_of`, with the same labels or conditions.

    Args:
        data: The real data.
        labels: The labels that are asked for; None without.
        n: Number of samples.
        seed: Of the choice.
        ranks: The processes that all need them.
        place: A folder that all of them see.
    """
    rows = _rows(data, labels, n, seed)

    def part(first: int, count: int) -> Tensor:
        return data.batch(rows[first : first + count])[0]

    x = filled(len(rows), data.shape, part, batch=BATCH, ranks=ranks, place=place)
    texts = tuple(data.captions[i] for i in rows.tolist()) if data.captions else ()
    return SampleResult(x, data.conditioning(rows), 0, 0.0, texts)


def asked_of(data: Dataset, spec: ConditioningSpec, n: int, seed: int) -> Conditioning:
    """What models are asked for: labels in the shares of the data, and further conditions of real samples.

    Args:
        data: The real data.
        spec: What the models take.
        n: Number of samples.
        seed: Of the choice.
    """
    labels = reference_labels(data, n, seed=seed) if LABEL in spec else None
    fields = {} if labels is None else {LABEL: labels}
    if others := set(spec) - {LABEL}:
        rows = _rows(data, labels, n, seed)
        fields |= {name: data.conditions[name][rows] for name in sorted(others)}
    return Conditioning(fields)


def _rows(data: Dataset, labels: Tensor | None, n: int, seed: int) -> Tensor:
    """Real samples in random order, with the classes of ``labels`` where there are any."""
    order = torch.randperm(len(data), generator=generator(seed, "assess/reference"))
    if labels is not None and data.labels is not None:
        chosen = torch.zeros(n, dtype=torch.int64)
        for label in labels.unique():
            where = (labels == label).nonzero()[:, 0]
            pool = order[data.labels[order] == label]
            chosen[where] = pool[torch.arange(len(where)) % len(pool)]
        order = chosen
    return order[:n]


def plain(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The JSON form of what :func:`measure_samples` measured."""
    return {
        model: {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in values.items()}
        for model, values in metrics.items()
    }


def npz_bytes(
    x: np.ndarray, conditioning: ConditioningLike, names: Sequence[str] = (), prompts: Sequence[str] = ()
) -> bytes:
    """An ``.npz`` archive with ``x`` and, where known, ``labels``, ``class_names`` and ``condition_NAME``.

    ``prompts`` are the texts of the samples' conditions. Sequences are said to be such under ``kind``, as by
    their axes they would be grey images.
    """
    conditioning = as_conditioning(conditioning)
    arrays = {"x": x} if conditioning.label is None else {"x": x, "labels": conditioning.label.numpy()}
    if conditioning.label is not None and names:
        arrays["class_names"] = np.array(names, dtype=np.str_)
    if prompts:
        arrays["prompts"] = np.array(prompts, dtype=np.str_)
    arrays |= {f"{CONDITION}{name}": value.numpy() for name, value in conditioning.items() if name != LABEL}
    if x.ndim == 3 and x.dtype != np.uint8:
        arrays["kind"] = np.array("sequence")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def write_evaluation(
    folder: RunFolder,
    metrics: dict[str, dict[str, Any]],
    drawn: dict[str, SampleResult],
    scaling: Scaling,
    settings: dict[str, Any],
    class_names: Sequence[str] = (),
) -> None:
    """Writes ``metrics.json``, the samples, an ``evaluate`` event and the model card of a run folder."""
    write_samples(folder, drawn, scaling, class_names)
    atomic_json(folder.metrics, plain(metrics))
    refresh_card(folder.model, plain(metrics))
    with EventLog(folder.log) as log:
        log.write("evaluate", None, **settings)
    track_evaluation(folder)


def write_samples(
    folder: RunFolder, drawn: dict[str, SampleResult], scaling: Scaling, class_names: Sequence[str]
) -> None:
    """Writes samples by model to ``samples/``, with prompts, where they are known, in place of encodings."""
    for name, samples in drawn.items():
        told = labels_of(samples.conditioning) if samples.prompts else samples.conditioning
        x = np.concatenate([scaling.export(part) for part in samples.x.split(BATCH)])
        content = npz_bytes(x, told, class_names, samples.prompts)
        atomic_write(folder.samples / f"{name}.npz", content)
