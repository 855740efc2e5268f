"""What calls of other code receive and return: arguments by name, containers of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced(owner: Any, changes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Methods of one object replaced, for a while."""
    for name, value in changes.items():
        object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        for name in changes:
            object.__delattr__(owner, name)


@contextmanager
def stating(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A model whose attribute ``dtype`` is this one, for a while; None: as it is."""
    kind = type(module)
    if dtype is not None:
        stated = {"__module__": kind.__module__, "dtype": property(lambda self: dtype)}
        module.__class__ = type(kind.__name__, (kind,), stated)
    try:
        yield
    finally:
        module.__class__ = kind


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names."""
    given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same containers with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value) if type(value) in (list, tuple) else value
    return value


def copied(value: Any) -> Any:
    """A copy that later changes in place do not reach. Outputs of diffusers become dictionaries."""
    return mapped(value, lambda tensor: tensor.detach().clone())


def stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack(list(value)) if len({item.shape for item in value}) == 1 else None
    return None


def count(value: Any) -> int:
    """The numbers in a tensor, or in a list of tensors of one shape; 0 for anything else."""
    whole = stacked(value)
    return 0 if whole is None else whole.numel()
