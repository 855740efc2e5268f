"""Comparisons from end to end: same budget, same latents, stopped and resumed, with failures and refusals."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.training.comparison import run as module
from distmatch.training.options import DistillOptions
from distmatch.training.runs import Job
from tests.helpers.command import command, contents, done, weights
from tests.helpers.processes import Forked
from tests.helpers.small import PAIR

COMMON = "--teacher ring8 --net mlp --width 16 --depth 1 --batch 32 --fit-steps 5 --n 50 --log-every 1"
TWO = f'compare --methods "diff-instruct,fast=diff-instruct[lr=0.002]" {COMMON} --budget "12 steps" --seeds 2'


def read(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "compare.json").read_text())
    assert isinstance(found, dict)
    return found


def results(folder: Path) -> list[tuple[str, int, str, Any]]:
    """What does not depend on the clock: every run with its metrics."""
    return [
        (
            run["name"],
            run["seed"],
            run["status"],
            {k: v for k, v in run["metrics"].items() if isinstance(v, dict)},
        )
        for run in read(folder)["runs"]
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "two"
    answer = done(f"{TWO} --out {folder} --json")
    assert answer.json()["runs"] == read(folder)["runs"]
    return folder


def test_every_method_and_seed_is_an_ordinary_run(finished: Path) -> None:
    record = read(finished)
    assert [(run["name"], run["seed"]) for run in record["runs"]] == [
        ("diff-instruct", 0),
        ("fast", 0),
        ("diff-instruct", 1),
        ("fast", 1),
    ]
    assert {run["status"] for run in record["runs"]} == {"done"}
    for run in record["runs"]:
        folder = finished / run["folder"]
        for name in ("config.toml", "env.json", "log.jsonl", "metrics.json", "model", "samples/student.npz"):
            assert (folder / name).exists()
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == {
            "reference": record["reference"],
            "teacher": record["teacher"],
            "student": run["metrics"],
        }
        assert run["seconds"] > 0
        assert run["metrics"]["nfe"] == 1
    done(f"report {finished / record['runs'][0]['folder']}")
    done(f"sample {finished / record['runs'][0]['folder']} --n 3 --out {finished}/x.npz")
    assert record["methods"][0]["steps"] == 12
    assert record["methods"][0]["calls_per_step"] == pytest.approx(3.4)  # ring8 is a formula


def test_the_summary_is_that_of_the_runs(finished: Path) -> None:
    record = read(finished)
    for name in ("diff-instruct", "fast"):
        values = [run["metrics"]["fd"]["value"] for run in record["runs"] if run["name"] == name]
        mean = record["summary"]["means"][name]["fd"]
        assert mean["value"] == pytest.approx(np.mean(values))
        assert mean["stderr"] > np.std(values, ddof=1) / 2**0.5
    baseline = record["summary"]["baseline"]
    assert baseline == min(
        record["summary"]["means"], key=lambda k: record["summary"]["means"][k]["fd"]["value"]
    )
    (other,) = {"diff-instruct", "fast"} - {baseline}
    rows = {d["metric"]: d for d in record["summary"]["differences"]}
    assert {d["name"] for d in rows.values()} == {other}
    assert rows["fd"]["value"] > 0
    assert rows["fd"]["seeds"] == 2
    assert {f["quality"] for f in record["summary"]["fronts"]} == {"precision", "fd"}


def test_the_metrics_are_those_of_evaluate(finished: Path) -> None:
    """The same protocol as for a single run: evaluating it again gives the same numbers."""
    run = read(finished)["runs"][1]
    again = done(f"evaluate {finished / run['folder']} --n 50 --json").json()
    for key in ("fd", "recall", "kl"):
        assert again["student"][key] == run["metrics"][key]


def test_resuming_a_finished_comparison_changes_nothing_but_its_baseline(finished: Path) -> None:
    before = results(finished)
    done(f"compare --out {finished} --resume --baseline fast")
    assert results(finished) == before
    assert read(finished)["summary"]["baseline"] == "fast"


@pytest.mark.slow
def test_more_seeds_can_be_asked_for_later_and_nothing_else(tmp_path: Path, finished: Path) -> None:
    one = TWO.replace("--seeds 2", "--seeds 1")
    done(f"{one} --out {tmp_path}/c")
    assert read(tmp_path / "c")["summary"]["differences"][0]["verdict"] == "not known"
    for change in ("--lr 1e-4", '--budget "13 steps"', "--batch 64", "--methods diff-instruct"):
        answer = command(f"compare --out {tmp_path}/c --resume {change}")
        assert answer.code == 2
        assert "started with other options" in answer.err
    done(f"compare --out {tmp_path}/c --resume --seeds 2")
    assert results(tmp_path / "c") == results(finished)
    assert command(f"compare --out {tmp_path}/c --resume --seeds 1").code == 2


def test_identical_methods_give_identical_samples_and_no_difference(tmp_path: Path) -> None:
    line = TWO.replace("fast=diff-instruct[lr=0.002]", "twin=diff-instruct[batch=32]")
    done(f'{line} --budget "5 steps" --seeds 1 --out {tmp_path}/c')
    files = [tmp_path / "c/runs" / f"{name}-seed0/samples/student.npz" for name in ("diff-instruct", "twin")]
    with np.load(files[0]) as first, np.load(files[1]) as second:
        assert np.array_equal(first["x"], second["x"])
    assert all(d["value"] == 0 for d in read(tmp_path / "c")["summary"]["differences"])


def wrapped(change: Callable[[Job, DistillOptions], None]) -> Callable[..., Job]:
    """The preparation of a run with a change of the job."""
    prepare = module.prepare_distillation

    def prepared(options: DistillOptions, *args: Any, **kwargs: Any) -> Job:
        job = prepare(options, *args, **kwargs)
        change(job, options)
        return job

    return prepared


@pytest.mark.slow
def test_ctrl_c_and_resume_give_what_an_undisturbed_comparison_gives(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: Job, options: DistillOptions) -> None:
        step = job.step

        def stepped(state: Any, batch: Any) -> Any:
            if options.settings.lr == 0.002 and options.run.seed == 0 and state.step == 6:
                signal.raise_signal(signal.SIGINT)
            return step(state, batch)

        job.step = stepped

    with monkeypatch.context() as patch:
        patch.setattr(module, "prepare_distillation", wrapped(interrupt))
        answer = command(f"{TWO} --out {tmp_path}/c")
    assert answer.code == 130
    assert "--resume" in answer.err
    states = [run["status"] for run in read(tmp_path / "c")["runs"]]
    assert states == ["done", "pending", "pending", "pending"]
    done(f"report {tmp_path}/c")  # what there is can be looked at
    second = tmp_path / "c/runs/fast-seed0"
    assert [p.name for p in (second / "checkpoints").iterdir()] == ["step-000007"]
    untouched = contents(tmp_path / "c/runs/diff-instruct-seed0")
    done(f"compare --out {tmp_path}/c --resume")
    assert contents(tmp_path / "c/runs/diff-instruct-seed0") == untouched
    assert results(tmp_path / "c") == results(finished)
    assert weights(second) == weights(finished / "runs/fast-seed0")


@pytest.mark.slow
def test_kill_9_and_resume_give_what_an_undisturbed_comparison_gives(tmp_path: Path, finished: Path) -> None:
    line = f"{TWO} --checkpoint-every 2 --out {tmp_path}/c"
    process = Forked(shlex.split(line))
    checkpoints = tmp_path / "c/runs/fast-seed0/checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [run["status"] for run in read(tmp_path / "c")["runs"]].count("pending") >= 2
    done(f"compare --out {tmp_path}/c --resume")
    assert results(tmp_path / "c") == results(finished)


def test_a_failing_method_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that go bad, memory that runs out, an error in the code: each is told, the others finish."""

    def spoil(job: Job, options: DistillOptions) -> None:
        step = job.step

        def diverge(state: Any, batch: Any) -> Any:
            return {key: value * float("nan") for key, value in step(state, batch).items()}

        def exhaust(state: Any, batch: Any) -> Any:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nand more lines")

        def break_(state: Any, batch: Any) -> Any:
            raise IndexError("list index out of range")

        if options.settings.lr == 0.002:
            job.step = {0: diverge, 1: exhaust, 2: break_}[options.run.seed]

    with monkeypatch.context() as patch:
        patch.setattr(module, "prepare_distillation", wrapped(spoil))
        answer = done(f'{TWO} --seeds 3 --budget "5 steps" --out {tmp_path}/c')
    runs = read(tmp_path / "c")["runs"]
    assert [run["status"] for run in runs] == ["done", "failed"] * 3
    messages = [run["message"] for run in runs if run["status"] == "failed"]
    assert "not finite" in messages[0] or "nan" in messages[0]
    assert "does not fit into memory" in messages[1]
    assert "Tried to allocate 20 GiB" in messages[1]
    assert messages[2] == "IndexError: list index out of range"
    assert all(f"failed: fast seed {seed}" in answer.out for seed in range(3))
    assert list(read(tmp_path / "c")["summary"]["means"]) == ["diff-instruct"]
    page = (tmp_path / "c/report.html").read_text()
    assert "IndexError" in page
    done(f"compare --out {tmp_path}/c --resume")  # what failed stays failed
    assert [run["status"] for run in read(tmp_path / "c")["runs"]] == ["done", "failed"] * 3
    done(f"compare --out {tmp_path}/c --resume --retry-failed")
    assert {run["status"] for run in read(tmp_path / "c")["runs"]} == {"done"}


