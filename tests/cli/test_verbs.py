"""The command line, verb by verb, on runs that take a moment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distmatch.cli.main import VERBS
from distmatch.training.options import DistillOptions
from tests.helpers.command import METRICS, SHORT, SPEED, TINY, checkpoints, command, contents, done, weights

MODES = {"modes", "kl", "reverse_kl", "js"}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a teacher ``t``, students of it, and students of exact teachers."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        done(f"train {TINY} {SHORT} --out t")
        done(f"distill --teacher t {SHORT} --out js")
        done(f"distill --teacher t {SHORT} --method dmd2 --num-steps 2 --out two")
        done(f"distill --teacher t {SHORT} --method diff-instruct --out plain")
        exact = f"{TINY} {SHORT} --fit-steps 20"
        done(f"distill --teacher ring8 {exact} --method diff-instruct --out ring")
        done(f"distill --teacher skewed2 {exact} --divergence kl --out skewed")
        yield folder


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    answer = command(f"{verb} --help")
    assert answer.code == 0
    assert f"example: distmatch {verb}" in answer.out
    assert "--seed" in answer.out
    assert "--json" in answer.out


def test_usage_names_every_verb() -> None:
    answer = command("--help")
    assert answer.code == 0
    assert all(verb in answer.out for verb in VERBS)
    assert command("").code == 2
    assert command("--version").out.startswith("distmatch 0.")


def test_import_and_help_are_quick_and_load_nothing_heavy() -> None:
    """In a process of its own, since this one has loaded torch."""
    script = f"""
import sys, time
began = time.perf_counter()
import distmatch
seconds = time.perf_counter() - began
from distmatch.cli.main import main
for verb in {list(VERBS)!r}:
    assert main([verb, "--help"]) == 0
