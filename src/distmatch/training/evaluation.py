"""Measuring the models of a run and writing the result into its folder."""

from __future__ import annotations

from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.progress import quietly
from distmatch.data import TOY_NAMES, Dataset, toy
from distmatch.data.classes import listed, names_of
from distmatch.diffusion.conditioning import Conditioning
from distmatch.metrics import plan, resolve_features
from distmatch.metrics.settings import MOST_IN_BLOCK, FeatureChoice
from distmatch.training.assess import HEUN, SampleResult, asked_of, assess, write_assessment
from distmatch.training.models import Model
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import Sampling


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
    spec: str = "",
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
        spec: Name of the data; an exact mixture's name adds the mode metrics.

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
    specs = {name: model.conditioning_spec for name, model in models.items()}
    if len({tuple(sorted(spec)) for spec in specs.values()}) > 1:
        raise UserError(
            "teacher and student have different conditioning",
            got=", ".join(f"{name}: {', '.join(sorted(spec)) or 'nothing'}" for name, spec in specs.items()),
        )
    block = min(len(data) // 2, n or MOST_IN_BLOCK)
    asked = asked_of(data, next(iter(specs.values()), {}), 2 * block, seed)
    space = resolve_features(features, data)  # once: teacher, student and floor share one feature network

    def drawer(model: Model) -> Any:
        def draw(count: int, asked: Conditioning) -> SampleResult:
            # A model's first calls pay for memory and threads; they are not part of its speed.
            with quietly():
                model.draw(min(count, 64), asked.index(slice(64)), seed, Sampling(steps=2), device=device)
            return model.draw(count, asked, seed, sampling, device=device)

        return draw

    metrics, drawn = assess(
        data,
        {name: drawer(model) for name, model in models.items()},
        asked=asked,
        features=space,
        n=block,
        seed=seed,
        mixture=toy(spec) if spec in TOY_NAMES else None,
    )
    settings = plan(data, features=space, n=n, seed=seed).to_dict()
    fingerprint = {"fingerprint": space.fingerprint} if space.fingerprint else {}
    said = {**settings, **fingerprint, **sampling.to_dict()}
    write_assessment(folder, metrics, drawn, data.scaling, said, data.class_names)
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
