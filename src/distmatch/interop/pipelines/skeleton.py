"""Parts of a pipeline without their weights: they take and return tensors of the right shapes."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distmatch.base.errors import UserError, cause
from distmatch.base.files import read_json
from distmatch.base.seeds import generator
from distmatch.interop.optional import import_diffusers
from distmatch.interop.pipelines.containers import mapped

_ENTRIES = ("forward", "encode", "decode")


def without_weights(kind: Any, folder: Path) -> nn.Module:
    """A model of diffusers or transformers on the meta device, called with tensors on the CPU.

    Its calls compute shapes alone: floating outputs are random numbers in float32, others zeros. What a
    pipeline does before and after such a call is what it would do with the weights.

    Args:
        kind: The class.
        folder: Its folder with ``config.json``.

    Raises:
        UserError: It cannot be built on the meta device.
    """
    ours = issubclass(kind, import_diffusers().ModelMixin)
    try:
        with torch.device("meta"):
            if ours:
                made = kind.from_config(read_json(folder / "config.json"))
            else:
                made = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # code of another package
        raise UserError(
            f"{folder} cannot be built from its config alone", got=cause(error), fix="copy the folder again"
        ) from error
    if ours and hasattr(kind, "decode"):
        for name, buffer in made.named_buffers():  # statistics of latents, which pipelines read themselves
            owner, _, last = name.rpartition(".")
            made.get_submodule(owner)._buffers[last] = torch.ones(buffer.shape, dtype=buffer.dtype)
    draw = generator(0, f"skeleton/{folder.name}")
    entries = {name: _shaped(getattr(kind, name), draw, not ours) for name in _ENTRIES if hasattr(kind, name)}
    # Pipelines ask their parts for device and dtype.
    asked = {
        "device": property(lambda self: torch.device("cpu")),
        "dtype": property(lambda self: torch.float32),
    }
    made.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **asked, **entries})
    found: nn.Module = made.eval()
    return found


def plain_network(network: nn.Module) -> nn.Module:
    """A copy of a network of :func:`without_weights` that takes and returns tensors on the meta device."""
    made = copy.deepcopy(network)
    made.__class__ = type(network).__mro__[1]
    return made


def _shaped(method: Any, draw: torch.Generator, fake: bool) -> Any:
    """A method that is run on the meta device, for tensors elsewhere; once for arguments of equal shapes."""
    signature = inspect.signature(method)
    # Models of transformers look into their masks unless they are traced.
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    known: dict[Any, Any] = {}  # a pipeline calls its network once a step

    def without_numbers(tensor: Tensor) -> Tensor:
        shape = tensor.to("meta")
        return shape if mode is None else mode.from_tensor(shape)

    @functools.wraps(method)
    @torch.no_grad()
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        key = _shapes_in({name: value for name, value in given.arguments.items() if value is not self})
        if key is None or key not in known:
            given.arguments.update(mapped(dict(given.arguments), without_numbers))
            with mode or nullcontext():
                output = method(*given.args, **given.kwargs)
            if key is None:
                return _drawn(output, draw)
            known[key] = output
        return _drawn(known[key], draw)

    return called


def _shapes_in(value: Any) -> Any:
    """What arguments without their numbers are known by; None where they hold anything but plain values."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.stride())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    if type(value) in (dict, list, tuple):
        items = value.items() if type(value) is dict else enumerate(value)
        found = [(name, _shapes_in(item)) for name, item in items]
        return None if any(item is None for _, item in found) else (type(value), *found)
    return None


def _drawn(value: Any, draw: torch.Generator) -> Any:
    """What a call on the meta device returned, with numbers."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point()
        return (
            torch.randn(value.shape, generator=draw)
            if floating
            else torch.zeros(value.shape, dtype=value.dtype)
        )
    if isinstance(value, dict):
        found = {name: _drawn(item, draw) for name, item in value.items()}
        return found if type(value) is dict else type(value)(**found)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: _drawn(item, draw) for name, item in vars(value).items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_drawn(item, draw) for item in value)
    distribution = getattr(value, "parameters", None)  # of latents, which ``encode`` returns
    return type(value)(_drawn(distribution, draw)) if isinstance(distribution, Tensor) else value
