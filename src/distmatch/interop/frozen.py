"""A student's network calls at their fixed levels: what depends on the level alone, turned into numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distmatch.base.seeds import generator, initial_noise
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    FieldSpec,
    example_conditioning,
    spec_of,
)
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.lora import merged

_LABELS = "labels"  # the name of class labels among the inputs of a graph
_LENGTH = 4  # of axes of any size in random conditions; 0 and 1 would be constants of a graph


class StudentLike(Protocol):
    """What an export needs of a student; :class:`distmatch.methods.student.Student` is one.

    Attributes:
        denoiser: Its network as a denoiser.
        levels: Decreasing noise levels, one for each call.
        from_noise: Whether its first input is the noise itself, scaled.
    """

    denoiser: Any
    sigmas: tuple[float, ...]
    from_noise: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when unconditional."""

    @property
    def draws(self) -> int:
        """Unit-noise tensors that a sample takes."""

    def goal(self, index: int) -> float:
        """The target noise level of a step; 0 is the data."""

    def description(self) -> dict[str, Any]:
        """What is known of it, as JSON."""

    def __call__(self, noise: list[Tensor], conditioning: Conditioning | None = None) -> Tensor:
        """Samples from that many unit-noise tensors."""


@dataclass(frozen=True)
class Call:
    """A denoiser at one level: ``D(y, sigma) = skip y + gain net(scale y, time)``.

    Attributes:
        sigma: The level.
        scale: What the network's input is multiplied by.
        skip: Factor of the input in the output.
        gain: Factor of the network's output.
        time: The network's noise-level input, (1,) or (1, 2) with two noise levels.
    """

    sigma: float
    scale: float
    skip: float
    gain: float
    time: Tensor


class _Probe(nn.Module):
    """Replaces a network: it keeps what it is given and answers one number.

    Args:
        answer: The number.
    """

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """The answer, in the shape of ``x``."""
        self.x, self.time = x, time
        return torch.full_like(x, self.answer)


def frozen_call(denoiser: Any, sigma: float, to: float = 0.0) -> Call:
    """The numbers of a denoiser with a network ``net``, whatever the network predicts, at one level.

    Every such denoiser is affine in its input and in what its network returns, so two questions are enough.
    They are asked in float32, as the student computes them. ``to`` is the target noise level of a network
    that jumps; 0, the data, needs no telling.
    """
    level, one = torch.full((1,), sigma), torch.ones(1, *denoiser.shape)
    goal = {"target_sigma": torch.full((1,), to)} if to else {}
    conditioning = example_conditioning(denoiser, 1)
    silent, loud = _Probe(0.0), _Probe(1.0)
    # The copies share everything but the network, which is not copied.
    skip = copy.deepcopy(denoiser, {id(denoiser.net): silent})(one, level, conditioning, **goal)
    gain = copy.deepcopy(denoiser, {id(denoiser.net): loud})(
        torch.zeros_like(one), level, conditioning, **goal
    )
    return Call(sigma, _number(silent.x), _number(skip), _number(gain), silent.time)


def _number(constant: Tensor) -> float:
    return float(constant.flatten()[0])


class PlainNet(nn.Module):
    """A network of diffusers as ``net(x, time, labels)``, without a look at the values of the labels.

    Args:
        net: The network, with its label for none and the sign of its output.
    """

    def __init__(self, net: DiffusersNet) -> None:
        super().__init__()
        self.model = net.model
        self.channels, self.sign = net.channels, net.sign
        self.null_class, self.takes_labels = net.null_class, net.takes_labels

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        arguments = {}
        if self.takes_labels:
            none = self.null_class
            if labels is None:
                labels = torch.full((x.shape[0],), -1, device=x.device)
            arguments["class_labels"] = labels if none is None else torch.where(labels < 0, none, labels)
        return self.sign * self.model(x, time, return_dict=False, **arguments)[0][:, : self.channels]


