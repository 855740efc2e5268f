"""What a watch measures against real data, of students and of teachers in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.data import Dataset
from distmatch.data.scaling import Scaling
from distmatch.diffusion.solvers import sample_teacher
from distmatch.metrics import reference_labels
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.watch_data import samples_against
from tests.helpers.command import done
from tests.helpers.image_teachers import image_teacher
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import PAIR
from tests.helpers.watching import SMALL, events, weights

N = 48
TRAIN: dict[str, Any] = {
    **{"net": "mlp", "width": 16, "depth": 1, "steps": 6, "batch": 16, "checkpoint_every": 3, "quiet": True},
    **{"log_every": 2, "lr": 3e-2},
}
WATCH: dict[str, Any] = {"watch_every": 2, "watch_samples": N, "watch_grid": (2, 4)}


@pytest.fixture(scope="module")
def data() -> Dataset:
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    x = 0.3 * torch.randn(200, 2, generator=gen) + torch.tensor([[-1.0, 0.0], [1.0, 0.5]])[labels]
    return Dataset(x, labels, ("left", "right"), "blobs", Scaling.identity(2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("teacher") / "run"
    return out, dm.train(data, out=out, keep_best="fd", **TRAIN, **WATCH)


def test_a_teacher_is_the_same_with_and_without_a_watch(run, data, tmp_path):
    plain = dm.train(data, out=tmp_path / "run", **TRAIN)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(run[1]), strict=True))
    assert events(tmp_path / "run", "train") == events(run[0], "train")
    assert not events(tmp_path / "run", "watch")
    assert not (tmp_path / "run" / "watch").exists()


def test_the_numbers_of_a_teacher_are_those_of_its_samples(run, data):
    """The last ones are those of the model that the run returns, sampled with eight Heun steps."""
    seen = events(run[0], "watch")
    assert [e["step"] for e in seen] == [0, 2, 4, 6]
    last = seen[-1]
    assert (last["features"], last["n"]) == ("pixels", N // 2)
    assert (last["solver"], last["solver_steps"]) == ("heun", 8)
    assert not {"diversity", "energy", "fake_score_lag"} & last.keys()
    labels = reference_labels(data, N)
    seed = stream_seed(0, "watch/data")
    x = sample_teacher(run[1], N, steps=8, conditioning=labels, seed=seed)
    found = dm.evaluate(x, data, labels=labels, n=N // 2)
    for name in ("fd", "precision", "recall", "coverage"):
        assert last[name] == pytest.approx(found[name].value, rel=1e-3)
        assert last[f"{name}_stderr"] == pytest.approx(found[name].stderr, rel=1e-3, abs=1e-6)
    floor = dm.metrics.reference_floor(data, n=N // 2)
    assert last["floor_recall"] == floor["recall"].value
    assert sorted(p.name for p in (run[0] / "watch").iterdir()) == [f"step-{s:06d}.npz" for s in (0, 2, 4, 6)]


def test_the_best_checkpoint_is_that_of_the_smallest_distance(data, tmp_path, run):
    distances = {e["step"]: e["fd"] for e in events(run[0], "watch") if e["step"] > 0}
    best = min(distances, key=distances.__getitem__)
    assert best in list_checkpoints(run[0] / "checkpoints")
    settings = {**TRAIN, **WATCH, "lr": 3e-1}  # so large that the last step is not the best one
    dm.train(data, out=tmp_path / "run", keep_best="fd", result="best", **settings)
    distances = {e["step"]: e["fd"] for e in events(tmp_path / "run", "watch") if e["step"] > 0}
    best = min(distances, key=distances.__getitem__)
    (end,) = events(tmp_path / "run", "end")
    assert end.get("result_of", 6) == best


def test_a_student_is_measured_under_the_labels_of_the_data(monkeypatch):
    asked: list[torch.Tensor] = []
    sample = dm.Student.sample

    def seen(self: Any, n: int, **settings: Any) -> torch.Tensor:
        if settings["seed"] == stream_seed(0, "watch/data"):
            asked.append(settings["conditioning"]["label"])
        return sample(self, n, **settings)

    monkeypatch.setattr(dm.Student, "sample", seen)
    student = dm.distill(PAIR, steps=2, **{**SMALL, **WATCH})
    assert [len(part) for part in asked] == [32, 16] * 2  # in parts as large as a batch
    drawn = torch.cat(asked[:2]).bincount()
    assert (drawn - N // 2).abs().max() <= 1  # in the shares of the data
    assert student.num_classes == 2


def test_images_are_decoded_in_the_space_of_the_data_alone():
    teacher = image_teacher("unet")
    x = torch.zeros(60, 1, 8, 8)
    data = Dataset(x, torch.arange(60) % 2, (), "grey", Scaling.for_images(-1.0, 1.0, "grey"))
    assert samples_against(data, teacher, 500) == 60
    assert samples_against(data, teacher, 31) == 30
    assert samples_against(data, teacher, 0) == 0
    assert samples_against(None, teacher, 500) == 0
    other = Dataset(x[:, :, 1:], None, (), "other", Scaling.for_images(-1.0, 1.0, "grey"))
    assert samples_against(other, teacher, 500) == 0
    few = Dataset(x[:23], None, (), "few", Scaling.for_images(-1.0, 1.0, "grey"))
    assert samples_against(few, teacher, 500) == 0


def test_what_cannot_be_best_is_refused(data):
    with pytest.raises(UserError, match="no teacher to be compared with"):
        dm.train(data, out="never", keep_best="energy", **TRAIN, **WATCH)
    with pytest.raises(UserError, match="kept in a run folder"):
        dm.train(data, keep_best="fd", **TRAIN, **WATCH)
    few = Dataset(torch.zeros(20, 2), None, (), "few", Scaling.identity(2))
    with pytest.raises(UserError, match="compares samples with real data"):
        dm.train(few, out="never", keep_best="fd", **TRAIN, **WATCH)
    assert not Path("never").exists()


def test_the_command_says_what_it_costs_shows_the_distance_and_keeps_its_options(tmp_path):
    out = tmp_path / "run"
    line = "train --data ring8 --net mlp --width 16 --depth 1 --batch 16 --steps 5 "
    line += f"--watch-every 2 --watch-samples {N} --watch-grid 2 4 --keep-best fd"
    cost = done(f"{line} --dry-run --json").json()
    assert cost["watch"]["measurements"] == 4  # at 0, 2, 4 and 5
    assert (cost["watch"]["samples_against_data"], cost["watch"]["solver_steps"]) == (N, 8)
    total = cost["watch"]["seconds_once"] + 4 * cost["watch"]["seconds_each"]
    assert cost["watch"]["seconds"] == pytest.approx(total, abs=0.06)
    assert cost["estimated_seconds"] >= cost["watch"]["seconds"]
    assert "# watch       about" in done(f"{line} --dry-run").out
    assert not out.exists()
    answer = done(f"{line} --out {out}")
    assert "(step 5)" in answer.err.replace("\r", "\n").splitlines()[-1]
    assert f"watch_samples = {N}" in (out / "config.toml").read_text()
    done(f"train --resume --out {out} --steps 6 --watch-samples 24")
    assert [e["n"] for e in events(out, "watch")] == [N // 2] * 4 + [12]
    assert "report in" in done(f"report {out}").out


def test_samples_of_a_step_are_the_same_in_parts(data):
    """What a process draws is its share of the samples that one process draws."""
    from distmatch.training.options import NetOptions, RunOptions, TrainOptions
    from distmatch.training.prepare_teacher import prepare_training
    from distmatch.training.watch_options import WatchOptions

    options = TrainOptions(
        net=NetOptions(net="mlp", width=16, depth=1),
        run=RunOptions(steps=2, batch=16, device="cpu"),
        watch=WatchOptions(watch_every=1, watch_samples=N),
    )
    watch = prepare_training(options, data).watch
    assert watch is not None
    against = watch.watched.against
    assert against is not None
    against.begin()
    whole = against.draw(watch.watched.sampler())
    against.chunk = 7
    assert_same_but_for_rounding(against.draw(watch.watched.sampler()), whole)
