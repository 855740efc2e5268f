"""Samples on a fixed grid of conditions and seeds: of a model during its training, of a teacher once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_write, load_tensors, save_tensors
from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.batches import BatchOf
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import LABEL, UNCONDITIONAL, Conditioning, cat, null_conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import decode_samples
from distmatch.metrics.collapse import (
    reduced,
    saturation,
    seed_distances,
    seed_energy,
    seed_vendi,
    solid_share,
)
from distmatch.metrics.video import motion
from distmatch.training.evaluation import npz_bytes

_MOST_BATCHES, _MOST_CLASSES = 64, 100  # that are searched for different conditions
MOST_PICTURES = 16
"""Steps whose samples are kept in a run folder."""

GridSampler = Callable[[int, Conditioning], Tensor]
"""Draws n samples in model space under n conditions, before any decoding; the same noise at every call."""


@dataclass(frozen=True)
class Grid:
    """What is sampled.

    Attributes:
        conditioning: A row for each condition; the empty conditioning for samples without a condition.
        seeds: Samples of each condition.
        texts: The prompt of each condition, where known.
    """

    conditioning: Conditioning
    seeds: int
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of conditions, 1 without any."""
        return self.conditioning.batch_size or 1

    def described(self) -> Conditioning:
        """What tells its samples apart, (conditions * seeds) rows: label, or number of the prompt from 1."""
        rows = torch.arange(len(self)).repeat_interleave(self.seeds)
        if not self.conditioning:
            return UNCONDITIONAL
        if set(self.conditioning) == {LABEL}:
            return Conditioning({LABEL: self.conditioning[LABEL].cpu()[rows]})
        return Conditioning({"prompt": rows + 1})

    def digest(self) -> str:
        """A sha256 (hex) of its conditions and seeds."""
        return hashlib.sha256(b"".join([*_digests(self.conditioning), str(self.seeds).encode()])).hexdigest()


