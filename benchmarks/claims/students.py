"""What the claims of distillation train: small students, by the library's own methods, measured on the way.

A run is kept in ``build/claims/`` under its settings, so that several claims can read it; remove that folder
to train all of them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from claim import Measured
from torch import Tensor

import distmatch as dm
from distmatch.base.seeds import generator
from distmatch.data import load_data, toy
from distmatch.data.batches import Batch
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, solve
from distmatch.discrepancies import energy_distance
from distmatch.interop import load_denoiser
from distmatch.methods.sampler import student_sigmas
from distmatch.methods.student import Student
from distmatch.metrics.frechet import frechet_distance
from distmatch.metrics.modes import mode_counts
from distmatch.metrics.prdc import prdc
from distmatch.nets.config import MLPConfig
from distmatch.nets.ema import EMA

KEPT = Path("build/claims")
BATCH, SEEDS = 128, 5
WIDTH = {"digits": 96, "grid25": 64}
FAR = 4.0
"""How far from the data a far start is, in units of sigma_data in every coordinate."""

Values = dict[str, float]
Start = Literal["copy", "far"]
LEARN = {"lr": 2e-3, "lr_fake_score": 4e-3, "fake_score_steps": 2}
"""Faster than the defaults, so that a thousand steps of methods with a fake score come to something."""
LOWER = ("fd", "kl", "energy")
"""Measures of which less is better."""


@dataclass(frozen=True)
class Problem:
    """Data, a network trained on them, and the mixture that the data were drawn from, in the plane."""

    data: Tensor
    teacher: Any
    mixture: GaussianMixture | None


@cache
def problem(name: str) -> Problem:
    """``digits`` (8x8) or ``grid25`` without labels, and an MLP of two blocks as the teacher."""
    found, width = load_data(name).without_labels(), WIDTH[name]
    folder = KEPT / f"{name}-{width}x2"
    if not (folder / "model").exists():
        settings: dict[str, Any] = {"batch": BATCH, "lr_decay": "cosine", "keep": 1, "net": "mlp"}
        dm.train(found, steps=4000, width=width, depth=2, out=folder, quiet=True, **settings)
    data = found.batch(torch.arange(len(found)))[0]
    return Problem(data, load_denoiser(folder / "model")[0], None if name == "digits" else toy(name))


def measures(own: Problem, x: Tensor) -> Values:
    """Of samples: against the modes of the mixture, or the digits themselves, pixel by pixel."""
    if own.mixture is None:
        found = prdc(own.data.flatten(1), x.flatten(1))
        values = {"precision": found.precision, "recall": found.recall, "coverage": found.coverage}
        return {"fd": frechet_distance(own.data.flatten(1), x.flatten(1)), **values}
    modes = mode_counts(x, own.mixture)
    near = energy_distance(x[:4000].double(), own.mixture.sample(4000, seed=9).double(), estimator="biased")
    return {"kl": modes.kl.value, "high_quality": modes.high_quality.value, "energy": near.value}


def draws(own: Problem) -> int:
    """Samples that are measured."""
    return len(own.data) if own.mixture is None else 10_000


@cache
def teacher_at(name: str, steps: int) -> Values:
    """The teacher's own samples, by Euler's method: DDIM."""
    own = problem(name)
    noise = torch.randn(draws(own), *own.data.shape[1:], generator=generator(7, "claims/teacher"))
    # As in the few-step students of mmd, the first level is 5 sigma_data, which the teacher has seen.
    sigmas = grid("karras", steps, 0.002, 5.0 * own.teacher.sigma_data)
    with torch.no_grad():
        return measures(own, solve(own.teacher, sigmas[0] * noise, sigmas, "euler").y)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A student's training.

    Attributes:
        on: Of :func:`problem`.
        method: Its name, with the divergence after a colon where it takes one.
        steps: Of the whole run.
        marks: Steps at which it is measured; always at the last.
        start: A copy of the teacher, or a network that was fitted to produce samples ``FAR`` from the data.
        calls: Numbers of calls that the final student is sampled with besides that of its training.
        settings: Of the method.
    """

    on: str
    method: str
    steps: int
    marks: tuple[int, ...] = ()
    start: Start = "copy"
    calls: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self, seeds: Sequence[int] = tuple(range(SEEDS))) -> list[dict[str, Values]]:
        """What each seed came to, by mark, ``raw`` (without moving average) and ``calls N``."""
        return [_kept(self, seed) for seed in seeds]

    def last(self, measure: str, seeds: Sequence[int] = tuple(range(SEEDS))) -> list[float]:
        """A measure at the end of each run."""
        return [row[str(self.steps)][measure] for row in self.rows(seeds)]


