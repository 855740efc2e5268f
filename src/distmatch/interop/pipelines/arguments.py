"""Arguments and outputs of networks: containers of tensors, flattened, compared and described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.interop.pipelines.containers import stacked

LENGTH = ".length"  # the field of the numbers of rows of one that the network receives as a list
EXACT = 1e-5  # relative, for tensors that are copies of each other but for a factor
OUTPUTS = ("as it is", "negated", "first half of channels", "first half of channels, negated")


def prediction_of(output: Any, relation: str, shape: torch.Size) -> Tensor:
    """What the scheduler receives: a network's output by one of :data:`OUTPUTS`, (B, *shape)."""
    value = stacked(first_of(output))
    if value is None:
        raise UserError("the network returns no tensor", got=said(output))
    if relation.startswith("first half"):
        value = value.chunk(2, dim=1)[0]
    value = value.reshape(shape)
    return -value if relation.endswith("negated") else value


def first_of(output: Any) -> Any:
    """The prediction among what a network of diffusers returns: the first of a tuple or of named values."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def flattened(arguments: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Arguments by name, those inside dictionaries by ``outer.inner``; empty dictionaries stay."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flattened`."""
    arguments: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = arguments
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return arguments


def padded(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors of different lengths as one, with zeros behind them, and their lengths."""
    return {
        name: nn.utils.rnn.pad_sequence(list(rows), batch_first=True),
        name + LENGTH: torch.tensor([len(row) for row in rows]),
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with tensors in them compared bit for bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor)
        return alike and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another but for rounding of float32."""
    return bool((one - other).norm() <= EXACT * other.norm())


def on_device(value: Any, like: Tensor) -> Any:
    """A constant on the device of a sample."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, like) for item in value)
    return value


def said(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}: {said(value[0])}" if value else "an empty list"
    return f"{value!r:.60}"


def unexplained(what: str, got: str) -> UserError:
    """The error for a pipeline whose calls are of another form."""
    return UserError(
        f"this pipeline cannot be read by tracing it: {what}",
        got=got[:400],
        fix="wrap its network yourself: dm.as_denoiser(net, path, prediction, shape=..., call=...)",
    )
