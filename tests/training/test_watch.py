"""The watch: it changes nothing, survives interruptions, warns of collapse and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.base.errors import DivergedError, UserError
from distmatch.data.batches import Batch, Pool
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.methods.student import Student
from distmatch.metrics.collapse import seed_vendi
from distmatch.training.checkpoint import list_checkpoints
from distmatch.training.watch import Watch
from distmatch.training.watch_grid import WatchedSamples, grid_of
from tests.helpers.command import done
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import PAIR, batch, distiller, network_teacher
from tests.helpers.watching import GRID, SMALL, events, ignore_noise, resumed, watched, weights

WATCHED: dict[str, Any] = {**SMALL, "steps": 12, "watch_every": 3, "watch_grid": GRID, "watch_samples": 24}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that is not watched."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, dm.distill(PAIR, out=out, steps=12, **SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The same with a watch."""
    out = tmp_path_factory.mktemp("watched") / "run"
    return out, dm.distill(PAIR, out=out, **WATCHED)


def test_a_watch_changes_neither_weights_nor_the_rest_of_the_log(plain, whole):
    assert all(torch.equal(a, b) for a, b in zip(weights(plain[1]), weights(whole[1]), strict=True))
    assert events(plain[0], "train", "checkpoint") == events(whole[0], "train", "checkpoint")
    assert not (plain[0] / "watch").exists()
    assert not events(plain[0], "watch")


def test_the_log_has_the_measurements_of_each_interval(whole):
    seen = events(whole[0], "watch")
    assert [e["step"] for e in seen] == [0, 3, 6, 9, 12]
    assert "fake_score_lag" not in seen[0]
    assert {"diversity", "vendi", "energy", "fake_score_lag"} <= seen[-1].keys()
    assert all((e["features"], e["n"]) == ("pixels", 12) and e["fd"] > 0 < e["fd_stderr"] for e in seen)
    assert "saturation" not in seen[-1]  # vectors have no ends of a range
    names = sorted(path.name for path in (whole[0] / "watch").iterdir())
    assert names == [*(f"step-{s:06d}.npz" for s in (0, 3, 6, 9, 12)), "teacher.npz", "teacher.safetensors"]


def test_a_run_that_is_interrupted_ends_as_the_whole_one(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    look = Watch.look

    def stopped(self: Watch, last: str) -> Any:
        if self.watched.state.step == 9:
            raise KeyboardInterrupt
        return look(self, last)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "look", stopped)
        with pytest.raises(KeyboardInterrupt):
            dm.distill(PAIR, out=out, **WATCHED)
    (out / "watch" / "step-000012.npz").write_bytes(b"of another course")
    written = (out / "watch" / "teacher.safetensors").stat().st_mtime_ns
    student = resumed(out, "latest")
    assert (out / "watch" / "teacher.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(weights(student), weights(whole[1]), strict=True))
    seen = {e["step"]: e for e in events(out, "watch")}
    assert list(seen.values()) == events(whole[0], "watch")
    assert (out / "watch/step-000012.npz").read_bytes() == (whole[0] / "watch/step-000012.npz").read_bytes()


def test_the_teachers_samples_are_drawn_again_where_they_are_damaged_or_others(whole, tmp_path):
    watch = watched()[1]
    watch.begin(tmp_path)
    first = watch._teacher.x
    file = tmp_path / "teacher.safetensors"
    good = file.read_bytes()
    for damage in (good[:-9], b"", good[:40] + b"x" + good[41:]):
        file.write_bytes(damage)
        watch.begin(tmp_path)
        assert torch.equal(watch._teacher.x, first)
        assert file.read_bytes() == good
    _, guided = watched(guidance=2.0)
    guided.begin(tmp_path)
    assert not torch.equal(guided._teacher.x, first)


def test_conditions_are_rows_and_seeds_are_shared(whole):
    """Sample (c, s) is that of condition c from noise s: what one call for that condition alone gives."""
    watch = watched(steps=5)[1]
    watch.begin(None)
    assert watch._teacher.x.shape == (2, 8, 2)
    assert watch._grid.conditioning["label"].tolist() == [0, 1]
    again = dm.diffusion.solvers.sample_teacher(
        PAIR, 8, conditioning=torch.ones(8, dtype=torch.int64), seed=watch._noise_seed
    )
    assert_same_but_for_rounding(watch._teacher.x[1], again)


def test_networks_that_draw_from_the_global_stream_do_so_as_without_a_watch(monkeypatch):
    job, watch = watched()
    watch.begin(None)
    sample = Student.sample

    def random(self: Student, n: int, **settings: Any) -> Tensor:
        return sample(self, n, **settings) + torch.rand(1)

    monkeypatch.setattr(Student, "sample", random)
    before = torch.get_rng_state(), job.state.generator.get_state()
    watch.look("")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(job.state.generator.get_state(), before[1])


# ------------------------------------------------------------------ the grid


def test_a_grid_has_different_conditions_without_the_null_condition():
    teacher = network_teacher(classes=10)

    def batches(step: int) -> Batch:
        found = batch(step, classes=10, n=4)
        return Batch(found.x, torch.cat([found.conditioning["label"][:3], torch.tensor([-1])])).taken_by(
            teacher
        )

    grid = grid_of(batches, teacher, 4, 8)
    assert grid.conditioning["label"].tolist() == [0, 2, 5, 7]
    assert grid.described()["label"].tolist() == [0] * 8 + [2] * 8 + [5] * 8 + [7] * 8
    everything = grid_of(batches, teacher, 20, 8)
    assert everything.conditioning["label"].tolist() == list(range(10))
    free = grid_of(lambda step: batch(step), network_teacher(), 4, 8)
    assert (len(free), free.seeds, free.conditioning) == (1, 32, UNCONDITIONAL)
    assert grid.digest() != everything.digest()
    assert grid.digest() != grid_of(batches, teacher, 4, 9).digest()


def test_samples_without_any_condition_of_a_model_with_classes_are_a_grid_too():
    teacher = network_teacher(classes=3)
    grid = grid_of(lambda step: Batch(torch.zeros(4, 2), torch.full((4,), -1)), teacher, 4, 8)
    assert grid.conditioning["label"].tolist() == [-1]


def test_a_teacher_whose_samples_are_not_finite_is_an_error_before_training():
    watch = watched()[1]
    broken = WatchedSamples(torch.full((2, 8, 2), float("nan")), {})
    watch._draw = lambda sampler: broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match="samples of the teacher are not finite"):
        watch.begin(None)


