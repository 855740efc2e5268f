"""The watch of a training: measurements, warnings in words, and the best checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distmatch.base.errors import DivergedError, UserError
from distmatch.base.progress import progress
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.batches import BatchOf
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.solvers import sample_teacher
from distmatch.methods.method import Method
from distmatch.methods.state import DistillState
from distmatch.training.sampling import HEUN
from distmatch.training.watch_data import AgainstData, MakeSampler
from distmatch.training.watch_grid import (
    Grid,
    GridSampler,
    WatchedSamples,
    against_teacher,
    draw_grid,
    grid_of,
    kept_samples,
    thin_out,
    write_picture,
)
from distmatch.training.watch_options import WatchOptions
from distmatch.training.watch_warnings import BOUNDS, watch_warnings

LAG_SAMPLES, LAG_BATCHES = 256, 16
"""Fresh samples that the fake score is measured on, and the largest number of batches."""
_DISTANCE: dict[str, Callable[[float], float]] = {
    "diversity": lambda value: abs(value - 1),
    "vendi": lambda value: abs(value - 1),
    "energy": lambda value: value,
    "fd": lambda value: value,
}
"""How far from the best value a measurement is: 1 for what is relative to the teacher's."""


@runtime_checkable
class Lagging(Protocol):
    """A method with a fake score."""

    def fake_score_error(
        self, state: DistillState, conditioning: Conditioning, n: int, generator: torch.Generator
    ) -> Tensor:
        """The fake score's loss on fresh samples of the student, ()."""
        ...


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A training, as far as it is watched.

    Attributes:
        what: What is trained: ``student`` or ``teacher``.
        model: A denoiser of the samples, for conditions and decoding: a student's teacher, unguided.
        sampler: Makes what the model is sampled by that the run would end with now.
        guided: The teacher as a student is to match it; None where a teacher is trained.
        state: The state of the training.
        method: The entry of the method; None where a teacher is trained.
        settings: The settings of the method or teacher.
        batches: The batch of a step as the model takes it; a function of the step alone.
        fake_score: Measures the fake score; None without one.
        against: What is measured against real data; None: nothing is.
        said: What stands beside the measurements in the log.
        scaling: Of the decoded samples, for pictures.
        class_names: Names of the classes, or ().
        rows: Those of a batch that this process trains on.
        steps: Length of the run.
        seed: Seed of the run; the watch has streams of its own.
        chunk: Samples at a time: those of a training step's network passes.
        device: Where to compute.
    """

    what: str
    model: Denoiser
    sampler: MakeSampler
    guided: Denoiser | None
    state: Any
    method: Method | None
    settings: Any
    batches: BatchOf
    fake_score: Lagging | None
    against: AgainstData | None
    said: Mapping[str, Any] = field(default_factory=dict)
    scaling: Scaling
    class_names: tuple[str, ...]
    rows: slice
    steps: int
    seed: int
    chunk: int
    device: torch.device


@dataclass
class Watch:
    """Measures samples of a model during its training; changes nothing of it.

    Attributes:
        options: When and what.
        watched: The training.
        best_step: The step of the best checkpoint; None before there is one.
    """

    options: WatchOptions
    watched: Watched
    best_step: int | None = None
    _folder: Path | None = field(default=None, init=False, repr=False)
    _grid: Grid = field(init=False, repr=False)
    _teacher: WatchedSamples | None = field(default=None, init=False, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _best_values: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _crossed: list[str] = field(default_factory=list, init=False, repr=False)
    _warned: list[str] = field(default_factory=list, init=False, repr=False)
    _looks: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _seconds: float = field(default=0.0, init=False, repr=False)
    _began: float = field(default=0.0, init=False, repr=False)

    def begin(self, folder: Path | None) -> None:
        """Samples the teacher, or reads what was sampled before.

        Args:
            folder: Where samples are kept; None keeps none.

        Raises:
            UserError: Samples of the teacher are not finite.
        """
        self._began = time.perf_counter()
        w, size = self.watched, self.options.watch_grid
        self._grid = grid_of(w.batches, w.model, *size)
        ranks = w.state.ranks
        self._folder = folder if ranks.main else None
        if w.guided is not None:
            guidance = {k: v for k, v in vars(w.settings).items() if k.startswith(("guidance", "negative"))}
            about = {"grid": self._grid.digest(), "seed": w.seed, "shape": list(w.model.shape), **guidance}
            path = None if folder is None else folder / "teacher.safetensors"
            self._teacher = kept_samples(path, about, partial(self._of_teacher, w.guided), ranks)
            if self._folder is not None:
                picture = self._folder / "teacher.npz"
                write_picture(picture, self._grid, self._teacher, w.scaling, w.class_names)
        if w.against is not None:
            w.against.begin()
        self._seconds = time.perf_counter() - self._began

    def _of_teacher(self, teacher: Denoiser) -> WatchedSamples:
        w = self.watched
        total = len(self._grid) * self._grid.seeds
        with progress(total, desc="samples of the teacher", delay=5.0) as bar:

            def draw(n: int, conditioning: Conditioning) -> Tensor:
                return sample_teacher(
                    teacher,
                    n,
                    grid=HEUN.levels(w.model),
                    conditioning=conditioning,
                    seed=self._noise_seed,
                    batch=w.chunk,
                    device=w.device,
                    on_batch=bar.update,
                )

            found = self._draw(draw)
        bad = int((~found.x.isfinite()).sum())
        if bad:
            raise UserError(
                "samples of the teacher are not finite",
                got=f"{bad} of {found.x.numel()} values",
                fix="try it with distmatch sample: often it is --guidance, or half precision of its weights",
            )
        return found

    @property
    def _noise_seed(self) -> int:
        return stream_seed(self.watched.seed, "watch")

    def _draw(self, sampler: GridSampler) -> WatchedSamples:
        w = self.watched
        return draw_grid(self._grid, sampler, w.model, w.chunk, w.device)

    def observe(self, info: dict[str, Tensor]) -> None:
        """Takes in what a step reports: the fake score's training loss, the share of clipped ratios."""
        for name in ("loss_fake", "clip_fraction"):
            if name in info:
                self._sums[name] = self._sums[name] + info[name] if name in self._sums else info[name]
                self._counts[name] = self._counts.get(name, 0) + 1

    def due(self, step: int) -> bool:
        """Whether it is measured after this many steps: first, last, and at every interval."""
        return step % self.options.watch_every == 0 or step == self.watched.steps

    def look(self, last: str) -> tuple[dict[str, Any], list[str]]:
        """Measures the model in training.

        Args:
            last: What to say of the last good checkpoint.

        Returns:
            The measurements, for the log, and warnings, each kind of which is given once in a run.

        Raises:
            DivergedError: Samples of the model are not finite.
        """
        began, w = time.perf_counter(), self.watched
        step, against, ranks = w.state.step, w.against, w.state.ranks
        sampler = w.sampler()

        def finite(x: Tensor) -> Tensor:
            if not bool(x.isfinite().all()):
                raise DivergedError(
                    f"training went wrong: samples of the {w.what} are not finite at step {step}",
                    expected="finite numbers",
                    fix=f"lower the learning rate and continue with --resume; {last}",
                )
            return x

        devices = [w.device] if w.device.type == "cuda" else []
        values: dict[str, Any] = {}
        with torch.random.fork_rng(devices=devices):  # networks of users may draw from the global stream
            samples = self._draw(lambda n, asked: sampler(n, asked, self._noise_seed))
            finite(samples.x)
            means = {
                name: float(ranks.mean(total)) / self._counts[name] for name, total in self._sums.items()
            }
            if against is not None:
                values |= against.measure(finite(against.draw(sampler)))
            if self._teacher is not None:
                values |= against_teacher(samples, self._teacher)
            if w.fake_score is not None and means.get("loss_fake", 0.0) > 0:
                values["fake_score_lag"] = self._fake_score_error(w.fake_score) / means["loss_fake"]
        if "clip_fraction" in means:
            values["clip_fraction"] = means["clip_fraction"]
        self._sums.clear()
        self._counts.clear()
        if self._folder is not None:
            picture = self._folder / f"step-{step:06d}.npz"
            write_picture(picture, self._grid, samples, w.scaling, w.class_names)
            thin_out(self._folder)
        messages = self._judge(step, values)
        values |= {**(against.said if against is not None else {}), **w.said}
        now = time.perf_counter()
        self._seconds += now - began
        return {**values, "seconds": now - began, "time_share": self._seconds / (now - self._began)}, messages

    def shown(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What of some measurements the progress line shows, with the step that they are of."""
        found = {name: f"{values[name]:.3g}" for name in ("fd", "diversity") if name in values}
        for name in list(found)[-1:]:
            found[name] += f" (step {self.watched.state.step})"
        return found

    def _fake_score_error(self, fake_score: Lagging) -> float:
        """Over the batches of the next steps, as large as those of training and so no larger in memory."""
        w, seen = self.watched, 0
        errors: list[Tensor] = []
        gen = generator(w.seed, f"watch/{w.state.step}", w.device)
        while seen < LAG_SAMPLES and len(errors) < LAG_BATCHES:
            batch = w.batches(w.state.step + len(errors), w.rows)
            error = fake_score.fake_score_error(w.state, batch.conditioning, len(batch.x), gen)
            errors.append(w.state.ranks.mean(error))
            seen += len(batch.x) * w.state.ranks.size
        return float(torch.stack(errors).mean())

    def _judge(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """The warnings; keeps the best values and the best step."""
        w = self.watched
        messages = []
        if step > 0:  # an untrained student has not collapsed
            late, kept = 2 * step >= w.steps, self.options.keep_best != "none"
            best, method = self._best_values, w.method
            found = (
                {}
                if method is None
                else dict(watch_warnings(values, best, method, w.settings, late=late, kept=kept))
            )
            for kind in sorted(found.keys() & set(self._crossed) - set(self._warned)):  # not what passes
                self._warned.append(kind)
                messages.append(f"at step {step} {found[kind]}")
            self._crossed = list(found)
        for bound in BOUNDS:
            if math.isfinite(value := values.get(bound.kind, math.nan)):
                self._best_values[bound.kind] = bound.best(value, self._best_values.get(bound.kind, value))
        if step > 0 and self.options.keep_best != "none":
            distance = _DISTANCE[self.options.keep_best](values[self.options.keep_best])
            self._looks[step] = distance
            if math.isfinite(distance) and distance < min(
                (v for s, v in self._looks.items() if s != step), default=math.inf
            ):
                self.best_step = step
        return messages

    def state_dict(self) -> dict[str, Any]:
        """The record of a watch, for checkpoints."""
        return {
            "sums": {name: float(value) for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "best_values": dict(self._best_values),
            "crossed": list(self._crossed),
            "warned": list(self._warned),
            "metric": self.options.keep_best,
            "looks": dict(self._looks),
        }

    def load_state_dict(self, tree: dict[str, Any], kept: Collection[int]) -> None:
        """Restores a record; what was best by another measurement, or is no longer there, is left out.

        Args:
            tree: From :meth:`state_dict`; empty for a run that was not watched before.
            kept: Steps of the checkpoints that there are.
        """
        self._sums = {name: torch.tensor(value) for name, value in tree.get("sums", {}).items()}
        self._counts = dict(tree.get("counts", {}))
        self._best_values = dict(tree.get("best_values", {}))
        self._crossed = list(tree.get("crossed", []))
        self._warned = list(tree.get("warned", []))
        looks = tree.get("looks", {}) if tree.get("metric") == self.options.keep_best else {}
        self._looks = {step: value for step, value in looks.items() if step in kept}
        finite = {step: value for step, value in self._looks.items() if math.isfinite(value)}
        self.best_step = min(finite, key=finite.__getitem__, default=None)
