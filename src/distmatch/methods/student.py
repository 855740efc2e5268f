"""The student: a one-step (or few-step) generator around a denoiser network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import latents
from distmatch.data.classes import Balance, Classes, checked_conditioning
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import ConditioningLike, ConditioningSpec, labels_of, spec_of
from distmatch.diffusion.noise import Karras
from distmatch.interop import HandedIn, decode_samples, load_denoiser, save_denoiser
from distmatch.interop.lora import merged
from distmatch.interop.saved import Base
from distmatch.methods.start import Network
from distmatch.methods.transport.semi_discrete import BrenierMap
from distmatch.nets.shared import adapted_of

Chain = Literal["renoise", "ddim", "posterior", "jump"]
"""How a student goes on to its next level: with fresh noise alone, with the noise that it has found, by a
draw from the posterior between the two levels, or by a jump of a network that knows where it goes."""


def chain_weights(chain: Chain, now: float, after: float, gamma: float = 0.0) -> tuple[float, float]:
    """The weights (kept, fresh) of a step ``x0 + kept (x - x0) + fresh eps`` from level ``now`` to ``after``.

    Each leaves noise of level ``after`` on ``x0`` where ``x - x0`` is noise of level ``now``.
    ``posterior`` is q(x_s | x_t, x0) of the diffusion itself, as in multi-step moment matching (Salimans et
    al. 2024, arXiv 2406.04103). ``jump`` is the gamma-sampling of CTM (Kim et al. 2024, arXiv 2310.02279): to
    the level sqrt(1 - gamma^2) s, for which the network gives x0, and fresh noise up to s. With gamma = 0 it
    follows the path, with gamma = 1 it is ``renoise``.
    """
    if chain == "renoise":
        return 0.0, after
    ratio = after / now
    if chain == "jump":
        return (1 - gamma**2) ** 0.5 * ratio, gamma * after
    if chain == "ddim":
        return ratio, 0.0
    return ratio**2, after * (1 - ratio**2) ** 0.5


def student_levels(calls: int, sigma: float, sigma_data: float) -> tuple[float, ...]:
    """Noise levels that a student of ``calls`` calls is evaluated at, from ``sigma`` down.

    They are equally spaced in the Karras parameter above EDM's smallest level, 0.002 for data of standard
    deviation 1/2, like the time steps 999, 749, 499, 249 of DMD2.

    Args:
        calls: Network calls.
        sigma: The first level.
        sigma_data: Standard deviation of the data.
    """
    if calls == 1:
        return (sigma,)
    share = torch.arange(calls - 1, 0, -1, dtype=torch.float64) / calls
    return (sigma, *Karras(0.004 * sigma_data, sigma).quantile(share).tolist())


class Student(nn.Module):
    """Turns noise into samples with ``len(levels)`` network calls.

    The first call denoises pure noise at ``levels[0]``; each further one takes up what the chain makes of the
    result at the next level.

    Args:
        denoiser: The network.
        levels: Decreasing noise levels, one for each call.
        info: What was distilled how; kept in the saved model's config.
        chain: How it goes from call to call.
        gamma: Share of fresh noise in a chain of jumps, in [0, 1].
        transport: A map from noise to stored samples of the teacher at the first level, where the chain then
            begins (DPM-OT).

    Attributes:
        from_noise: Whether the first input is noise alone, so that there is nothing to keep of it in a chain
            that draws from the posterior.
    """

    def __init__(
        self,
        denoiser: Network,
        levels: tuple[float, ...],
        info: dict[str, Any] | None = None,
        chain: Chain = "renoise",
        gamma: float = 0.0,
        transport: BrenierMap | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.levels = levels
        self.chain: Chain = chain
        self.gamma = gamma
        self.transport = transport
        self.from_noise = transport is None
        self.info = dict(info or {})

    def __repr__(self) -> str:
        """In a line; ``student.denoiser`` shows the layers."""
        known = {name: self.info.get(name) for name in ("method", "divergence")}
        said = [f"{name}={value!r}" for name, value in known.items() if value is not None]
        levels = ", ".join(f"{level:.4g}" for level in self.levels)
        parameters = sum(p.numel() for p in self.parameters())
        said += [f"calls={len(self.levels)}", f"levels=({levels})", f"shape={tuple(self.shape)}"]
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
        return len(self.levels)

    @property
    def draws(self) -> int:
        """Unit-noise tensors that a sample takes: one for each call, and one for a map's mixtures."""
        return self.nfe + (self.transport is not None)

    def start(self, noise: Tensor) -> Tensor:
        """The first input: unit noise scaled to the first level."""
        return noise * self.levels[0]

    def begin(self, noise: list[Tensor], conditioning: ConditioningLike) -> Tensor:
        """The input of the first call, from the unit noise of all of them.

        Raises:
            UserError: A conditional student with a map is asked for samples of no class.
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
        latent: Tensor = self.transport(noise[0], labels, self.levels[0], noise[-1])
        return latent

    def call(self, x: Tensor, index: int, conditioning: ConditioningLike = None) -> Tensor:
        """Network call number ``index`` (from 0) on an input at that level; returns clean samples.

        In a chain of jumps all but the last are only what leads to the next level.
        """
        sigma = torch.full(x.shape[:1], self.levels[index], device=x.device, dtype=x.dtype)
        to = self.goal(index)
        goal = {"target_sigma": torch.full_like(sigma, to)} if to else {}
        x0: Tensor = self.denoiser(x, sigma, conditioning, **goal)
        return x0

    def goal(self, index: int) -> float:
        """The level that call ``index`` is told to go to; 0, the data, but in a chain of jumps."""
        if self.chain != "jump" or index + 1 == self.nfe:
            return 0.0
        return (1 - self.gamma**2) ** 0.5 * self.levels[index + 1]

    def renoise(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean samples brought to the level of call ``index`` with fresh noise alone."""
        return x0 + self.levels[index] * noise

    def advance(self, x: Tensor, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """The input of call ``index``, from input ``x`` and output ``x0`` of the call before it."""
        if self.chain == "renoise" or (self.chain == "posterior" and index == 1 and self.from_noise):
            return self.renoise(x0, noise, index)
        kept, fresh = chain_weights(self.chain, self.levels[index - 1], self.levels[index], self.gamma)
        return x0 + kept * (x - x0) + fresh * noise

    def forward(self, noise: list[Tensor], conditioning: ConditioningLike = None) -> Tensor:
        """The whole chain from one unit-noise tensor for each call."""
        x = self.begin(noise, conditioning)
        x0 = self.call(x, 0, conditioning)
        for index in range(1, len(self.levels)):
            x = self.advance(x, x0, noise[index], index)
            x0 = self.call(x, index, conditioning)
        return x0

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        labels: ConditioningLike = None,
        class_balance: Balance = "data",
        batch: int = 1024,
        decode: bool = True,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: Number of samples.
            seed: Seed of the latents; sample i depends on the seed and i, not on ``batch``.
            labels: What the samples are conditioned on: classes (n,) int64, or a conditioning. A student of
                classes draws them when they are missing.
            class_balance: How: ``data`` in the shares of the data it was distilled with (evenly where these
                are not known), ``uniform`` evenly.
            batch: Samples at a time.
            decode: Whether the latents of a student that works on them become images.
            on_batch: Called with the number of samples after each batch.

        Returns:
            (n, *shape) float32 on the CPU, in model space (images in [-1, 1]).

        Raises:
            UserError: Labels of another length or out of range.
        """
        device = device_of(self)
        asked = checked_conditioning(labels, n, self, seed, self.classes.counts, class_balance)
        noise = [
            latents(n, self.shape, seed, "latents" if i == 0 else f"latents/{i}") for i in range(self.draws)
        ]
        out = []
        training = self.training
        self.eval()
        for begin in range(0, n, batch):
            part = slice(begin, begin + batch)
            told = asked.index(part).to(device)
            out.append(self([z[part].to(device) for z in noise], told).float().cpu())
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
        ``student.merged()`` is saved whole.

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
        self, denoiser: Network, levels: tuple[float, ...], info: dict[str, Any] | None = None
    ) -> Student:
        """A student of the same kind around another network, or on other levels."""
        return Student(denoiser, levels, info, self.chain, self.gamma, self.transport)

    def merged(self) -> Student:
        """The student with a whole network of its own: adapters are added to the weights of their base.

        One that was trained in full is returned as it is.
        """
        if adapted_of(self.denoiser) is None:
            return self
        return self.around(merged(self.denoiser), self.levels, self.info)

    def description(self) -> dict[str, Any]:
        """What is saved beside the network, as JSON."""
        chain: dict[str, Any] = {} if self.chain == "renoise" else {"chain": self.chain}
        if self.chain == "jump":
            chain["gamma"] = self.gamma
        return {"kind": "student", "levels": list(self.levels), **chain, **self.info}

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
            base: For a student of adapters: the folder of the teacher that they were trained on, or the
                teacher; None looks for it where it was.

        Raises:
            UserError: The folder holds no student, or a damaged one, or its base is not found or another one.
        """
        denoiser, info = load_denoiser(folder, network, base)
        if info.get("kind") != "student":
            raise UserError(
                f"{folder} holds a teacher, not a student", fix="pass the folder of a distillation run"
            )
        return student_from(denoiser, info)


def student_from(denoiser: Network, info: Mapping[str, Any]) -> Student:
    """The student of a saved model's denoiser and description."""
    own = {key: v for key, v in info.items() if key not in ("kind", "levels", "chain", "gamma", "tensors")}
    levels = tuple(float(v) for v in info["levels"])
    transport = BrenierMap.restored(info["tensors"]) if "tensors" in info else None
    chain, gamma = info.get("chain", "renoise"), float(info.get("gamma", 0.0))
    return Student(denoiser, levels, own, chain, gamma, transport)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device
