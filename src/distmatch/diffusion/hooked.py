"""Features of any network: the outputs of parts of it that are named, by hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from distmatch.base.errors import unknown_name


class _Enough(Exception):
    """Raised inside a pass to skip its unused remainder."""


def named_part(model: nn.Module, name: str) -> nn.Module:
    """A part of a network by its name, such as ``down_blocks.1``.

    Raises:
        UserError: There is none of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = [n for n, _ in model.named_modules() if n and n.count(".") <= 1]
        raise unknown_name("module of the teacher's network", name, names) from error


def pass_with_features(
    model: nn.Module, names: Sequence[str], call: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """What a call of the network returns, and the outputs of its named parts in it."""
    kept: dict[str, Any] = {}
    with _listening(model, names, kept):
        out = call()
    return out, [as_map(of_samples(kept[name], out), out) for name in names]


def pass_for_features(
    model: nn.Module, names: Sequence[str], call: Callable[[], Tensor], x: Tensor
) -> list[Tensor]:
    """The outputs of the named parts alone: the call stops when the last of them is computed."""
    kept: dict[str, Any] = {}
    with suppress(_Enough), _listening(model, names, kept, leave=True):
        call()
    return [as_map(of_samples(kept[name], x), x) for name in names]


class Listener:
    """Hooks that stay on the named parts of a network, for a compiler.

    Its graphs can neither add hooks nor be left by an exception. In a pass for features alone it removes what
    follows the last of them, as dead code.

    Args:
        model: The network.
        names: The parts.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.kept: dict[str, Any] | None = None
        for name in self.names:
            named_part(model, name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.kept is not None:
            self.kept[name] = output

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As :func:`pass_with_features`."""
        kept: dict[str, Any] = {}
        self.kept = kept
        try:
            out = call()
        finally:
            self.kept = None
        return out, [as_map(of_samples(kept[name], out), out) for name in self.names]


def features_of_pass(
    model: nn.Module,
    names: Sequence[str],
    call: Callable[[], Tensor],
    x: Tensor,
    wanted: bool | Literal["only"],
    listener: Listener | None,
) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
    """Prediction and features of a call, or ``"only"`` the features.

    Args:
        model: The network.
        names: Parts of it.
        call: The call.
        x: The samples it is made with.
        wanted: Whether only the features are.
        listener: The hooks of a network that is compiled.
    """
    if listener is None:
        if wanted == "only":
            return pass_for_features(model, names, call, x)
        return pass_with_features(model, names, call)
    out, features = listener(call)
    return features if wanted == "only" else (out, features)


def blocks_of(model: nn.Module, call: Callable[[], Any]) -> list[str]:
    """The names of the blocks of a network in the order in which a call runs them.

    They are the entries of its lists of modules that are nearest to the top: the blocks of a transformer, the
    resolutions of a U-Net.

    Args:
        model: The network.
        call: A trial pass.
    """
    listed: list[str] = []
    level: list[tuple[str, nn.Module]] = [("", model)]
    while level and not listed:
        inner = [
            (f"{name}.{n}".lstrip("."), part) for name, parent in level for n, part in parent.named_children()
        ]
        lists = [(name, part) for name, part in inner if isinstance(part, nn.ModuleList)]
        listed = [f"{name}.{n}" for name, part in lists for n, _ in part.named_children()]
        level = [(name, part) for name, part in inner if not isinstance(part, nn.ModuleList)]
    kept: dict[str, Any] = {}
    with _listening(model, listed, kept):
        call()
    return list(kept)


def names_at_depths(names: Sequence[str], depths: Sequence[float]) -> tuple[str, ...]:
    """The blocks that end at shares of the depth: of 24 at 0.5, 0.75 and 0.99 the 12th, 18th and 24th."""
    return tuple(dict.fromkeys(names[max(math.ceil(depth * len(names) - 1e-9), 1) - 1] for depth in depths))


def of_samples(output: Any, x: Tensor) -> Tensor:
    """The part of a block's output that belongs to samples ``x`` (B, ...), not to their text.

    Blocks of transformers return the states of text and samples in any order. Those of samples are as many as
    its patches, or as its tokens; of several that fit the last is taken, of none the first.
    """
    if isinstance(output, Tensor):
        return output
    parts = list(output.values()) if isinstance(output, dict) else list(output)
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim > 1]
    fitting = [part for part in tensors if part.ndim == x.ndim or as_map(part, x).ndim == x.ndim]
    if x.ndim == 3:
        fitting = [part for part in fitting if part.shape[1] == x.shape[1]]
    return fitting[-1] if fitting else tensors[0]


def as_map(feature: Tensor, x: Tensor) -> Tensor:
    """Tokens (B, N, C) of images or video ``x`` as maps (B, C, H', W') or (B, C, T', H', W').

    Whatever does not form a grid of patches stays as it is: patches are square, and of video each is of one
    frame, or of as many frames as pixels along a side.
    """
    if feature.ndim != 3 or x.ndim not in (4, 5):
        return feature
    sides, tokens = x.shape[2:], feature.shape[1]
    spatial = round((math.prod(sides) / tokens) ** 0.5) or 1
    solid = round((math.prod(sides) / tokens) ** (1 / 3)) or 1
    for steps in ((spatial, spatial), (1, spatial, spatial), (solid, solid, solid)):
        grid = tuple(side // step for side, step in zip(sides, steps, strict=False))
        if len(steps) == len(sides) and math.prod(grid) == tokens:
            return feature.transpose(1, 2).unflatten(2, grid)
    return feature


@contextmanager
def _listening(
    model: nn.Module, names: Sequence[str], kept: dict[str, Any], leave: bool = False
) -> Iterator[None]:
    """Keeps what the named parts return while it lasts; raises ``_Enough`` with all, to ``leave``."""

    def listener(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[name] = output
            if leave and len(kept) == len(names):
                raise _Enough

        return keep

    hooks = [named_part(model, name).register_forward_hook(listener(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
