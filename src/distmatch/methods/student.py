"""The student: a one-step (or few-step) generator around a denoiser network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import initial_noise
from distmatch.data.classes import Balance, Classes, checked_conditioning
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import ConditioningLike, ConditioningSpec, labels_of, spec_of
from distmatch.interop import HandedIn, decode_samples, load_denoiser, save_denoiser
from distmatch.interop.lora import merged
from distmatch.interop.pipelines.contract import take_exact_times
from distmatch.interop.saved import Base
from distmatch.methods.initialization import Network
from distmatch.methods.sampler import Sampler, sampler_weights
from distmatch.methods.transport.semi_discrete import BrenierMap
from distmatch.nets.shared import adapted_of

_EXACT = "exact_times"
_IN_FILES: dict[str, str] = {"stochastic": "renoise", "gamma": "jump"}  # as saved models name them


class Student(nn.Module):
    """Turns noise into samples with ``len(sigmas)`` network calls.

    The first step denoises pure noise at ``sigmas[0]``; each further one starts from what the
    sampler makes of the result at the next noise level.

    Args:
        denoiser: The network.
        sigmas: Decreasing noise levels, one for each call.
        info: What was distilled how; kept in the saved model's config.
        sampler: How a further step starts from the result of the one before.
        gamma: Share of fresh noise between jumps, in [0, 1].
        transport: A map from noise to stored samples of the teacher at the first sigma, where sampling then
            starts (DPM-OT).

    Attributes:
        from_noise: Whether the first input is noise alone, so that a sampler that draws from the posterior
            has nothing to keep of it.
    """

    def __init__(
        self,
        denoiser: Network,
        sigmas: tuple[float, ...],
        info: dict[str, Any] | None = None,
        sampler: Sampler = "stochastic",
        gamma: float = 0.0,
        transport: BrenierMap | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigmas = sigmas
        self.sampler: Sampler = sampler
        self.gamma = gamma
        self.transport = transport
        self.from_noise = transport is None
        self.info = dict(info or {})

    def __repr__(self) -> str:
        """In a line; ``student.denoiser`` shows the layers."""
        known = {name: self.info.get(name) for name in ("method", "divergence")}
        said = [f"{name}={value!r}" for name, value in known.items() if value is not None]
        sigmas = ", ".join(f"{level:.4g}" for level in self.sigmas)
        parameters = sum(p.numel() for p in self.parameters())
        said += [f"num_steps={len(self.sigmas)}", f"sigmas=({sigmas})", f"shape={tuple(self.shape)}"]
        return f"{type(self).__name__}({', '.join(said)}, {parameters:,} parameters)"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.denoiser.shape

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when unconditional."""
        return self.denoiser.num_classes

    @property
    def conditioning_spec(self) -> ConditioningSpec:
        """The conditions that it takes."""
        return spec_of(self.denoiser)

    @property
    def classes(self) -> Classes:
        """Names of its classes, and their counts in the data it was distilled with, as far as known."""
        return Classes.from_dict(self.info.get("data") or {}, self.num_classes)

    @property
    def nfe(self) -> int:
        """Network calls for a sample."""
        return len(self.sigmas)

    @property
    def draws(self) -> int:
        """Unit-noise tensors that a sample takes: one for each call, and one for a map's mixtures."""
        return self.nfe + (self.transport is not None)

    def start(self, noise: Tensor) -> Tensor:
        """The first input: unit noise scaled to the first level."""
        return noise * self.sigmas[0]

    def begin(self, noise: list[Tensor], conditioning: ConditioningLike) -> Tensor:
        """The input of the first call, from the unit noise of all of them.

        Raises:
            UserError: A conditional student with a map is sampled without a class.
        """
        if self.transport is None:
            return self.start(noise[0])
        labels = labels_of(conditioning) if self.num_classes else None
        if self.num_classes and (labels is None or bool((labels < 0).any())):
            raise UserError(
                "this student has stored latents of each class and none without a class",
                got="label -1, or no labels",
                expected=f"labels from 0 to {self.num_classes - 1}",
            )
        latent: Tensor = self.transport(noise[0], labels, self.sigmas[0], noise[-1])
        return latent

    def call(self, x: Tensor, index: int, conditioning: ConditioningLike = None) -> Tensor:
        """Network call number ``index`` (from 0) on an input at that level; returns clean samples.

        In gamma-sampling all but the last only lead to the next noise level.
        """
        sigma = torch.full(x.shape[:1], self.sigmas[index], device=x.device, dtype=x.dtype)
        to = self.goal(index)
        goal = {"target_sigma": torch.full_like(sigma, to)} if to else {}
        x0: Tensor = self.denoiser(x, sigma, conditioning, **goal)
        return x0

    def goal(self, index: int) -> float:
        """The target level of call ``index``: 0, the data, except in gamma-sampling."""
        if self.sampler != "gamma" or index + 1 == self.nfe:
            return 0.0
        return (1 - self.gamma**2) ** 0.5 * self.sigmas[index + 1]

    def renoise(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean samples brought to the level of call ``index`` with fresh noise alone."""
        return x0 + self.sigmas[index] * noise

    def advance(self, x: Tensor, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """The input of call ``index``, from input ``x`` and output ``x0`` of the call before it."""
        if self.sampler == "stochastic" or (self.sampler == "posterior" and index == 1 and self.from_noise):
            return self.renoise(x0, noise, index)
        kept, fresh = sampler_weights(self.sampler, self.sigmas[index - 1], self.sigmas[index], self.gamma)
        return x0 + kept * (x - x0) + fresh * noise

    def forward(self, noise: Tensor | list[Tensor], conditioning: ConditioningLike = None) -> Tensor:
        """All steps: ``student(noise, labels)``.

        Args:
            noise: Unit normal noise (B, *shape); for a student of several steps a list, one for each.
            conditioning: Class labels (B,) int64, a conditioning, or None.

        Returns:
            (B, *shape), in model space, before any decoding of latents.

        Raises:
            UserError: Not as many tensors of noise as steps.
        """
        noise = [noise] if isinstance(noise, Tensor) else noise
        if len(noise) != self.draws:
            raise UserError(
                "a student takes a tensor of unit noise for each of its steps",
                got=f"{len(noise)}",
                expected=f"{self.draws}",
                fix="pass a list, or use student.sample(n), which draws the noise",
            )
        x = self.begin(noise, conditioning)
        x0 = self.call(x, 0, conditioning)
        for index in range(1, len(self.sigmas)):
            x = self.advance(x, x0, noise[index], index)
            x0 = self.call(x, index, conditioning)
        return x0

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        conditioning: ConditioningLike = None,
        class_balance: Balance = "data",
        batch: int = 1024,
        decode: bool = True,
        on_batch: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: Number of samples.
            seed: Seed of the latents; sample i depends on the seed and i, not on ``batch``.
            conditioning: What the samples are conditioned on: classes (n,) int64, or a conditioning. Without
                it a class-conditional student draws the classes.
            class_balance: How: ``data`` in the shares of the data it was distilled with (evenly where these
                are not known), ``uniform`` evenly.
            batch: Samples at a time.
            decode: Whether the latents of a student that works on them become images.
            on_batch: Called with the number of samples after each batch.
            first: Number of the first sample: a part of a larger set is drawn alone.

        Returns:
            (n, *shape) float32 on the CPU, in model space (images in [-1, 1]).

        Raises:
            UserError: Labels of another length or out of range.
        """
        if n < 0 or batch < 1:
            raise UserError(
                "there must be 0 samples or more, and at least 1 at a time", got=f"n={n}, batch={batch}"
            )
        device = device_of(self)
        asked = checked_conditioning(conditioning, n, self, seed, self.classes.counts, class_balance, first)
        noise = [
            initial_noise(n, self.shape, seed, "latents" if i == 0 else f"latents/{i}", first=first)
            for i in range(self.draws)
        ]
        out = []
        training = self.training
        self.eval()
        for begin in range(0, n, batch):
            part = slice(begin, begin + batch)
            cond = asked.index(part).to(device)
            out.append(self([z[part].to(device) for z in noise], cond).float().cpu())
            if on_batch is not None:
                on_batch(len(out[-1]))
        self.train(training)
        x = torch.cat(out) if out else torch.empty(0, *self.shape)
        return decode_samples(self.denoiser, x, device=device) if decode else x

    def export(self, x: Tensor) -> np.ndarray:
        """Samples in the user's units: images (N, H, W[, C]) uint8, vectors (N, D) float32.

        Raises:
            UserError: The student does not know the scaling of its data.
        """
        scaling = self.info.get("data", {}).get("scaling")
        if scaling is None:
            raise UserError("this student was distilled without data", fix="use its samples as they are")
        return Scaling.from_dict(scaling).export(x)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        license: str = "",
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes ``model.safetensors``, ``config.json`` and a model card, ``README.md``, atomically.

        Of a student with adapters these alone are written, and which base they belong to;
        ``student.merged()`` is saved as a full network.

        Args:
            folder: The model folder; an earlier model in it is replaced.
            license: The licence that the model is given, such as ``"apache-2.0"``; it is kept with the model.
            metrics: The content of a run's ``metrics.json``, for the card.

        Raises:
            UserError: The folder holds something else, or cannot be written.
        """
        about = {**self.description(), **({"license": license} if license else {})}
        tensors = None if self.transport is None else self.transport.state_dict()
        save_denoiser(folder, self.denoiser, about, tensors, metrics)

    def around(
        self, denoiser: Network, sigmas: tuple[float, ...], info: dict[str, Any] | None = None
    ) -> Student:
        """A student of the same kind around another network, or on other levels."""
        return Student(denoiser, sigmas, info, self.sampler, self.gamma, self.transport)

    def merged(self) -> Student:
        """The student with a full network: adapters are added to the weights of their base.

        One that was trained in full is returned as it is.
        """
        if adapted_of(self.denoiser) is None:
            return self
        return self.around(merged(self.denoiser), self.sigmas, self.info)

    def description(self) -> dict[str, Any]:
        """The entries that are saved with the network, as JSON."""
        name = _IN_FILES.get(self.sampler, self.sampler)
        sampler: dict[str, Any] = {} if self.sampler == "stochastic" else {"chain": name}
        if self.sampler == "gamma":
            sampler["gamma"] = self.gamma
        if getattr(getattr(self.denoiser, "time", None), "exact", False):
            sampler[_EXACT] = True
        return {"kind": "student", "levels": list(self.sigmas), **sampler, **self.info}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        network: HandedIn | None = None,
        base: Base | None = None,
    ) -> Student:
        """Reads what :meth:`save_pretrained` wrote, or the ``model/`` of a run folder.

        Args:
            folder: The folder.
            network: For a student of a network of your own: the module (its weights are replaced in a copy),
                its class, or a denoiser around it.
            base: For a student of adapters, or of a pipeline: the folder of the teacher that it was trained
                from, or the teacher; None looks for it where it was.

        Raises:
            UserError: The folder holds no student, or a damaged one, or its base is not found or another one.
        """
        denoiser, info = load_denoiser(folder, network, base)
        if info.get("kind") != "student":
            raise UserError(
                f"{folder} contains a teacher, not a student", fix="pass the folder of a distillation run"
            )
        return student_from(denoiser, info)


def student_from(denoiser: Network, info: Mapping[str, Any]) -> Student:
    """The student of a saved model's denoiser and description.

    Its parameters do not learn, as those of a run's result do not: kernels may round in another way where
    gradients are wanted.
    """
    known = ("kind", "levels", "chain", "gamma", "tensors", _EXACT)
    own = {key: v for key, v in info.items() if key not in known}
    if info.get(_EXACT):
        take_exact_times(denoiser)
    sigmas = tuple(float(v) for v in info["levels"])
    transport = BrenierMap.restored(info["tensors"]) if "tensors" in info else None
    name, gamma = info.get("chain", "renoise"), float(info.get("gamma", 0.0))
    sampler: Any = {old: new for new, old in _IN_FILES.items()}.get(name, name)
    return Student(denoiser.requires_grad_(False), sigmas, own, sampler, gamma, transport)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device
