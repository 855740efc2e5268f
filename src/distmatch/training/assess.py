"""Measuring teacher and student on the same latents and labels, and writing what was found."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.base.files import atomic_json, atomic_write
from distmatch.base.progress import progress
from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    ConditioningLike,
    ConditioningSpec,
    labels_of,
)
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import sample_teacher
from distmatch.interop import decode_samples
from distmatch.interop.card import refresh_card
from distmatch.methods.student import Student
from distmatch.metrics import evaluate, reference_floor, reference_labels
from distmatch.metrics.features import Features
from distmatch.training.log import EventLog
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import Sampling

HEUN = Sampling()


@dataclass(frozen=True)
class SampleResult:
    """Samples of one model and what they cost.

    Attributes:
        x: (n, *shape) float32 on the CPU, in model space.
        labels: The requested labels, (n,), or None.
        nfe: Network calls for each sample, counted.
        seconds_per_1000: Wall-clock seconds for 1000 samples.
    """

    x: Tensor
    labels: Tensor | None
    nfe: int
    seconds_per_1000: float


class _CountingStudent:
    """Counts the calls of a student's network while it samples."""

    def __init__(self, student: Student) -> None:
        self.calls = 0
        self._handle = student.denoiser.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def done(self) -> int:
        self._handle.remove()
        return self.calls


def draw_student(
    student: Student, n: int, conditioning: ConditioningLike, seed: int, batch: int = 1024
) -> SampleResult:
    """Samples a student, counting calls and time."""
    counter = _CountingStudent(student)
    with progress(n, desc="student samples") as bar:
        began = time.perf_counter()
        x = student.sample(n, seed=seed, conditioning=conditioning, batch=batch, on_batch=bar.update)
        seconds = time.perf_counter() - began
    batches = math.ceil(n / batch)
    return SampleResult(x, labels_of(conditioning), counter.done() // batches, 1000 * seconds / n)


def draw_teacher(
    teacher: Denoiser,
    n: int,
    conditioning: ConditioningLike,
    seed: int,
    sampling: Sampling = HEUN,
    *,
    batch: int = 1024,
    device: torch.device | str = "cpu",
) -> SampleResult:
    """Samples a teacher, by default with Heun's method, counting calls and time.

    Args:
        teacher: The teacher; the samples of one that works on latents are decoded.
        n: Number of samples.
        conditioning: What they are conditioned on: classes (n,), a conditioning, or None.
        seed: Seed of all noise.
        sampling: Solver, grid and guidance.
        batch: Samples at a time.
        device: Where to compute.

    Raises:
        UserError: Settings that do not go together, or not with this teacher.
    """
    sampling.check(teacher)
    counter = CallCounter(sampling.around(teacher))
    with progress(n, desc="teacher samples") as bar:
        began = time.perf_counter()
        z = sample_teacher(
            counter,
            n,
            solver=sampling.solver,
            grid=sampling.levels(teacher),
            path=sampling.path_for(teacher),
            conditioning=conditioning,
            seed=seed,
            batch=batch,
            device=device,
            on_batch=bar.update,
        )
        with torch.no_grad():
            x = decode_samples(teacher, z, device=device)
        seconds = time.perf_counter() - began
    # A solver that chooses its own steps may take more of them for one batch than for another.
    calls = round(counter.calls / math.ceil(n / batch))
    return SampleResult(x, labels_of(conditioning), calls, 1000 * seconds / n)


def assess(
    data: Dataset,
    models: dict[str, Callable[[int, Conditioning], SampleResult]],
    *,
    asked: Conditioning,
    features: str | Features = "auto",
    n: int,
    seed: int = 0,
    mixture: GaussianMixture | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, SampleResult]]:
    """Draws from each model under the same conditions and from the same noise, and measures all at one N.

    Args:
        data: The real data.
        models: ``teacher`` and ``student``: functions of (count, conditioning) that draw.
        asked: What the samples are conditioned on, see :func:`asked_of`.
        features: As in :func:`distmatch.metrics.evaluate`.
        n: Samples in a block; two blocks are drawn from each model.
        seed: Chooses blocks and labels.
        mixture: The exact mixture behind the data, for the mode metrics.

    Returns:
        The content of ``metrics.json`` as estimates, and the samples by model, the reference's included.
    """
    labels = asked.label
    common: dict[str, Any] = {"features": features, "n": n, "seed": seed, "mixture": mixture}
    floor = reference_floor(data, stratified=labels is not None, **common)
    result: dict[str, dict[str, Any]] = {"reference": {"nfe": None, "seconds_per_1000": None, **floor}}
    drawn: dict[str, SampleResult] = {"reference": _reference(data, labels, 2 * n, seed)}
    for name, draw in models.items():
        samples = draw(2 * n, asked)
        drawn[name] = samples
        measured = evaluate(samples.x, data, labels=labels, **common)
        result[name] = {"nfe": samples.nfe, "seconds_per_1000": samples.seconds_per_1000, **measured}
    return result, drawn


