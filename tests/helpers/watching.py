"""Short trainings with a watch, and students that collapse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distmatch.methods.student import Student
from distmatch.methods.table import METHODS
from distmatch.training.options import DistillOptions, NetOptions, RunOptions
from distmatch.training.prepare import prepare_distillation
from distmatch.training.runs import Job
from distmatch.training.watch import Watch
from distmatch.training.watch_options import WatchOptions
from tests.helpers.small import PAIR

SMALL: dict[str, Any] = {
    **{"method": "dmd2", "net": "mlp", "width": 16, "depth": 2, "fit_steps": 10, "fake_score_steps": 2},
    **{"batch": 32, "log_every": 2, "checkpoint_every": 4, "quiet": True},
    "watch_samples": 0,
}
GRID = (2, 8)
CLOCK = ("time", "seconds", "time_share")


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in CLOCK} for e in found if e["event"] in kinds]


def weights(student: Any) -> list[Tensor]:
    return [p.detach() for p in student.parameters()]


def watched(steps: int = 20, **settings: Any) -> tuple[Job, Watch]:
    """A distillation that is ready to start, and its watch."""
    own = METHODS["diff-instruct"].settings(**{"fit_steps": 10, "fake_score_steps": 2, **settings})
    options = DistillOptions(
        method="diff-instruct",
        settings=own,
        net=NetOptions(net="mlp", width=16, depth=2),
        run=RunOptions(steps=steps, batch=32, device="cpu"),
        watch=WatchOptions(watch_every=5, watch_grid=GRID, watch_samples=0),
    )
    job = prepare_distillation(options, PAIR)
    assert job.watch is not None
    return job, job.watch


def ignore_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students give the same sample for every seed of a condition."""
    sample = Student.sample

    def same(self: Student, n: int, **settings: Any) -> Tensor:
        return sample(self, n, **settings)[:1].repeat(n, *[1] * len(self.shape))

    monkeypatch.setattr(Student, "sample", same)


def run_watched(job: Job, watch: Watch, steps: int) -> list[str]:
    """A training by hand; the warnings of its watch."""
    found = list(watch.look("")[1]) if job.state.step == 0 else []
    for _ in range(steps):
        watch.observe(job.step(job.state, job.batches(job.state.step)))
        if watch.due(job.state.step):
            found += watch.look("")[1]
    return found


def resumed(out: Path, which: str | int, **changes: Any) -> Any:
    """Continues a run of :data:`SMALL`."""
    from dataclasses import replace

    from distmatch.cli.distill import _options_of
    from distmatch.cli.parse import options_from
    from distmatch.training.arguments import real_data
    from distmatch.training.runfolder import create
    from distmatch.training.runs import carry_out

    options = options_from(DistillOptions, out / "config.toml", "distill", defaults=_options_of)
    options = replace(options, watch=replace(options.watch, **changes))
    with create(out, resume=True) as folder:
        job = prepare_distillation(options, PAIR, real_data(PAIR, None, 0), fresh=False)
        return carry_out(job, folder, resume=which)[0]
