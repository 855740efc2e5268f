"""The short form of benchmarks/captioned_digits.py: every part of it, on models of a few steps."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.training.evaluation import evaluate_models
from distmatch.training.models import open_model
from distmatch.training.runfolder import RunFolder
from tests.helpers.command import command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # the models of a few steps take ten seconds


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("captioned_digits", ROOT / "benchmarks/captioned_digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["captioned_digits"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    del sys.modules["captioned_digits"]


@pytest.fixture(scope="module")
def measured(benchmark, tmp_path_factory):
    """Its options, rows and pictures, with commands run in this process."""
    options = benchmark.Options(
        out=tmp_path_factory.mktemp("captions"),
        divergences=("js",),
        num_steps=(2,),
        prompts=12,
        diverse=3,
        seeds=4,
        judge_steps=3,
        train=("--steps=2", "--batch=16", "--width=32", "--depth=1"),
        distill=("--steps=2", "--batch=16"),
    )
    run = []

    def in_process(words):
        run.append(words[0])
        answer = command(shlex.join(words))
        assert answer.code == 0, answer.err

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "distmatch", in_process)
        rows, pictures = benchmark.results(options)
        again, same = benchmark.results(options)
    assert run == ["train", "distill"]  # once: the models were there the second time
    assert again == rows
    assert all(torch.equal(pictures[name], same[name]) for name in pictures)
    return options, rows, pictures


def test_every_model_is_measured_and_shown(benchmark, measured, tmp_path):
    options, rows, pictures = measured
    assert [row.name for row in rows] == ["real pictures", "teacher", "teacher, guidance 2", "js, 2 steps"]
    assert [row.calls for row in rows] == [0, 35, 70, 2]
    assert all(x.shape == (3, 4, 3, 8, 16) for x in pictures.values())
    assert rows[0].agreement["mean"].n == 4000
    lines = benchmark.table(options, rows).splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    json.dumps([row.to_dict() for row in rows], allow_nan=False)
    benchmark.picture(pictures, ["a red seven"] * 3, tmp_path / "pictures" / "x.png")
    assert (tmp_path / "pictures" / "x.png").stat().st_size > 1000


def test_relative_agreement_is_the_judges_own_and_then_the_guided_teachers(benchmark, measured):
    options, rows, _ = measured
    relative = [float(line.split("|")[7]) for line in benchmark.table(options, rows).splitlines()[2:]]
    mean = [row.agreement["mean"].value for row in rows]
    expected = [1, mean[1] / mean[0], mean[2] / mean[0], mean[3] / mean[2]]
    assert relative == pytest.approx(expected, abs=6e-4)


def test_run_folders_of_captions_are_evaluated(measured):
    options, _, _ = measured
    answer = command(f"evaluate {options.out}/js-2 --n 20 --steps 3")
    assert answer.code == 0, answer.err
    assert "against captioned-digits" in answer.out
    assert open_model(str(options.out / "js-2")).prompt_encoder is not None


def test_data_without_captions_cannot_be_measured_against(measured):
    options, _, _ = measured
    bare, model = load_data("captioned-digits:test").without_labels(), open_model(str(options.out / "js-2"))
    with pytest.raises(UserError, match="do not contain the teacher's conditioning"):
        evaluate_models(bare, {"student": model}, RunFolder(options.out / "js-2"))
