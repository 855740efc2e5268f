"""A student's network calls at their fixed levels: what depends on the level alone, turned into numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator, initial_noise
from distmatch.diffusion.conditioning import LABEL, spec_of
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.lora import merged


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

    def __call__(self, noise: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Samples from that many unit-noise tensors."""


@dataclass(frozen=True)
class Call:
    """A denoiser at one level: ``D(y, sigma) = skip y + gain net(scale y, told)``.

    Attributes:
        sigma: The level.
        scale: What the network's input is multiplied by.
        skip: Factor of the input in the output.
        gain: Factor of the network's output.
        told: The network's noise-level input, (1,) or (1, 2) with two noise levels.
    """

    sigma: float
    scale: float
    skip: float
    gain: float
    told: Tensor


class _Probe(nn.Module):
    """Replaces a network: it keeps what it is given and answers one number.

    Args:
        answer: The number.
    """

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        """The answer, in the shape of ``x``."""
        self.x, self.told = x, told
        return torch.full_like(x, self.answer)


def frozen_call(denoiser: Any, sigma: float, to: float = 0.0) -> Call:
    """The numbers of a denoiser with a network ``net``, whatever the network predicts, at one level.

    Every such denoiser is affine in its input and in what its network returns, so two questions are enough.
    They are asked in float32, as the student computes them. ``to`` is the target noise level of a network
    that jumps; 0, the data, needs no telling.
    """
    level, one = torch.full((1,), sigma), torch.ones(1, *denoiser.shape)
    goal = {"target_sigma": torch.full((1,), to)} if to else {}
    labels = torch.zeros(1, dtype=torch.int64) if denoiser.num_classes else None
    silent, loud = _Probe(0.0), _Probe(1.0)
    # The copies share everything but the network, which is not copied.
    skip = copy.deepcopy(denoiser, {id(denoiser.net): silent})(one, level, labels, **goal)
    gain = copy.deepcopy(denoiser, {id(denoiser.net): loud})(torch.zeros_like(one), level, labels, **goal)
    return Call(sigma, _number(silent.x), _number(skip), _number(gain), silent.told)


def _number(constant: Tensor) -> float:
    return float(constant.flatten()[0])


class PlainNet(nn.Module):
    """A network of diffusers as ``net(x, told, labels)``, without a look at the values of the labels.

    Args:
        net: The network, with its label for none and the sign of its output.
    """

    def __init__(self, net: DiffusersNet) -> None:
        super().__init__()
        self.model = net.model
        self.channels, self.sign = net.channels, net.sign
        self.null_class, self.takes_labels = net.null_class, net.takes_labels

    def forward(self, x: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        arguments = {}
        if self.takes_labels:
            none = self.null_class
            if labels is None:
                labels = torch.full((x.shape[0],), -1, device=x.device)
            arguments["class_labels"] = labels if none is None else torch.where(labels < 0, none, labels)
        return self.sign * self.model(x, told, return_dict=False, **arguments)[0][:, : self.channels]


class Portable(nn.Module):
    """A student in plain operations on tensors: ``forward(noise, ..., labels)``.

    Args:
        student: The student; it is copied to the CPU, in float32.

    Raises:
        UserError: It is conditioned on more than labels.
    """

    def __init__(self, student: StudentLike) -> None:
        super().__init__()
        if others := set(spec_of(student.denoiser)) - {LABEL}:
            raise UserError(
                "ONNX graphs take class labels only, and this student takes another conditioning",
                got=f"conditions {', '.join(sorted(others))}",
                fix="save it as a model folder: student.save_pretrained(folder)",
            )
        own: Any = copy.deepcopy(student)
        own.denoiser = merged(own.denoiser)
        self.student = own.cpu().float().eval().requires_grad_(False)
        self.draws, self.conditional = student.draws, student.num_classes > 0
        denoiser = self.student.denoiser
        # The same student, and one with the same sampler but the steps below.
        self.plain = copy.copy(self.student)
        if not isinstance(getattr(denoiser, "net", None), nn.Module):
            return  # a module that is a denoiser itself has no part that does not depend on the level
        self.calls = [frozen_call(denoiser, s, student.goal(i)) for i, s in enumerate(student.sigmas)]
        self.net = PlainNet(denoiser.net) if isinstance(denoiser.net, DiffusersNet) else denoiser.net
        self.plain.call = self._call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Samples (B, *shape) from unit noise, each (B, *shape), and labels (B,) where it has classes."""
        return self.plain(*self._sorted(inputs))

    def _call(self, x: Tensor, index: int, labels: Tensor | None = None) -> Tensor:
        call = self.calls[index]
        told = call.told.expand(x.shape[0], *call.told.shape[1:])
        arguments = (labels,) if self.conditional else ()
        return call.skip * x + call.gain * self.net(call.scale * x, told, *arguments)

    def _sorted(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor | None]:
        return list(inputs[: self.draws]), inputs[self.draws] if self.conditional else None

    def inputs(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs for ``n`` samples."""
        shape = self.student.shape
        noise = [initial_noise(n, shape, seed, f"export/{index}") for index in range(self.draws)]
        if self.conditional:
            classes = self.student.num_classes
            noise.append(torch.randint(classes, (n,), generator=generator(seed, "export/labels")))
        return tuple(noise)

    @torch.no_grad()
    def expected(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the student itself makes of such inputs."""
        return self.student(*self._sorted(inputs))