def test_methods_that_cannot_be_used_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    methods = '--methods "diff-instruct,a=dmd2[student_sigma=-1],disback"'
    line = f'compare {methods} {COMMON} --budget "5 steps" --seeds 1'
    answer = command(f"{line} --out {tmp_path}/c")
    assert answer.code == 2
    assert "2 of 3 methods cannot be used" in answer.err
    assert "a: " in answer.err
    assert "disback: the run would end before" in answer.err
    assert "--skip-impossible" in answer.err
    assert not (tmp_path / "c").exists()
    done(f"{line} --out {tmp_path}/d --skip-impossible")
    before = contents(tmp_path / "d")
    assert command(f"{line} --out {tmp_path}/d --overwrite").code == 2
    assert contents(tmp_path / "d") == before
    record = read(tmp_path / "d")
    assert [m["name"] for m in record["methods"]] == ["diff-instruct"]
    assert [entry["name"] for entry in record["impossible"]] == ["a", "disback"]
    assert "a, left out" in (tmp_path / "d/report.html").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare --methods dmd2 --out OUT", "no teacher"),
        (f"compare {COMMON} --out OUT", "no methods"),
        (f"compare --methods dmd2 {COMMON}", "--out"),
        (f"compare --methods dmd2 {COMMON} --out OUT --budget much", "no budget"),
        (f"compare --methods dmd2 {COMMON} --out OUT --baseline sid", "baseline"),
        (f"compare --methods dmd2 {COMMON} --out OUT --method sid", "--methods"),
        (f"compare --methods dmd2 {COMMON} --out OUT --seeds 0", "--seeds"),
        (f"compare --methods dmd2 {COMMON} --out OUT --n 3", "too few samples"),
        (f"compare --methods dmd2 {COMMON} --out OUT --data digits", "shape"),
        (f"compare --methods dmd2 {COMMON} --out OUT --eval-solver magic", "solver"),
        (f"compare --methods dmd2 {COMMON} --out OUT --resume", "nothing to resume"),
        (f"compare --methods dmd2 {COMMON} --out OUT --resume 500", "as a whole"),
    ],
)
def test_mistakes(line: str, said: str, tmp_path: Path) -> None:
    answer = command(line.replace("OUT", str(tmp_path / "c")))
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "c").exists()


