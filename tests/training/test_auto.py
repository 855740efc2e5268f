"""`--auto`: what is chosen by which measurements, and that measuring leaves no trace in a run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.cli.main import main
from distmatch.training import auto
from distmatch.training.options import DistillOptions, RunOptions
from tests.cli.test_processes import distance, launch, started
from tests.helpers.command import command, done

TRAIN = "train --data digits --net mlp --width 16 --depth 1 --batch 16 --steps 4"
DISTILL = "distill --method dmd2 --batch 16 --steps 4 --fake-score-steps 2 --gan-weight 0 --teacher"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a teacher, without choices."""
    folder = tmp_path_factory.mktemp("auto") / "teacher"
    assert main([*TRAIN.split(), "--out", str(folder)]) == 0
    return folder


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Any, once: float = 0.0) -> list[Any]:
    """Replaces the timing of a job by a function of its options; the options that were timed."""
    seen: list[Any] = []

    def step_times(job: Any, device: Any, repeats: int) -> tuple[float, float]:
        seen.append(job.options)
        return (once if job.options.run.compile else 0.0), seconds(job.options)

    monkeypatch.setattr(auto, "step_times", step_times)
    return seen


def config(folder: Path) -> dict[str, Any]:
    """The options that a run keeps."""
    return tomllib.loads((folder / "config.toml").read_text())


def same(one: Path, other: Path) -> None:
    """Refuses models of two runs that differ in a bit."""
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())


def test_a_run_with_choices_is_the_run_with_these_options(teacher: Path, tmp_path: Path) -> None:
    line = f"{DISTILL} {teacher} --accumulate 2 --precision fp32"
    for words, name in (("--auto", "auto"), ("", "plain")):
        assert main([*f"{line} {words} --out {tmp_path}/{name}".split()]) == 0
    same(tmp_path / "auto", tmp_path / "plain")
    assert config(tmp_path / "auto") == config(tmp_path / "plain")
    assert not {path.name for path in tmp_path.iterdir()} - {"auto", "plain"}
    start = json.loads((tmp_path / "auto" / "log.jsonl").read_text().splitlines()[0])
    assert [choice["option"] for choice in start["auto"]] == ["checkpointing", "compile"]
    given = dm.distill(teacher, method="dmd2", steps=4, batch=16, fake_score_steps=2, gan_weight=0.0,
                       accumulate=2, precision="fp32", auto=True, quiet=True)  # fmt: skip
    plain = dm.Student.from_pretrained(tmp_path / "plain")
    assert torch.equal(given.sample(4, seed=0), plain.sample(4, seed=0))


def test_memory_that_runs_out_is_an_answer(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(options: DistillOptions) -> float:
        own: Any = options.settings
        if own.accumulate < (1 if own.checkpointing else 4):
            raise torch.OutOfMemoryError("out of memory")
        return 0.2 if own.checkpointing else 0.1

    seen = timed(monkeypatch, seconds)
    assert main([*f"{DISTILL} {teacher} --auto --out {tmp_path}/run".split()]) == 0
    tried = [(o.settings.checkpointing, o.settings.accumulate) for o in seen]
    assert tried == [(False, 1), (False, 2), (False, 4), (True, 1), (False, 4)]
    assert (config(tmp_path / "run")["distill"]["accumulate"], seen[-1].run.precision) == (4, "bf16")
    assert "does not fit" in capsys.readouterr().err
    # With --resume the choices are those of the run.
    monkeypatch.setattr(auto, "step_times", None)
    assert main(["distill", "--resume", "--auto", "--steps", "6", "--out", str(tmp_path / "run")]) == 0
    assert config(tmp_path / "run")["distill"]["accumulate"] == 4


def test_a_run_that_never_fits_is_refused_and_writes_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(options: Any) -> float:
        raise torch.OutOfMemoryError("out of memory")

    timed(monkeypatch, seconds)
    for line in (f"{DISTILL} {teacher}", TRAIN):
        assert main([*f"{line} --batch 2 --auto --out {tmp_path}/run".split()]) == 2
        assert "does not fit into memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_predicted_not_to_fit_is_not_tried(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmatch.training.memory.LARGE", 0)
    monkeypatch.setattr(auto, "free_memory", lambda: 10_000)
    seen = timed(monkeypatch, lambda options: 1.0)
    with pytest.raises(UserError, match="would take"):
        dm.distill(teacher, method="dmd2", steps=5, batch=1, auto=True, quiet=True)
    assert seen == []