def grid_of(batches: BatchOf, model: Denoiser, conditions: int, seeds: int) -> Grid:
    """The first different prompts of a file; without such, other conditions as a training draws them.

    Where there are labels alone, they are in their order.

    Args:
        batches: The batch of a step as the model takes it; a function of the step alone.
        model: What is conditioned.
        conditions: Largest number of conditions.
        seeds: Samples of each; without conditions one has ``conditions * seeds``.
    """
    beginning = batches(0)
    pool, by_text = beginning.pool, bool(set(beginning.conditioning) - {LABEL})
    if pool is not None and by_text and (first := _first_prompts(pool.texts, conditions)):
        return Grid(pool.conditioning(torch.tensor(list(first.values()))), seeds, tuple(first))
    found: dict[bytes, tuple[Conditioning, str]] = {}
    ignored = _null(model)
    for step in range(_MOST_BATCHES):
        batch = batches(step)
        asked, texts = batch.conditioning, batch.texts or [""] * len(batch.x)
        if not asked:
            return Grid(UNCONDITIONAL, conditions * seeds)
        for i, digest in enumerate(_digests(asked)):
            if digest not in ignored:
                found.setdefault(digest, (asked.index(slice(i, i + 1)), texts[i]))
        if len(found) >= (min(model.num_classes, _MOST_CLASSES) if set(asked) == {LABEL} else conditions):
            break
    rows = list(found.values()) or [(asked.index(slice(1)), "")]  # all of them the null condition
    count = min(conditions, len(rows))
    if set(rows[0][0]) == {LABEL}:  # evenly over the classes
        rows.sort(key=lambda row: int(row[0][LABEL]))
        rows = [rows[i * len(rows) // count] for i in range(count)]
    texts = tuple(text for _, text in rows[:count])
    return Grid(cat([row for row, _ in rows[:count]]), seeds, texts if all(texts) else ())


def _first_prompts(texts: Sequence[str], most: int) -> dict[str, int]:
    """The first different prompts, in their order, with their numbers."""
    found: dict[str, int] = {}
    for i, text in enumerate(texts):
        if len(found) < most and text.strip():
            found.setdefault(text, i)
    return found


def _digests(conditioning: Conditioning) -> list[bytes]:
    """A hash of each row."""
    values = {name: v.detach().cpu().contiguous() for name, v in sorted(conditioning.items())}
    found = []
    for i in range(conditioning.batch_size or 0):
        rows = (value[i].reshape(-1).view(torch.uint8).numpy().tobytes() for value in values.values())
        found.append(hashlib.sha256(b"".join(rows)).digest())
    return found


def _null(model: Denoiser) -> list[bytes]:
    try:
        return _digests(null_conditioning(model, 1))
    except UserError:  # it has none
        return []


@dataclass(frozen=True)
class WatchedSamples:
    """Samples on a grid.

    Attributes:
        x: (conditions, seeds, *shape) float32 on the CPU, in model space, decoded, large images reduced.
        shares: Means over all samples of what is measured at full size: ``saturation`` and ``solid`` of
            images and video, ``motion`` of video.
    """

    x: Tensor
    shares: dict[str, float]


@torch.no_grad()
def draw_grid(
    grid: Grid, sampler: GridSampler, model: Denoiser, chunk: int, device: torch.device | str
) -> WatchedSamples:
    """Samples a grid, a condition at a time, each from the same noise.

    Args:
        grid: The grid.
        sampler: What is sampled.
        model: A denoiser of the same samples, whose decoder decodes them.
        chunk: Samples that are decoded at a time.
        device: Where they are decoded.
    """
    rows = []
    sums: dict[str, float] = {}
    for index in range(len(grid)):
        row = grid.conditioning.index(slice(index, index + 1)).expand(grid.seeds)
        parts = []
        for z in sampler(grid.seeds, row).split(chunk):
            x = decode_samples(model, z, chunk, device=device).float().cpu()
            for name, value in _shares(x).items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
            parts.append(reduced(x))
        rows.append(torch.cat(parts))
    total = len(grid) * grid.seeds
    return WatchedSamples(torch.stack(rows), {name: value / total for name, value in sums.items()})


def _shares(x: Tensor) -> dict[str, Tensor]:
    if x.ndim < 4:
        return {}
    moved = {"motion": motion(x)} if x.ndim == 5 else {}
    return {"saturation": saturation(x), "solid": solid_share(x), **moved}


def against_teacher(student: WatchedSamples, teacher: WatchedSamples) -> dict[str, float]:
    """What a watch measures, on the samples of one grid.

    Returns:
        ``diversity`` and ``vendi``, the student's mean pairwise distance and Vendi score within a condition,
        each over the teacher's; ``energy``, see :func:`~distmatch.metrics.collapse.seed_energy`; of images
        ``saturation`` and ``solid``, and the teacher's as ``teacher_saturation`` and ``teacher_solid``; of
        video ``motion``, the student's over the teacher's. NaN where the teacher's is 0.
    """
    center = teacher.x.mean(1)
    found = {
        "diversity": _ratio(*(float(seed_distances(own.x).mean()) for own in (student, teacher))),
        "vendi": _ratio(*(float(seed_vendi(own.x, center).mean()) for own in (student, teacher))),
        "energy": seed_energy(student.x, teacher.x),
    }
    for name in ("saturation", "solid"):
        if name in student.shares:
            found |= {name: student.shares[name], f"teacher_{name}": teacher.shares[name]}
    if "motion" in student.shares:
        found["motion"] = _ratio(student.shares["motion"], teacher.shares["motion"])
    return found


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0 else float("nan")


def kept_samples(
    path: Path | None, about: dict[str, object], draw: Callable[[], WatchedSamples], ranks: Ranks = ALONE
) -> WatchedSamples:
    """Samples from a file, where they are those that are wanted; else they are drawn and written.

    Args:
        path: The file; None keeps none.
        about: Everything that the samples depend on, as JSON.
        draw: Draws them, on all processes together.
        ranks: The processes; the first one writes.
    """
    key = torch.tensor(list(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest())).byte()
    kept: WatchedSamples | None = None
    if path is not None and path.exists():
        try:
            tensors = load_tensors(path)
        except UserError:  # damaged: they are drawn again
            tensors = {}
        if "x" in tensors and torch.equal(tensors.pop("key", torch.empty(0)), key):
            x = tensors.pop("x")
            kept = WatchedSamples(x, {name: float(value) for name, value in tensors.items()})
    if kept is not None and not ranks.largest(0):
        return kept
    if kept is None:
        ranks.largest(1)  # those that have them draw them, too: weights may be shared out
    found = draw()
    if path is not None and ranks.main:
        shares = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.shares.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"x": found.x, "key": key, **shares})
    return found


def write_picture(
    path: Path, grid: Grid, samples: WatchedSamples, scaling: Scaling, class_names: Sequence[str]
) -> None:
    """Writes samples of a grid as reports read them."""
    prompts = [text for text in grid.texts for _ in range(grid.seeds)]
    content = npz_bytes(scaling.export(samples.x.flatten(0, 1)), grid.described(), class_names, prompts)
    atomic_write(path, content)


def thin_out(folder: Path) -> None:
    """Removes every second picture of a step once there are more than :data:`MOST_PICTURES`."""
    found = sorted(folder.glob("step-*.npz"), key=lambda path: (len(path.name), path.name))
    if len(found) > MOST_PICTURES:
        for path in found[1:-1:2]:
            path.unlink(missing_ok=True)