def test_a_dry_run_writes_nothing_and_shows_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = done(f"{TWO} --dry-run --out {tmp_path}/c").out
    assert "fast: " in out
    assert "lr = 0.002" in out
    assert out.count("# time ") == 2
    shown = done(f"{TWO.replace('12 steps', '30s')} --dry-run --json").json()
    assert shown["budget"] == {"amount": 30.0, "unit": "seconds"}
    for method in shown["methods"]:
        assert method["steps"] == max(1, int(30 / method["seconds_per_step"]))
        assert method["estimated_seconds"] <= 30.1
        assert method["parameters"]["student"] > 0
    assert shown["methods"][1]["options"]["distill"]["lr"] == 0.002
    assert contents(tmp_path) == {}


def test_a_budget_of_network_calls_is_the_same_for_all(tmp_path: Path) -> None:
    line = f'compare --methods "diff-instruct,slow=diff-instruct[fake_score_steps=1]" {COMMON} --seeds 1'
    done(f'{line} --budget "60 calls" --out {tmp_path}/c')
    methods = read(tmp_path / "c")["methods"]
    assert methods[0]["calls_per_step"] < methods[1]["calls_per_step"]
    for method in methods:
        assert method["steps"] == int(60 / method["calls_per_step"])
        log = (tmp_path / "c/runs" / f"{method['folder']}-seed0/log.jsonl").read_text().splitlines()
        assert json.loads(log[-2])["step"] == method["steps"]


def test_from_python_with_objects(tmp_path: Path) -> None:
    settings = {"batch": 32, "fit_steps": 5, "n": 50, "width": 16, "depth": 1}
    record = dm.compare(
        PAIR, methods=["diff-instruct"], out=tmp_path / "c", budget="5 steps", seeds=1, quiet=True, **settings
    )
    assert record == read(tmp_path / "c")
    assert record["runs"][0]["metrics"]["fd"]["n"] == 50
    assert (tmp_path / "c/report.html").exists()
    with pytest.raises(UserError, match="unknown setting"):
        dm.compare(PAIR, methods="dmd2", out=tmp_path / "d", bugdet="5m")
    assert not (tmp_path / "d").exists()
