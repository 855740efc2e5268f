"""Conversion of the arguments of the Python API for training and evaluation: data sets, samples, settings."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data import Dataset, Scaling, from_arrays, load_data
from distmatch.data.kinds import kind_of_shape
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.methods.method import Method
from distmatch.methods.student import Student
from distmatch.methods.table import unknown_setting
from distmatch.metrics.settings import MOST_IN_BLOCK
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.evaluation import asked_of
from distmatch.training.known_data import seen_by

Data = Dataset | Tensor | np.ndarray | str | os.PathLike[str]


def real_data(teacher: Denoiser | None, data: Data | None, seed: int) -> Dataset | None:
    """The real data of a distillation; None leaves them to what a folder says of its teacher.

    A saved teacher was trained on scaled data; any other one is in the units of what it is given.
    """
    if data is not None:
        scaled = teacher is None or isinstance(teacher, EDMDenoiser)
        return as_dataset(data, scaled=scaled, shape=getattr(teacher, "shape", None))
    return _samples_of(teacher, seed) if isinstance(teacher, GaussianMixture) else None


def as_dataset(data: Data, *, scaled: bool = True, shape: tuple[int, ...] | None = None) -> Dataset:
    """A data set from anything that can be one.

    Args:
        data: The data.
        scaled: False takes vectors and sequences as they are.
        shape: That of one sample where a model says it: so arrays of sequences are no grey images.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, (str, os.PathLike)):
        return load_data(data)
    if isinstance(data, tuple):
        raise UserError(
            "data with labels are a data set",
            got=f"a tuple of {len(data)}",
            fix="use distmatch.data.from_arrays(x, labels)",
        )
    kind = None if shape is None or len(shape) != 2 else kind_of_shape(shape)
    found = from_arrays(data, None, kind=kind, name="array")
    if not scaled and found.scaling.kind == "vector":
        return replace(found, scaling=Scaling.identity(found.shape[-1]))
    return found


def name_of(data: Data) -> str:
    """The name that a run notes for data."""
    if isinstance(data, Dataset):
        return data.name
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else "array"


def _samples_of(mixture: GaussianMixture, seed: int, n: int = 20_000) -> Dataset:
    """Real data for an exact teacher: its own samples, unscaled, as the teacher must match."""
    x, component = mixture.sample_with_components(n, seed=seed)
    labels = mixture.classes.cpu()[component.cpu()] if mixture.num_classes else None
    return Dataset(x.cpu(), labels, (), "mixture", Scaling.identity(x.shape[1]))


def as_samples(x: Any) -> Tensor:
    """Samples as a tensor.

    Raises:
        UserError: They are none: a name, a teacher, a data set.
    """
    try:
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        named = isinstance(x, (str, os.PathLike))
        raise UserError(
            "these are no samples to measure",
            got=f"{x!r:.80}" if named else type(x).__name__,
            expected="a tensor or array of samples in model space, or a Student",
            fix="for a run folder or a file use the command distmatch evaluate, or load the student with "
            "dm.Student.from_pretrained(folder)"
            if named
            else "draw samples first: dm.evaluate(student.sample(1000), ...)",
        ) from error


def drawn_from(
    student: Student, real: Tensor | Dataset, labels: Tensor | None, n: int | None, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | Dataset]:
    """Samples of a student, the requested labels, and the reference with its classes and scaling."""
    about = student.info.get("data") or {}
    if isinstance(real, Dataset):
        real = seen_by(real, about, student.num_classes, "the student")
    count = min(len(real), 2 * (n or MOST_IN_BLOCK)) if labels is None else len(labels)
    asked: ConditioningLike = labels
    if labels is None and isinstance(real, Dataset) and set(student.conditioning_spec) <= set(real.fields):
        asked = asked_of(real, student.conditioning_spec, count, seed)
    x = student.sample(count, seed=seed, conditioning=asked if isinstance(asked, Tensor) else asked or None)
    return Scaling.known(about, x.shape[1:]).settled(x), labels_of(asked), real


def settings_of(given: dict[str, Any], *targets: Any, method: Method | None = None) -> tuple[Any, ...]:
    """Puts each keyword into the dataclass that has a field of that name.

    Args:
        given: The keywords.
        targets: The dataclasses, with the defaults.
        method: The method whose settings are among them.

    Raises:
        UserError: None has such a field.
    """
    known = {f.name for target in targets for f in fields(target)}
    for name in given:
        if name not in known:
            raise unknown_setting(name, method, known, given[name])
    result = []
    for target in targets:
        own = {f.name for f in fields(target)}
        try:
            result.append(replace(target, **{k: v for k, v in given.items() if k in own}))
        except TypeError as error:
            raise UserError("a setting has the wrong type", got=str(error)) from error
    return tuple(result)