class Portable(nn.Module):
    """A student in plain operations on tensors: ``forward(noise, ..., condition, ...)``.

    Args:
        student: The student; it is copied to the CPU, in float32.

    Attributes:
        spec: The fields of its conditioning, in the order of the inputs, after the noise.
    """

    def __init__(self, student: StudentLike) -> None:
        super().__init__()
        own: Any = copy.deepcopy(student)
        own.denoiser = merged(own.denoiser)
        self.student = own.cpu().float().eval().requires_grad_(False)
        self.draws, self.spec = student.draws, dict(spec_of(student.denoiser))
        denoiser = self.student.denoiser
        self.by_name = getattr(denoiser, "by_name", False)
        # The same student, and one with the same sampler but the steps below.
        self.plain = copy.copy(self.student)
        if not isinstance(getattr(denoiser, "net", None), nn.Module):
            return  # a module that is a denoiser itself has no part that does not depend on the level
        if set(self.spec) - {LABEL} and not self.by_name:
            return  # how it passes its conditions on to its network is not known
        self.calls = [frozen_call(denoiser, s, student.goal(i)) for i, s in enumerate(student.sigmas)]
        self.net = PlainNet(denoiser.net) if isinstance(denoiser.net, DiffusersNet) else denoiser.net
        self.null_class = getattr(denoiser, "null_class", None)
        self.plain.call = self._call

    @property
    def names(self) -> list[str]:
        """The names of the inputs: noise, one for each draw, and conditions."""
        noise = ["noise" if index == 0 else f"noise_{index}" for index in range(self.draws)]
        return [*noise, *(_LABELS if field == LABEL else field for field in self.spec)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Samples (B, *shape) from unit noise, each (B, *shape), and conditions, each (B, ...)."""
        return self.plain(*self._sorted(inputs))

    def _call(self, x: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        call = self.calls[index]
        time = call.time.expand(x.shape[0], *call.time.shape[1:])
        fields = dict(conditioning)
        if LABEL in fields and self.null_class is not None:
            fields[LABEL] = torch.where(fields[LABEL] < 0, self.null_class, fields[LABEL])
        scaled = call.scale * x
        predicted = (
            self.net(scaled, time, **fields) if self.by_name else self.net(scaled, time, *fields.values())
        )
        return call.skip * x + call.gain * predicted

    def _sorted(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Conditioning]:
        conditions = zip(self.spec, inputs[self.draws :], strict=True)
        # Unchecked: a comparison of the numbers of rows would fix the batch of a graph.
        return list(inputs[: self.draws]), Conditioning._derived(dict(conditions))

    def inputs(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs for ``n`` samples; conditions of any size have a size that depends on the seed."""
        shape = self.student.shape
        noise = [initial_noise(n, shape, seed, f"export/{index}") for index in range(self.draws)]
        denoiser = self.student.denoiser
        # Null classes cannot be requested by their numbers.
        nulls = [getattr(part, "null_class", None) for part in (denoiser, getattr(denoiser, "net", None))]
        names = self.names[self.draws :]
        conditions = [
            _random(field, n, seed, f"export/{name}", nulls)
            for name, field in zip(names, self.spec.values(), strict=True)
        ]
        return (*noise, *conditions)

    @torch.no_grad()
    def expected(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the student itself makes of such inputs."""
        return self.student(*self._sorted(inputs))


def _random(field: FieldSpec, n: int, seed: int, stream: str, nulls: list[int | None]) -> Tensor:
    """Values of a field for ``n`` samples: normal, classes, or 0 and 1, which every table of words has."""
    shape = (n, *(_LENGTH + seed if size < 0 else size for size in field.shape))
    source = generator(seed, stream)
    if field.dtype.is_floating_point:
        return torch.randn(shape, generator=source)
    found = torch.randint(field.classes or 2, shape, generator=source)
    for null in nulls if field.classes else ():
        found = found if null is None else torch.where(found == null, (null + 1) % field.classes, found)
    return found.to(field.dtype)
