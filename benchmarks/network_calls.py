"""Listening to the network calls of a training step, and making the same calls again on their own.

A call is what one network is asked for at once: a forward pass, with or without what autograd keeps; the
backward pass through it, to parameters, to inputs or to both; or a pass in forward mode. The replay makes
them in the same order, precision and grad mode on ready inputs of the same shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

Operation = Callable[..., Any]


@dataclass
class Call:
    """One call of a network.

    Attributes:
        network: The name of the network.
        operation: Its function.
        arguments: What it was called with, flattened: tensors stand for their shapes.
        structure: How the arguments go together.
        tangents: Which of them had a tangent; none but in forward mode.
        grad: Whether gradients were enabled.
        autocast: Whether bfloat16 was.
        module: The network itself.
        partial: Whether the pass stops at the last feature.
        passes: The backward passes that went on to inputs or parameters, with the numbers of the outputs that
            each came through. One that ends at the last layer, to weigh losses, is left out.
        inputs: Numbers of the arguments that it went on to.
        to_parameters: Whether it went on to the parameters.
    """

    network: str
    operation: Operation
    arguments: list[Any]
    structure: Any
    tangents: tuple[int, ...]
    grad: bool
    autocast: bool
    module: nn.Module
    partial: bool = False
    passes: dict[int, set[int]] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    to_parameters: bool = False

    @property
    def kind(self) -> str:
        """What it comes to, for the table."""
        if self.tangents:
            return "jvp"
        ends = [name for name, there in (("weights", self.to_parameters), ("input", self.inputs)) if there]
        way = "backward to " + " and ".join(ends) if self.passes else "forward"
        return way if not self.partial else "features" if way == "forward" else f"features, {way}"


@contextmanager
def recorded(networks: dict[str, nn.Module]) -> Iterator[list[Call]]:
    """Notes every call of the networks while it lasts.

    Args:
        networks: By name. A network inside another one counts once, as the outermost.
    """
    calls: list[Call] = []
    depth = [0]
    handles: list[RemovableHandle] = []
    wrapped = []
    for name, module in networks.items():
        module.forward = _listening(name, module, module.forward, calls, depth, handles)
        wrapped.append(module)
    try:
        yield calls
    finally:
        for module in wrapped:
            del module.forward
        for handle in handles:
            handle.remove()


def _listening(
    name: str,
    module: nn.Module,
    inner: Operation,
    calls: list[Call],
    depth: list[int],
    handles: list[RemovableHandle],
) -> Operation:
    def heard(*args: Any, **kwargs: Any) -> Any:
        if depth[0]:
            return inner(*args, **kwargs)
        flat, structure = tree_flatten((args, kwargs))
        forward_mode = forward_ad._current_level >= 0
        call = Call(
            name,
            inner,
            [_Ready.like(a) if isinstance(a, Tensor) else a for a in flat],
            structure,
            tuple(i for i, a in enumerate(flat) if forward_mode and _has_tangent(a)),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(_device(flat)),
            module,
            kwargs.get("return_features") == "only",
        )
        calls.append(call)
        depth[0] += 1
        try:
            out = inner(*args, **kwargs)
        finally:
            depth[0] -= 1
        if call.grad and not call.tangents:
            handles.extend(_watch(call, flat, tree_flatten(out)[0]))
        return out

    return heard


def _watch(call: Call, given: list[Any], outputs: list[Any]) -> list[RemovableHandle]:
    """Notes where backward passes through the call come from and where they go; returns what to undo."""
    parameter = next((p for p in call.module.parameters() if p.requires_grad), None)
    edge = None if parameter is None else get_gradient_edge(parameter).node
    reached: dict[int, set[int]] = {}

    def through(number: int) -> None:
        reached.setdefault(torch._C._current_graph_task_id(), set()).add(number)
        try:
            going = edge is not None and torch._C._will_engine_execute_node(edge)
        except RuntimeError:  # torch.autograd.grad for given tensors; the parameter's own hook tells
            going = False
        if going:
            arrived()

    def arrived(*_: Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number in reached:
            call.to_parameters = True
            call.passes[number] = reached[number]

    def came_out(number: int) -> None:
        this = torch._C._current_graph_task_id()
        if this in reached:  # else it came from another call on the same input
            call.inputs.add(number)
            call.passes[this] = reached[this]

    for number, output in enumerate(outputs):
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _, n=number: through(n))
    for number, value in enumerate(given):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _, n=number: came_out(n))
    return [] if parameter is None else [parameter.register_hook(arrived)]


@dataclass(frozen=True)
class _Ready:
    """The shape of a tensor, from which one like it is made."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, value: Tensor) -> _Ready:
        return cls(value.shape, value.dtype, value.device)

    def tensor(self) -> Tensor:
        """Levels of one, normal samples, labels of zero."""
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        make = torch.ones if len(self.shape) == 1 else torch.randn
        return make(self.shape, dtype=self.dtype, device=self.device)


def _has_tangent(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and forward_ad.unpack_dual(value).tangent is not None
    )


def _device(values: list[Any]) -> str:
    return next(v.device.type for v in values if isinstance(v, Tensor))


def replay(calls: list[Call]) -> Callable[[], None]:
    """A function that makes the calls again; their inputs are made here, once."""
    ready = [_ready(call) for call in calls]
    modules = {id(call.module): call.module for call in calls}.values()

    def cycle() -> None:
        for action in ready:
            action()
        for module in modules:
            module.zero_grad(set_to_none=True)

    return cycle


def _ready(call: Call) -> Callable[[], None]:
    values = [v.tensor() if isinstance(v, _Ready) else v for v in call.arguments]
    device = _device(values)
    wanted = [values[i].requires_grad_() for i in sorted(call.inputs)]

    def made(flat: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(flat, call.structure)
        return tree_flatten(call.operation(*args, **kwargs))[0]

    def forward_mode() -> None:
        primals = tuple(values[i] for i in call.tangents)

        def f(*moving: Tensor) -> Any:
            flat = list(values)
            for i, value in zip(call.tangents, moving, strict=True):
                flat[i] = value
            return tuple(made(flat))

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            jvp(f, primals, tree_map(torch.ones_like, primals))

    def plain() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=call.autocast), torch.set_grad_enabled(call.grad):
            out = made(values)
        for left, reached in zip(reversed(range(len(call.passes))), call.passes.values(), strict=True):
            loss = torch.stack([out[i].float().mean() for i in sorted(reached)]).sum()
            if call.to_parameters:
                loss.backward(retain_graph=left > 0)
                for value in wanted:
                    value.grad = None
            elif wanted:
                torch.autograd.grad(loss, wanted, retain_graph=left > 0)

    if not call.tangents:
        return plain

    def unmixed() -> None:
        with torch.autocast(device, enabled=call.autocast):
            forward_mode()

    return unmixed


def counted(calls: list[Call]) -> str:
    """How many calls of each kind, in words."""
    kinds = Counter(call.kind for call in calls)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