def test_prompts_are_told_apart_by_all_of_their_values():
    class OfPrompts:
        num_classes = 0

        @property
        def conditioning_spec(self) -> Any:
            return {"text": None, "mask": None}

        def null_conditioning(self, n: int) -> Conditioning:
            return Conditioning({"text": torch.zeros(n, 3), "mask": torch.ones(n, 2, dtype=torch.bool)})

    text = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [2, 0, 0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    told = Conditioning({"text": text, "mask": mask})
    texts = ["", "a cat", "a dog", "a cat", "a tree"]
    grid = grid_of(lambda step: Batch(torch.zeros(5, 2), told, texts=texts), OfPrompts(), 8, 2)  # type: ignore[arg-type]
    assert grid.texts == ("a cat", "a dog", "a tree")
    assert torch.equal(grid.conditioning["text"][:, 0], torch.tensor([1.0, 1, 2]))
    assert grid.conditioning["mask"].tolist() == [[True, True], [True, False], [True, True]]
    assert grid.described()["prompt"].tolist() == [1, 1, 2, 2, 3, 3]


def test_prompts_of_a_file_are_watched_in_their_order():
    rows = Conditioning({"text": torch.arange(6.0)[:, None]})
    pool = Pool(6, rows.index, ("a cat", "", "a cat", "a dog", "a tree", "a house"))
    drawn = Batch(torch.zeros(2, 2), rows.index(torch.tensor([5, 3])), texts=["a house", "a dog"], pool=pool)
    grid = grid_of(lambda step: drawn, network_teacher(), 3, 2)
    assert grid.texts == ("a cat", "a dog", "a tree")
    assert grid.conditioning["text"][:, 0].tolist() == [0, 3, 4]


# ------------------------------------------------------------------ measurements


def test_an_exact_student_has_the_diversity_of_its_teacher(monkeypatch):
    """With the teacher's own samples all that is relative is 1, and the distance at most 0."""
    watch = watched()[1]
    watch.begin(None)
    monkeypatch.setattr(watch, "_draw", lambda sampler: watch._teacher)
    values, _ = watch.look("")
    assert (values["diversity"], values["vendi"]) == (1, 1)
    assert values["energy"] <= 0


def test_a_student_that_ignores_its_noise_has_no_diversity(monkeypatch):
    watch = watched()[1]
    watch.begin(None)
    ignore_noise(monkeypatch)
    values, _ = watch.look("")
    assert values["diversity"] == 0
    assert values["vendi"] == pytest.approx(
        1 / float(seed_vendi(watch._teacher.x, watch._teacher.x.mean(1)).mean())
    )
    assert values["energy"] > 0.3


@pytest.mark.parametrize("method", ["f-distill", "sid", "moment-matching", "disback", "uni-instruct"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_error_of_the_fake_score_is_the_loss_that_a_step_would_have(method, accumulate):
    """On the noise of the next step, in which the student does not move, both are one computation."""
    teacher = network_teacher(classes=2)
    settings: dict[str, Any] = {"disback": {"backtrack": 2}}.get(method, {})
    settings |= {"num_steps": 2, "warmup_steps": 100, "accumulate": accumulate}
    made = distiller(teacher, None, method, 400, **settings)
    state = made.init(0)
    real = batch(0, classes=2)
    for _ in range(2):
        own = torch.Generator().manual_seed(state.generator.initial_seed())
        own.set_state(state.generator.get_state())
        error = made.fake_score_error(state, real.conditioning, len(real.x), own)
        assert_same_but_for_rounding(error, made.step(state, real)["loss_fake"])


def test_the_fake_score_lags_where_the_student_jumps_away():
    job, watch = watched(steps=40, warmup_steps=20)
    watch.begin(None)
    for step in range(20):
        watch.observe(job.step(job.state, job.batches(step)))
    values, _ = watch.look("")
    assert values["fake_score_lag"] == pytest.approx(1, abs=0.3)  # the student stood still
    for step in range(20, 30):
        watch.observe(job.step(job.state, job.batches(step)))
    with torch.no_grad():
        for parameter in job.networks["student"].parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    values, _ = watch.look("")
    assert values["fake_score_lag"] > 2


def test_samples_that_are_not_finite_end_a_training():
    job, watch = watched()
    watch.begin(None)
    with torch.no_grad():
        next(iter(job.state.ema.module.parameters())).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"not finite at step 0.*the last good one"):
        watch.look("the last good one is step 3")


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": "energy"}, "--keep-best needs measurements"),
        (
            {"keep_best": "fid", "watch_every": 5},
            "--keep-best must be one of none, fd, diversity, vendi, energy",
        ),
        ({"result": "best", "watch_every": 5}, "--result best needs to know"),
        ({"watch_grid": (2, 1)}, "at least 1 condition and 2 seeds"),
        ({"watch_grid": (0, 4)}, "at least 1 condition and 2 seeds"),
        ({"watch_every": -1}, "--watch-every must not be negative"),
        ({"watch_every": 5, "keep_best": "energy"}, "kept in a run folder"),
        ({"watch_every": 5, "method": "dpm-ot", "bank": 8}, "trains no network"),
        ({"watch_every": 5, "watch_samples": 12}, "--watch-samples must be 0 or at least 24"),
        ({"watch_every": 5, "watch_samples": 0, "keep_best": "fd"}, "--keep-best fd needs samples"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, message):
    small = {name: value for name, value in SMALL.items() if name != "fake_score_steps"}
    if "method" in options:
        small = {"quiet": True}
    with pytest.raises(UserError, match=message):
        dm.distill(PAIR, steps=5, **{**small, **options})


def test_the_command_line_has_the_options_and_resumes_with_them(tmp_path):
    out = tmp_path / "run"
    small = "--net mlp --width 16 --depth 1 --fit-steps 5 --fake-score-steps 2 --batch 16"
    watch = "--watch-every 2 --watch-samples 48 --watch-grid 4 8 --keep-best energy --result best"
    first = done(f"distill --teacher ring8 --method dmd2 {small} --steps 4 {watch} --out {out}")
    assert re.search(r"4/4 .*diversity 0\.\d+ \(step 4\)", first.err)
    text = (out / "config.toml").read_text()
    table = text[text.index("[watch]") :]
    wanted = 'watch_every = 2\nwatch_samples = 48\nwatch_grid = [4, 8]\nkeep_best = "energy"\nresult = "best"'
    assert table.startswith(f"[watch]\n{wanted}\n")
    done(f"distill --resume --out {out} --steps 6")
    assert [e["step"] for e in events(out, "watch")] == [0, 2, 4, 6]
    assert len(list_checkpoints(out / "checkpoints")) >= 2
    done(f"distill --resume 4 --out {out} --steps 8 --watch-every 0 --keep-best none --result last")
    assert [e["step"] for e in events(out, "watch")] == [0, 2, 4, 6]
    (out / "config.toml").write_text(text[: text.index("[watch]")] + text[text.index("[distill]") :])
    done(f"distill --resume --out {out} --steps 9")  # a file without these options
