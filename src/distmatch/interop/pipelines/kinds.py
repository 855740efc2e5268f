"""Arguments of a network sorted by what they depend on: conditioning, the number of samples, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distmatch.diffusion.conditioning import LABEL, FieldSpec
from distmatch.interop.pipelines.arguments import LENGTH, said, same, unexplained


class Kinds:
    """Arguments sorted by what they depend on."""

    def __init__(self, num_classes: int) -> None:
        self.fields: dict[str, FieldSpec] = {}
        self.lists: list[str] = []
        self.numbers: list[str] = []
        self.repeated: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self.num_classes = num_classes

    def add(self, name: str, values: list[Any], rows: list[int]) -> None:
        """Sorts in one argument, by its values for different numbers of samples."""
        first = values[0]
        if isinstance(first, Tensor) and all(isinstance(v, Tensor) for v in values):
            if all(v.ndim and len(v) == n for v, n in zip(values, rows, strict=True)):
                self._field(name, values)
                return
        elif isinstance(first, (list, tuple)) and all(
            isinstance(v, (list, tuple)) and len(v) == n for v, n in zip(values, rows, strict=True)
        ):
            every = [item for value in values for item in value]
            if all(isinstance(item, Tensor) for item in every):
                self.lists.append(name)
                self.fields[name] = FieldSpec(
                    _common([(-1, *item.shape[1:]) for item in every]), every[0].dtype
                )
                self.fields[name + LENGTH] = FieldSpec((), torch.int64)
                return
            if all(type(item) is int for item in every):
                self.numbers.append(name)
                self.fields[name] = FieldSpec((), torch.int64)
                return
            if all(same(item, every[0]) for item in every):
                self.repeated[name] = every[0]
                return
        if all(same(value, first) for value in values):
            self.constants[name] = first
            return
        raise unexplained(
            f"the argument '{name}' changes with the samples and has no row for each of them",
            "; ".join(f"{said(value)} for {n} samples" for value, n in zip(values, rows, strict=True)),
        )

    def masks(self, others: Mapping[str, list[Any]]) -> dict[str, str]:
        """Integer fields of a number a token, and fields of as many tokens."""
        tokens = {
            name: [value.shape[1] for value in others[name]]
            for name, spec in self.fields.items()
            if len(spec.shape) == 2 and name in others and name not in self.lists
        }
        found = {}
        for name, spec in self.fields.items():
            if len(spec.shape) == 1 and not spec.dtype.is_floating_point and name in others:
                sizes = [value.shape[1] for value in others[name]]
                found[name] = next((other for other, counts in tokens.items() if counts == sizes), "")
        return {name: other for name, other in found.items() if other}

    def _field(self, name: str, values: list[Tensor]) -> None:
        if name == "class_labels" and self.num_classes:
            self.fields[LABEL] = FieldSpec((), torch.int64, self.num_classes)
            return
        self.fields[name] = FieldSpec(_common([tuple(v.shape[1:]) for v in values]), values[0].dtype)


def _common(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes that all have, -1 elsewhere."""
    if len({len(shape) for shape in shapes}) > 1:
        raise unexplained("a field has different numbers of dimensions", str(shapes))
    return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