def _reference(data: Dataset, labels: Tensor | None, n: int, seed: int) -> SampleResult:
    """Real samples with the same labels in the same order, for comparison in pictures."""
    x, real = data.batch(_rows(data, labels, n, seed))
    return SampleResult(x, real if labels is None else labels, 0, 0.0)


def asked_of(data: Dataset, spec: ConditioningSpec, n: int, seed: int) -> Conditioning:
    """The conditioning of samples: labels in the data's proportions, further conditions of real samples.

    Args:
        data: The real data.
        spec: What the models take.
        n: Number of samples.
        seed: Of the choice.
    """
    labels = reference_labels(data, n, seed=seed) if LABEL in spec else None
    fields = {} if labels is None else {LABEL: labels}
    if others := set(spec) - {LABEL}:
        rows = _rows(data, labels, n, seed)
        fields |= {name: data.conditions[name][rows] for name in sorted(others)}
    return Conditioning(fields)


def _rows(data: Dataset, labels: Tensor | None, n: int, seed: int) -> Tensor:
    """Real samples in random order, with the classes of ``labels`` where there are any."""
    order = torch.randperm(len(data), generator=generator(seed, "assess/reference"))
    if labels is not None and data.labels is not None:
        chosen = torch.zeros(n, dtype=torch.int64)
        for label in labels.unique():
            where = (labels == label).nonzero()[:, 0]
            pool = order[data.labels[order] == label]
            chosen[where] = pool[torch.arange(len(where)) % len(pool)]
        order = chosen
    return order[:n]


def plain(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The JSON form of what :func:`assess` measured."""
    return {
        model: {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in values.items()}
        for model, values in metrics.items()
    }


def npz_bytes(x: np.ndarray, labels: Tensor | None, names: Sequence[str] = ()) -> bytes:
    """An ``.npz`` archive with ``x`` and, where there are any, ``labels`` and ``class_names``.

    Sequences are marked under ``kind``, since by their axes they would be grey images.
    """
    arrays = {"x": x} if labels is None else {"x": x, "labels": labels.numpy()}
    if labels is not None and names:
        arrays["class_names"] = np.array(names, dtype=np.str_)
    if x.ndim == 3 and x.dtype != np.uint8:
        arrays["kind"] = np.array("sequence")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def write_assessment(
    folder: RunFolder,
    metrics: dict[str, dict[str, Any]],
    drawn: dict[str, SampleResult],
    scaling: Scaling,
    settings: dict[str, Any],
    class_names: Sequence[str] = (),
) -> None:
    """Writes ``metrics.json``, the samples, an ``evaluate`` event and the model card of a run folder."""
    for name, samples in drawn.items():
        content = npz_bytes(scaling.export(samples.x), samples.labels, class_names)
        atomic_write(folder.samples / f"{name}.npz", content)
    atomic_json(folder.metrics, plain(metrics))
    refresh_card(folder.model, plain(metrics))
    with EventLog(folder.log) as log:
        log.write("evaluate", None, **settings)
