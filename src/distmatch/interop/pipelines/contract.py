"""The contract between a pipeline and its network, fitted to traces: what arguments are, what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import LABEL, Conditioning, ConditioningSpec
from distmatch.interop.pipelines.arguments import (
    LENGTH,
    OUTPUTS,
    close,
    first_of,
    flattened,
    nested,
    on_device,
    padded,
    prediction_of,
    said,
    same,
    unexplained,
)
from distmatch.interop.pipelines.containers import stacked
from distmatch.interop.pipelines.kinds import Kinds
from distmatch.interop.pipelines.trace import Call, Trace

_NEAR_INTEGER = 1e-3  # float32 at 1000 is coarser than this by a factor of 10


@dataclass(frozen=True)
class TimeMap:
    """The time that the network receives: ``scale * (factor t) + offset`` for the time t of our path.

    Some pipelines shift the noise levels of a flow and not its times: the shift s is undone first,
    t = s u / (1 + (s - 1) u), and u takes the place of t.

    Attributes:
        scale: The network's times a unit of the scheduler's.
        offset: Its time at the scheduler's 0.
        factor: The scheduler's times a unit of the path's.
        whole: Whether the scheduler rounds its time down to an integer.
        shift: The shift s.
        exact: Whether the time is passed before that rounding, as the schedulers of a student do.
    """

    scale: float
    offset: float
    factor: float = 1.0
    whole: bool = False
    shift: float = 1.0
    exact: bool = False

    def __call__(self, t: Tensor) -> Tensor:
        """The network's time."""
        tau = self.factor * t / (self.shift - (self.shift - 1) * t)
        if self.whole and not self.exact:
            tau = (tau + _NEAR_INTEGER).floor()
        return self.scale * tau + self.offset


