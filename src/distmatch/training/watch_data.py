"""The part of an evaluation that is cheap enough to be repeated during a training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.base.seeds import generator, stream_seed
from distmatch.data import Dataset
from distmatch.data.batches import BatchOf
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import LABEL, UNCONDITIONAL, Conditioning, cat, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import decode_samples, decoder_of
from distmatch.metrics import evaluate, pixels, reference_floor, reference_labels
from distmatch.metrics.features import Features
from distmatch.training.shared_draw import shared_features
from distmatch.training.watch_options import LEAST_SAMPLES

MEASURED = ("fd", "precision", "recall", "coverage")
"""What is measured against real data, of what an evaluation measures."""
_MOST_NUMBERS = 2**28  # of all samples together: a gibibyte
_INNER = 64  # features of the classifier, at most


class Sampler(Protocol):
    """Draws samples of the model in training, before any decoding; those of one seed from the same noise."""

    def __call__(self, n: int, conditioning: Conditioning, seed: int, first: int = 0) -> Tensor:
        """Samples ``first`` to ``first + n`` of a seed, (n, *shape)."""
        ...


@dataclass
class AgainstData:
    """Samples of a training against real data: the protocol of `distmatch evaluate` on fewer samples.

    Attributes:
        data: The real data, with the class numbers of the model.
        model: A denoiser of the samples: shape, conditions, decoder.
        n: Samples, of all ranks together; each measurement takes them in two blocks.
        batches: The batch of a step as the model takes it, whose conditions are those of samples that take
            more than labels.
        scaling: Of the data.
        ranks: The processes, which draw a share each.
        seed: Of the run.
        chunk: Samples at a time.
        device: Where to compute.
    """

    data: Dataset
    model: Denoiser
    n: int
    batches: BatchOf
    scaling: Scaling
    ranks: Ranks
    seed: int
    chunk: int
    device: torch.device
    _features: Features = field(init=False, repr=False)
    _floor: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _labels: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def said(self) -> dict[str, str | int]:
        """What stands beside the numbers: the feature space, and the samples in a block."""
        name = f"{self._features.name} {self._features.fingerprint}".strip()
        return {"features": name, "n": self.n // 2}

    @property
    def _by_label(self) -> bool:
        return set(spec_of(self.model)) == {LABEL} and self.data.labels is not None

    def begin(self) -> None:
        """Makes the feature space, trained on the data where it is a classifier, and measures real data."""
        self._features = shared_features("auto", self.data, self.ranks)
        if self._by_label:
            self._labels = reference_labels(self.data, self.n, seed=self.seed)
        floor = reference_floor(
            self.data,
            features=self._features,
            n=self.n // 2,
            seed=self.seed,
            stratified=self._labels is not None,
            ranks=self.ranks,
        )
        self._floor = {f"floor_{name}": floor[name].value for name in MEASURED}

    def draw(self, sampler: Sampler) -> Tensor:
        """The samples, decoded, the same noise and conditions every time; (n, *shape) on the CPU.

        Every process makes the same number of network calls, as weights may be shared out.
        """
        decoded = tuple(self.data.shape) != tuple(self.model.shape)
        own = -(-self.n // self.ranks.size)
        begin, end = own * self.ranks.index, own * (self.ranks.index + 1)
        parts = []
        for first in range(begin, end, self.chunk):
            count = min(self.chunk, end - first)
            z = sampler(count, self._asked(first, count), stream_seed(self.seed, "watch/data"), first)
            x = decode_samples(self.model, z, self.chunk, device=self.device) if decoded else z
            parts.append(self.scaling.settled(x.float().cpu()))
        return self.ranks.gather(torch.cat(parts))[: self.n]

    def measure(self, x: Tensor) -> dict[str, float]:
        """The metrics of samples of :meth:`draw`: values, standard errors, and those of real data."""
        found = evaluate(
            x,
            self.data,
            labels=self._labels,
            features=self._features,
            n=self.n // 2,
            seed=self.seed,
            ranks=self.ranks,
        )
        values = {name: found[name].value for name in MEASURED}
        errors = {f"{name}_stderr": found[name].stderr for name in MEASURED}
        return {**values, **errors, **self._floor}

    def statistics_seconds(self) -> float:
        """Seconds that the metrics alone take, measured on random numbers in place of features."""
        numbers = pixels()(self.data.batch(torch.arange(1))[0]).shape[1]
        labeled = self.data.num_classes > 1
        gen = generator(self.seed, "watch/dry")
        x, y = torch.randn(2, self.n, min(numbers, _INNER) if labeled else numbers, generator=gen)
        began = time.perf_counter()
        evaluate(x, y, features="pixels", n=self.n // 2)
        return time.perf_counter() - began

    def _asked(self, first: int, count: int) -> Conditioning:
        """The conditions of some of the samples: labels in the shares of the data, or as they are drawn."""
        if not spec_of(self.model):
            return UNCONDITIONAL
        places = torch.arange(first, first + count)
        if self._labels is not None:
            return Conditioning({LABEL: self._labels[places % self.n]})
        size = len(self.batches(0).x)
        steps = range(first // size, (first + count - 1) // size + 1)
        rows = [self.batches(step).conditioning for step in steps]
        return cat(rows).index(places - steps[0] * size) if rows[0] else UNCONDITIONAL


def samples_against(data: Dataset | None, model: Denoiser, asked: int) -> int:
    """How many samples are measured against data; 0 where they cannot be.

    An even number: those that are asked for, at most as many as there are data, and a gibibyte.

    Args:
        data: The real data; None: there are none.
        model: A denoiser of the samples; the data are its samples, or those of its decoder.
        asked: The number that is asked for.
    """
    if data is None or not asked:
        return 0
    if tuple(data.shape) not in (tuple(model.shape), tuple((decoder_of(model) or model).shape)):
        return 0
    n = min(asked, len(data), _MOST_NUMBERS // math.prod(data.shape)) // 2 * 2
    return n if n >= LEAST_SAMPLES else 0


def require_data(keep_best: str, against: object) -> None:
    """Refuses to choose the best checkpoint by real data where nothing is measured against any.

    Raises:
        UserError: It is to be chosen so.
    """
    if keep_best == "fd" and against is None:
        raise UserError(
            "--keep-best fd compares samples with real data, and there are none that it can take",
            expected=f"--data with {LEAST_SAMPLES} samples or more of the shape of the model's",
            fix="use --keep-best energy, which compares a student with its teacher",
        )


MakeSampler = Callable[[], Sampler]
"""Makes what the samples of the model in training are drawn by: of the averaged weights as they are now."""