assert main(["--help"]) == 0
heavy = ("torch", "diffusers", "onnx", "sklearn", "scipy", "matplotlib", "numpy")
print(seconds, [name for name in heavy if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, loaded = answer.stdout.splitlines()[-1].split(" ", 1)
    assert float(seconds) < 2
    assert loaded == "[]"


@pytest.mark.slow
def test_the_compiler_of_torch_is_loaded_by_those_who_use_it() -> None:
    """It takes a second of every command line, as much as the rest of torch."""
    script = "import sys, distmatch.cli.running, distmatch.interop, distmatch.training.prepare\n"
    script += "print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("module", ["distmatch", "distmatch.cli.main"])
def test_the_module_runs_as_a_program(module: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", module, "trian"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert "did you mean train?" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_run_folder_holds_what_it_should(place: Path) -> None:
    for run, verb in (("t", "train"), ("js", "distill")):
        assert tomllib.loads((place / run / "config.toml").read_text())["verb"] == verb
        assert json.loads((place / run / "env.json").read_text())["packages"]["torch"]
        events = [json.loads(line) for line in (place / run / "log.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events if event["event"] != "warning"] == [
            *("start", "train", "checkpoint", "end")
        ]
        assert checkpoints(run) == ["step-000006"]


@pytest.mark.parametrize("run", ["t", "js", "two", "plain"])
def test_images_are_sampled_in_all_three_forms(run: str, tmp_path: Path) -> None:
    calls = {"t": 5, "two": 2}.get(run, 1)
    steps = "--steps 3" if run == "t" else ""
    answer = done(f"sample {run} {steps} --n 12 --out {tmp_path}/a.npz --json")
    assert answer.json()["nfe"] == calls
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        x, labels = file["x"], file["labels"]
    assert x.shape == (12, 8, 8)
    assert x.dtype == np.uint8
    assert labels.shape == (12,)
    assert set(np.unique(labels)) <= set(range(10))
    done(f"sample {run} {steps} --n 12 --out {tmp_path}/a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"
    done(f"sample {run} {steps} --n 12 --classes 3 7 --out {tmp_path}/folder")
    files = sorted(p.relative_to(tmp_path / "folder") for p in tmp_path.rglob("folder/**/*.png"))
    assert [file.parts[0] for file in files] == ["3"] * 6 + ["7"] * 6
    assert all(Image.open(tmp_path / "folder" / file).size == (8, 8) for file in files)


@pytest.mark.parametrize("model", ["ring", "skewed", "ring8"])
def test_vectors_are_sampled_as_float32(model: str, tmp_path: Path) -> None:
    done(f"sample {model} --n 9 --out {tmp_path}/v.npz")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
        assert file.files == ["x"]
        assert file["x"].shape == (9, 2)
        assert file["x"].dtype == np.float32
    done(f"sample {model} --n 9 --out {tmp_path}/v.png")
    assert Image.open(tmp_path / "v.png").format == "PNG"


def test_the_seed_decides_the_samples(tmp_path: Path) -> None:
    files = []
    for name, options in {"a": "", "b": "--batch 5", "c": "--seed 1"}.items():
        done(f"sample js --n 12 --out {tmp_path}/{name}.npz {options}")
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as file:
            files.append(file["x"])
    # Other batch sizes may round differently in the last bit of a float, which is far below one grey level.
    assert int(np.abs(files[0].astype(int) - files[1]).max()) <= 1
    assert not np.array_equal(files[0], files[2])


def test_evaluate_a_run_writes_its_metrics_and_the_report_shows_them(place: Path) -> None:
    metrics = done("evaluate js --n 60 --steps 2 --json").json()
    about = metrics.pop("evaluation")
    assert (about["reference"], about["features"], len(about["fingerprint"])) == ("digits", "classifier", 8)
    assert metrics == json.loads((place / "js" / "metrics.json").read_text())
    assert set(metrics) == {"reference", "teacher", "student"}
    assert [metrics[name]["nfe"] for name in metrics] == [None, 3, 1]
    for values in metrics.values():
        assert set(values) == METRICS | SPEED | {"label_accuracy", "class_distance"}
        for key in METRICS:
            assert set(values[key]) - {"warning"} == {"value", "stderr", "n", "features"}, values[key]
        assert all(values[key]["n"] == 60 for key in METRICS - {"vendi"})
    for name in metrics:
        with np.load(place / "js" / "samples" / f"{name}.npz", allow_pickle=False) as file:
            assert file["x"].shape == (120, 8, 8)
    table = done("evaluate js --n 60 --steps 2").out
    assert "floor (real)" in table
    assert "js against digits, the reference" in table
    assert f"features: classifier {about['fingerprint']}" in table
    page = done("report js --json").json()["report"]
    assert "<html" in Path(page).read_text()


def test_exact_teachers_add_the_mode_metrics() -> None:
    metrics = done("evaluate ring --n 60 --steps 2 --json").json()
    for name in ("reference", "teacher", "student"):
        assert set(metrics[name]) == METRICS | MODES | SPEED


def test_evaluate_a_sample_file(tmp_path: Path) -> None:
    done(f"sample js --n 60 --out {tmp_path}/a.npz")
    metrics = done(f"evaluate {tmp_path}/a.npz --data digits --features pixels --json").json()
    about = metrics.pop("evaluation")
    assert "blocks of 30 samples are small" in about.pop("notes")[0]
    assert about == {"reference": "digits", "features": "pixels", "seed": 0}
    assert set(metrics) == {"reference", "samples"}
    second = done(f"evaluate {tmp_path}/a.npz digits --features pixels --json").json()
    assert second["samples"] == metrics["samples"]
    assert metrics["samples"]["fd"]["n"] == metrics["reference"]["fd"]["n"] == 30


def test_export_gives_a_model_that_samples_the_same(tmp_path: Path) -> None:
    exported = done(f"export js --to safetensors --out {tmp_path}/model --json").json()
    assert exported["kind"] == "student"
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    for source, name in (("js", "a"), (f"{tmp_path}/model", "b")):
        done(f"sample {source} --n 4 --out {tmp_path}/{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_doctor_finds_this_machine_healthy() -> None:
    answer = done("doctor --json").json()
    assert answer["ok"] is True
    assert {"torch", "training step", "cache"} <= {check["name"] for check in answer["checks"]}
    assert "ok       torch" in done("doctor").out


def test_doctor_lists_the_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    answer = done("doctor --json").json()
    checks = {check["name"]: check for check in answer["checks"]}
    for name in ("diffusers", "onnx", "onnxscript"):
        assert (checks[name]["ok"], checks[name]["detail"]) == (True, real(name))
    assert checks["onnxruntime"]["ok"] is None
    assert checks["onnxruntime"]["fix"] == "pip install distmatch[onnx]"
    assert answer["ok"] is True
    assert re.search(r"absent   onnxruntime: .*\n +fix: pip install distmatch\[onnx\]", done("doctor").out)


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_a_config_file_repeats_a_run_bit_for_bit(verb: str, tmp_path: Path) -> None:
    run = {"train": "t", "distill": "js"}[verb]
    answer = done(f"{verb} --config {run}/config.toml --out {tmp_path}/again --json")
    assert weights(answer.json()["run"]) == weights(run)
    assert (tmp_path / "again" / "config.toml").read_text() == Path(run, "config.toml").read_text()
    done(f"{verb} --config {run}/config.toml --seed 1 --out {tmp_path}/other")
    assert weights(tmp_path / "other") != weights(run)


def test_a_config_file_with_another_method_leaves_the_first_ones_defaults_behind() -> None:
    def options(line: str) -> dict[str, Any]:
        return done(f"distill {line} --dry-run --json").json()["options"]

    dmd2 = options("--config plain/config.toml --method dmd2")  # of diff-instruct, which has no adversary
    assert dmd2["distill"]["gan_weight"] == DistillOptions.of("dmd2").settings.gan_weight > 0
    scm = options("--config two/config.toml --method scm")  # of dmd2 with two calls, which were chosen
    assert scm["distill"]["num_steps"] == 2
    assert scm["distill"]["student_sigma"] == DistillOptions.of("scm").settings.student_sigma
    assert scm["distill"]["level_mean"] == -0.3
    assert "gan_weight" not in options("--config plain/config.toml")["distill"]


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_resume_extends_a_run_as_if_it_had_been_longer(verb: str, tmp_path: Path) -> None:
    options = f"{TINY} --lr-decay constant" if verb == "train" else "--teacher t --fake-score-steps 2"
    start = f"{verb} {options} --batch 32 --log-every 2"
    done(f"{start} --steps 9 --out {tmp_path}/whole")
    done(f"{start} --steps 5 --out {tmp_path}/parts")
    assert weights(tmp_path / "parts") != weights(tmp_path / "whole")
    assert done(f"{verb} --out {tmp_path}/parts --resume --steps 9 --json").json()["steps"] == 9
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    # Back to an earlier checkpoint by its number.
    assert done(f"{verb} --out {tmp_path}/parts --resume 5 --steps 9 --json").json()["steps"] == 9
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_an_existing_run_is_replaced_only_when_told(tmp_path: Path) -> None:
    start = f"train {TINY} {SHORT} --out {tmp_path}/run"
    done(start)
    before = contents(tmp_path)
    answer = command(f"{start} --seed 1")
    assert answer.code == 2
    assert "--resume" in answer.err
    assert "--overwrite" in answer.err
    assert contents(tmp_path) == before
    done(f"{start} --seed 1 --overwrite")
    assert weights(tmp_path / "run") != weights("t")


@pytest.mark.parametrize(
    "line",
    [
        f"train {TINY} --batch 32",
        f"train {TINY} --batch 32 --json",
        "distill --teacher t --batch 32",
        "distill --teacher t --batch 32 --json",
        f"distill --teacher ring8 --batch 32 {TINY}",
    ],
)
def test_a_dry_run_writes_nothing(line: str, place: Path) -> None:
    cache = Path(os.environ["DISTMATCH_CACHE"])
    before = contents(place), contents(cache)
    for out in ("", "--out new/folder", "--out t"):
        answer = done(f"{line} --dry-run {out}")
        if "--json" in line:
            assert answer.json()["options"]["run"]["batch"] == 32
            assert answer.json()["seconds_per_step"] > 0
        else:
            assert tomllib.loads(answer.out)["run"]["batch"] == 32  # what is printed can be used as a config
    assert (contents(place), contents(cache)) == before


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    assert done(f"train {TINY} {SHORT} --out {tmp_path}/a --json").json()["steps"] == 6
    assert done(f"distill --teacher t {SHORT} --out {tmp_path}/b --json").json()["last"]["step"] == 6