@dataclass(frozen=True)
class Contract:
    """How a pipeline calls its network.

    Attributes:
        sample: The argument that is the noised sample.
        sample_shape: Its shape without the batch.
        listed: Whether it is a list of samples.
        shape: Shape of a sample as the scheduler has it: the space of the denoiser.
        time: The argument that is the time.
        time_shape: Its shape without the batch; () for one number a sample.
        scale, offset: The affine map from the scheduler's time to it.
        fields: What belongs to a sample, by argument; dots lead into dictionaries.
        lists: Those of the fields that are passed as a list, a tensor for each sample.
        numbers: Those that are passed as a list of integers.
        masks: Masks, and the field whose tokens they are for. A pipeline may leave out one of ones alone.
        repeated: Arguments that are lists of the same thing for each sample.
        constants: All other arguments.
        output: What the scheduler receives: "as it is", "negated", "first half of channels", ...
        time_dtype: The dtype of the time; None: that of the sample, at least float32.
    """

    sample: str
    sample_shape: tuple[int, ...]
    listed: bool
    shape: tuple[int, ...]
    time: str
    time_shape: tuple[int, ...]
    scale: float
    offset: float
    fields: ConditioningSpec
    lists: tuple[str, ...]
    numbers: tuple[str, ...]
    masks: Mapping[str, str]
    repeated: Mapping[str, Any] = field(repr=False)
    constants: Mapping[str, Any] = field(repr=False)
    output: str
    time_dtype: torch.dtype | None = None

    def in_dtypes_of(self, arguments: Mapping[str, Any]) -> Contract:
        """The contract with the time and the constants as a call of the network had them."""
        flat = flattened(arguments)
        time = flat[self.time]
        return replace(
            self,
            constants={name: flat.get(name, value) for name, value in self.constants.items()},
            time_dtype=time.dtype if isinstance(time, Tensor) and time.is_floating_point() else None,
        )

    def __call__(self, module: nn.Module, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """A call of the network: x (B, *shape), its time t (B,), the fields; what the scheduler receives."""
        flat: dict[str, Any] = {name: on_device(value, x) for name, value in self.constants.items()}
        flat |= {name: [value] * len(x) for name, value in self.repeated.items()}
        for name, value in conditions.items():
            if name in self.lists:
                lengths = conditions[name + LENGTH].tolist()
                flat[name] = [row[:n] for row, n in zip(value, lengths, strict=True)]
            elif name in self.numbers:
                flat[name] = value.tolist()
            elif not name.endswith(LENGTH):
                # Rows of a null conditioning share their memory, which ``view`` of a network refuses.
                flat["class_labels" if name == LABEL else name] = value.contiguous()
        batch = x.shape[0]  # not len(x), which fixes the batch of a graph
        given = x.reshape(batch, *self.sample_shape)
        flat[self.sample] = list(given) if self.listed else given
        t = t if self.time_dtype is None else t.to(self.time_dtype)
        flat[self.time] = t.reshape(-1, *[1] * len(self.time_shape)).expand(batch, *self.time_shape)
        return prediction_of(module(**nested(flat)), self.output, x.shape)

    def conditioning(self, arguments: Mapping[str, Any]) -> Conditioning:
        """The fields among the arguments that a pipeline gave its network."""
        flat = flattened(arguments)
        found: dict[str, Tensor] = {}
        for name in self.fields:
            if name.endswith(LENGTH) and name.removesuffix(LENGTH) in self.lists:
                continue
            value = flat["class_labels" if name == LABEL else name]
            if name in self.lists:
                found |= padded(name, value)
            else:
                found[name] = torch.as_tensor(value if value is not None else self._ones(name, flat))
        return Conditioning(found)

    def _ones(self, name: str, flat: Mapping[str, Any]) -> Tensor:
        """The mask that a pipeline leaves out where it hides nothing."""
        if name not in self.masks:
            raise unexplained(f"the argument '{name}' is missing for some prompts", "None")
        tokens = flat[self.masks[name]]
        return torch.ones(tokens.shape[:2], dtype=self.fields[name].dtype, device=tokens.device)


def fit_contract(traces: Sequence[Trace], num_classes: int = 0) -> Contract:
    """The contract that explains all calls of traces of different batch sizes.

    Args:
        traces: Two or more, of different numbers of prompts, each of three or more steps.
        num_classes: Classes of a network with an argument ``class_labels``.

    Raises:
        UserError: None does; with what was seen.
    """
    calls = [call for trace in traces for call in trace.calls]
    flat = [flattened(call.arguments) for call in calls]
    names = {frozenset(values) for values in flat}
    if len(names) > 1:
        raise unexplained("the network does not receive the same arguments in all steps", _names(names))
    shapes = {tuple(call.sample.shape[1:]) for call in calls}
    if len(shapes) != 1:
        raise unexplained("the samples of a pipeline change their shape from step to step", str(shapes))
    sample = _sample_argument(flat, calls)
    varying = [name for name in flat[0] if name != sample and _varies(traces, name)]
    if len(varying) != 1:
        got = ", ".join(varying) or "nothing but the sample"
        raise unexplained(
            "one argument of the network should be its time", f"changing from step to step: {got}"
        )
    time = varying[0]
    scale, offset = _affine(time, flat, calls)
    received, like = _tensor(flat[0][time]), stacked(flat[0][sample])
    rows = len(calls[0].sample)
    others: dict[str, list[Any]] = {
        name: [flattened(trace.calls[0].arguments)[name] for trace in traces]
        for name in flat[0]
        if name not in (sample, time)
    }
    kinds = Kinds(num_classes)
    for name, values in others.items():
        kinds.add(name, values, [len(trace.prompts) for trace in traces])
    return Contract(
        sample=sample,
        sample_shape=() if like is None else tuple(like.shape[1:]),
        listed=not isinstance(flat[0][sample], Tensor),
        shape=shapes.pop(),
        time=time,
        time_shape=tuple(received.shape[1:]) if received.ndim and len(received) == rows else (),
        scale=scale,
        offset=offset,
        fields=kinds.fields,
        lists=tuple(kinds.lists),
        numbers=tuple(kinds.numbers),
        masks=kinds.masks(others),
        repeated=kinds.repeated,
        constants=kinds.constants,
        output=_relation(calls),
    )


def _sample_argument(flat: list[dict[str, Any]], calls: list[Call]) -> str:
    """The argument that is the scheduler's sample, times a number in each call."""
    for name in flat[0]:
        if all(
            sample_scale(values[name], call.sample) is not None
            for values, call in zip(flat, calls, strict=True)
        ):
            return name
    seen = ", ".join(
        f"{name}: {said(value)}" for name, value in flat[0].items() if stacked(value) is not None
    )
    raise unexplained(
        "none of the network's arguments is the scheduler's sample, times a number",
        f"{seen}; the sample: {said(calls[0].sample)}",
    )


def sample_scale(value: Any, sample: Tensor) -> float | None:
    """The factor between an argument and the scheduler's sample; None where it is not that."""
    whole = stacked(value)
    if whole is None or not whole.is_floating_point() or whole.numel() != sample.numel():
        return None
    ours, theirs = whole.double().flatten(), sample.double().flatten()
    factor = float(ours @ theirs / (theirs @ theirs).clamp_min(1e-30))
    return factor if factor > 0 and close(ours, factor * theirs) else None


def _affine(name: str, flat: list[dict[str, Any]], calls: list[Call]) -> tuple[float, float]:
    """The network's time as an affine function of the scheduler's."""
    values = [_tensor(call[name]).double().flatten() for call in flat]
    if any(bool((value != value[0]).any()) for value in values):
        raise unexplained(f"the time '{name}' differs within a batch", said(values[0]))
    received = torch.stack([value[0] for value in values])
    tau = torch.tensor([call.timestep for call in calls], dtype=torch.float64)
    if len(tau.unique()) < 3:
        raise unexplained("the pipeline took fewer than three different times", str(tau.tolist()))
    design = torch.stack([tau, torch.ones_like(tau)], 1)
    scale, offset = torch.linalg.lstsq(design, received[:, None]).solution.flatten().tolist()
    gap = (scale * tau + offset - received).abs().max().item()
    if gap > 1e-5 * received.abs().max().item():
        raise unexplained(
            f"the time '{name}' is no affine function of the scheduler's",
            f"{received.tolist()} at {tau.tolist()}",
        )
    # Rounding of the fit: most maps are 1, 1/1000, or their mirror images.
    return _tidy(scale, abs(scale)), _tidy(offset, received.abs().max().item())


def _tidy(value: float, size: float) -> float:
    """A number without the last digits of a fit in float32 to values of a size."""
    close = (round(value, digits) for digits in range(7) if abs(round(value, digits) - value) <= 2e-6 * size)
    return next(close, value) + 0.0


def _relation(calls: list[Call]) -> str:
    """What the scheduler receives of the network's output."""
    for name in OUTPUTS:
        if all(_explains(name, call) for call in calls):
            return name
    call = calls[0]
    raise unexplained(
        "what the scheduler receives is not the output, its negative, or its first half of channels",
        f"output {said(first_of(call.output))}, received {said(call.model_output)}",
    )


def _explains(name: str, call: Call) -> bool:
    try:
        found = prediction_of(call.output, name, call.model_output.shape)
    except (RuntimeError, UserError):
        return False
    return found.shape == call.model_output.shape and close(found.double(), call.model_output.double())


def _varies(traces: Sequence[Trace], name: str) -> bool:
    """Whether an argument changes from step to step of a run."""
    for trace in traces:
        values = [flattened(call.arguments)[name] for call in trace.calls]
        if not all(same(value, values[0]) for value in values):
            return True
    return False


def _tensor(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise unexplained("the time of the network is no number", said(value)) from error


def _names(names: set[frozenset[str]]) -> str:
    common = frozenset.intersection(*names)
    return "; ".join(sorted(", ".join(sorted(n - common)) or "the others alone" for n in names))


def take_exact_times(denoiser: Any) -> None:
    """Lets the network of a flow have times that the scheduler of its pipeline rounds down (UniPC).

    Euler's steps with fresh noise pass them as they are, and a rounded time has no derivative.
    """
    time: Any = getattr(denoiser, "time", None)
    if getattr(time, "whole", False):
        denoiser.time = replace(time, exact=True)