@pytest.mark.parametrize(("bf16", "chosen"), [(0.05, "bf16"), (0.095, "fp32")])
def test_bf16_is_chosen_where_it_is_faster(bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda options: bf16 if options.run.precision == "bf16" else 0.1)
    assert done(f"{TRAIN} --auto --dry-run --json").json()["options"]["run"]["precision"] == chosen


def test_what_is_given_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch, lambda options: 0.1 if options.run.precision == "fp32" else 0.05)
    (tmp_path / "c.toml").write_text('verb = "train"\n[run]\nprecision = "fp32"\ncompile = true\n')
    for words in ("--precision fp32", f"--config {tmp_path}/c.toml"):
        run = done(f"{TRAIN} {words} --auto --dry-run --json").json()["options"]["run"]
        assert (run["precision"], run["compile"]) == ("fp32", False)
    assert {options.run.precision for options in seen} == {"fp32"}


@pytest.mark.parametrize(
    ("steps", "once", "compiled"),
    [(5000, 100.0, True), (5000, 300.0, False), pytest.param(100, 0.0, False, marks=pytest.mark.slow)],
)
def test_compiling_must_pay_for_itself(
    steps: int, once: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = timed(monkeypatch, lambda options: 0.05 if options.run.compile else 0.1, once)
    line = f"{TRAIN} --precision fp32 --auto".replace("--steps 4", f"--steps {steps}")
    options, _ = parsed(line)
    found, choices = auto.choose(options, build(options), fixed=("precision",))
    assert found.run.compile is compiled
    assert len(seen) == (1 if steps == 100 else 2)
    assert choices[-1].option == "compile"


def parsed(line: str) -> tuple[Any, Any]:
    """The options of a line of `train`."""
    from distmatch.cli.parse import TrainingPlace, parse_run
    from distmatch.cli.train import HELP
    from distmatch.training.options import TrainOptions

    return parse_run(TrainOptions, line.split()[1:], verb="train", said=HELP, place=TrainingPlace)


def build(options: Any) -> Any:
    """A function that prepares a run, and compiles nothing."""
    from dataclasses import replace

    from distmatch.training.prepare_teacher import prepare_training

    def made(other: Any) -> Any:
        job = prepare_training(replace(other, run=replace(other.run, compile=False)), fresh=False)
        job.options = other
        return job

    return made


@pytest.mark.slow
def test_a_choice_that_cannot_be_used_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(options: Any) -> float:
        if options.run.compile:
            raise RuntimeError("no compiler here")
        return 100.0

    timed(monkeypatch, seconds)
    options, _ = parsed(TRAIN)
    found, choices = auto.choose(options, build(options), fixed=("precision",))
    assert not found.run.compile
    assert "no compiler here" in choices[-1].why


def test_the_batch_grows_while_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda options: 0.1 + max(0, options.run.batch - 64))
    line = f"{TRAIN} --precision fp32".replace("--batch 16", "")
    assert done(f"{line} --auto-batch --dry-run --json").json()["options"]["run"]["batch"] == 64
    refused = command(f"{TRAIN} --auto-batch --dry-run")
    assert (refused.code, "omit --batch" in refused.err) == (2, True)


def with_times(rank: int, *rest: Any) -> None:
    """One of several processes, in which bf16 is faster for the first one and slower for the others."""

    def step_times(job: Any, device: Any, repeats: int) -> tuple[float, float]:
        run = job.options.run
        assert run.batch == RunOptions().batch // 2  # its own rows, without the other process
        return 0.0, (0.01 if rank == 0 else 0.2) if run.precision == "bf16" else 0.1

    auto.step_times = step_times  # type: ignore[attr-defined]
    started(rank, *rest)


@pytest.mark.slow
def test_all_processes_choose_what_suits_the_slowest(tmp_path: Path) -> None:
    line = TRAIN.replace("--batch 16", "")
    answers = launch(tmp_path / "launch", f"{line} --auto --out {tmp_path}/two", start=with_times)
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert config(tmp_path / "two")["run"]["precision"] == "fp32"
    assert main([*f"{line} --out {tmp_path}/one".split()]) == 0
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5


@pytest.mark.parametrize(("own", "least"), [(8_000, 4_000), (40_000, 10_000), (None, None)])
def test_all_processes_take_part_in_finding_the_least_free_memory(
    own: int | None, least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def largest(self: Ranks, value: int) -> int:
        asked.append(value)
        return max(value, -10_000)  # the other process has this much

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(Ranks, "largest", largest)
    monkeypatch.setattr(auto, "free_memory", lambda: own)
    tuner = auto._Tuner(build, Ranks(0, 2), torch.device("cpu"))
    assert (tuner.available, len(asked)) == (least, 1)