def _kept(run: Run, seed: int) -> dict[str, Values]:
    key = json.dumps({**vars(run), "seed": seed}, sort_keys=True)
    path = KEPT / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        known, values = json.loads(line)
        if known == key:
            return values
    values = _trained(run, seed)
    KEPT.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps([key, values]) + "\n")
    return values


def _trained(run: Run, seed: int) -> dict[str, Values]:
    own = problem(run.on)
    name, _, divergence = run.method.partition(":")
    options = {**run.settings, "total_steps": run.steps, "divergence": divergence or None}
    if run.start == "far":
        options |= {"net": MLPConfig(width=WIDTH[run.on], depth=2), "fit_steps": 0}
    method = dm.methods.build(own.teacher, name, **options)
    rows = generator(seed, "claims/rows")

    def draw(n: int) -> tuple[Tensor, None]:
        return own.data[torch.randint(len(own.data), (n,), generator=rows)], None

    state: Any = method.init(seed, draw)
    if run.start == "far":
        _move_away(state, own, seed)
    found: dict[str, Values] = {}
    for step in range(run.steps):
        method.step(state, Batch(draw(BATCH)[0]))
        if step + 1 in (*run.marks, run.steps):
            found[str(step + 1)] = measures(own, method.result(state).sample(draws(own), seed=1000 + seed))
    student = method.result(state)
    found["raw"] = measures(own, state.student.sample(draws(own), seed=1000 + seed))
    for calls in run.calls:
        sigmas = student_sigmas(calls, student.sigmas[0], own.teacher.sigma_data)
        few = student.around(student.denoiser, sigmas)
        found[f"calls {calls}"] = measures(own, few.sample(draws(own), seed=1000 + seed))
    return found


def _move_away(state: Any, own: Problem, seed: int) -> None:
    """Fits a new student to a narrow Gaussian away from the data, and its average with it."""
    student: Student = state.student
    unit = own.teacher.sigma_data
    gen, optimizer = generator(seed, "claims/far"), torch.optim.Adam(student.denoiser.parameters(), lr=2e-3)
    for _ in range(300):
        z = torch.randn(BATCH, *student.shape, generator=gen)
        loss = (student(z) - unit * (FAR + 0.1 * z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    state.ema = EMA(student.denoiser)


def gains(better: Sequence[float], worse: Sequence[float], measure: str) -> list[float]:
    """By how much one side is better, seed by seed: a log ratio where less is better, else a difference."""
    if measure in LOWER:
        return [math.log(b / a) for a, b in zip(better, worse, strict=True)]
    return [a - b for a, b in zip(better, worse, strict=True)]


def side_by_side(
    better: Run,
    worse: Run,
    measure: str,
    names: tuple[str, str] | None = None,
) -> Measured:
    """Whether the first run is better at its end; figures have further measures of both."""
    differences = gains(better.last(measure), worse.last(measure), measure)
    first, second = names or (better.method, worse.method)
    figures = {
        f"{key} of {name}": mean(run.last(key))
        for name, run in ((first, better), (second, worse))
        for key in run.rows()[0][str(run.steps)]
        if key != "coverage"
    }
    unit = f"log {measure}" if measure in LOWER else measure
    return Measured(differences=differences, unit=unit, figures=figures)


def mean(values: Sequence[float]) -> float:
    """Of a column of a table."""
    return sum(values) / len(values)
