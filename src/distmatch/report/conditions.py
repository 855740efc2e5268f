"""Which samples have equal conditions, and what these are in a few words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distmatch.report.run import Samples


@dataclass(frozen=True)
class Groups:
    """Samples of several models by what they are conditioned on.

    Attributes:
        of: For each model the groups of its samples, (N,); numbers in the order of labels and values.
        names: What a group is conditioned on, by its number.
        what: What the groups differ in: ``label``, ``prompt`` or ``condition``.
    """

    of: list[np.ndarray]
    names: tuple[str, ...]
    what: str


def grouped(models: Sequence[Samples]) -> Groups | None:
    """The groups of samples with the same prompt, else with the same label and the same further conditions.

    Fields that a model's samples do not have are left aside; None where nothing is left.
    """
    ends = np.cumsum([len(s.x) for s in models])[:-1]
    if all(s.prompts for s in models):
        texts = [text for s in models for text in s.prompts]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        group = np.array([number[text] for text in texts])
        return Groups(np.split(group, ends), tuple(number), "prompt")
    labelled = all(s.labels is not None for s in models)
    fields = _shared_fields(models)
    columns = [np.concatenate([s.labels for s in models if s.labels is not None])] if labelled else []
    columns += [np.concatenate([s.conditions[name] for s in models]) for name in fields]
    if not columns:
        return None
    ranks = np.stack([_ranks(values) for values in columns], axis=1)
    _, first, group = np.unique(ranks, axis=0, return_index=True, return_inverse=True)
    named = {str(k): name for k, name in enumerate(models[0].class_names)}
    names = []
    for at in first:
        label = [named.get(str(columns[0][at]), str(columns[0][at]))] if labelled else []
        values = [_shown(n, c[at]) for n, c in zip(fields, columns[labelled:], strict=True)]
        names.append(
            ", ".join([f"label {label[0]}" if label and values else word for word in label] + values)
        )
    return Groups(np.split(group.ravel(), ends), tuple(names), "condition" if fields else "label")


def conditions_note(models: Sequence[Samples]) -> str:
    """A sentence on the further conditions of samples that are not shown row by row; '' without any."""
    parts = []
    for name in _shared_fields(models):
        values = np.concatenate([s.conditions[name] for s in models])
        if values.ndim > 1:
            parts.append(f"{name} of shape {_shape(values[0])}")
        elif len(values):
            parts.append(f"{name} from {values.min():.3g} to {values.max():.3g}")
    return f" The samples are conditioned on {'; '.join(parts)}." if parts else ""


def _shared_fields(models: Sequence[Samples]) -> list[str]:
    """The conditions that all models have, with values of one shape."""
    found = []
    for name, values in models[0].conditions.items():
        shapes = {s.conditions[name].shape[1:] if name in s.conditions else None for s in models}
        if shapes == {values.shape[1:]}:
            found.append(name)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Numbers (N,) that are equal where values are, in the order of numbers; of tensors, as they come."""
    if values.ndim == 1:
        return np.unique(values, return_inverse=True)[1]
    seen: dict[bytes, int] = {}
    digests = [hashlib.sha256(np.ascontiguousarray(row).data).digest() for row in values]
    return np.array([seen.setdefault(digest, len(seen)) for digest in digests])


def _shown(name: str, value: np.ndarray) -> str:
    return f"{name} {value:.3g}" if value.ndim == 0 else f"{name} {_shape(value)}"


def _shape(value: np.ndarray) -> str:
    return "x".join(map(str, value.shape))
