"""Distillation on prompts: what dry runs say, and what is refused before a pipeline is loaded."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import distmatch as dm
from tests.helpers.command import command, done
from tests.helpers.prompted import PROMPTS, SHORT, SIZE, prompted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prompted(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_dry_run_writes_nothing(place, tmp_path, cache):
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --prompts {place}/prompts.txt {SHORT}"
    assert "# prompts     4\n" in done(f"{line} --dry-run").out
    assert not cache.exists()


@pytest.mark.slow
def test_a_dry_run_of_a_large_pipeline_reads_the_prompts(place, cache, monkeypatch, tmp_path):
    from distmatch.cli import memory

    monkeypatch.setattr(memory, "LARGE", 0)
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} {SHORT} --dry-run --json"
    (tmp_path / "long.txt").write_text("\n".join([*PROMPTS[:-1], "a red cat in the house and so on " * 20]))
    told = done(f"{line} --prompts {tmp_path}/long.txt").json()
    cut = told["warnings"]
    assert cut[0].startswith("1 of 4 prompts is longer than the 12 tokens of tokenizer and the 12 tokens of")
    teacher = dm.load_teacher(place / "stable-diffusion-3", height=16, width=16, max_sequence_length=12)
    size = sum(value.nbytes for value in teacher.pipeline.encode(PROMPTS).values())
    assert (told["prompts"], told["encodings"]) == (4, size)
    assert told["levels"] == [teacher.sigma_max]
    assert told["times"] == pytest.approx([1.0])
    assert not cache.exists()
    missing = command(f"{line} --prompts {place}/none.txt")
    assert missing.code == 2
    assert "tracing" not in missing.err  # said before the pipeline is read


@pytest.mark.slow
def test_a_dry_run_of_a_large_pipeline_looks_at_the_data(place, cache, monkeypatch, tmp_path):
    from distmatch.cli import memory

    predicted, predict = {}, memory.predict_memory

    def once(options, teacher):  # the data, which are looked at afterwards, do not change it
        key = options.method, options.run.steps
        if key not in predicted:
            predicted[key] = predict(options, teacher)
        return predicted[key]

    monkeypatch.setattr(memory, "predict_memory", once)
    monkeypatch.setattr(memory, "without_weights", functools.cache(memory.without_weights))
    monkeypatch.setattr(memory, "LARGE", 0)
    line = f"distill --teacher {place}/stable-diffusion-3 {SIZE} {SHORT} --dry-run"
    images = line.replace("--method sid", "--method dmd2")
    assert done(f"{images} --json --data {place}/images").json()["prompts"] == 4
    assert "--prompts" in done(f"{line} --json").json()["missing"]
    assert "# missing     dmd2 needs real data" in done(images).out
    np.savez(tmp_path / "small.npz", x=np.random.default_rng(0).random((6, 3, 5, 5)).astype("float32"))
    for wrong, said in (
        (f"{images} --prompts {place}/prompts.txt", "prompts alone"),
        (f"{images} --data {tmp_path}/none.npz", "none.npz"),
        (f"{images} --data {tmp_path}/small.npz --prompts {place}/prompts.txt", "one prompt for each sample"),
        (f"{line} --data {tmp_path}/small.npz", "do not have the same shape"),
        (f"{line} --prompts {place}/prompts.txt --steps 2 --fake-score-steps 3", "never be updated"),
    ):
        answer = command(wrong)
        assert answer.code == 2, wrong
        assert said in answer.err
    assert not cache.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--method dmd2 --prompts {place}/prompts.txt", "needs real images, and these are prompts alone"),
        ("--method sid --prompts {place}/none.txt", "none.txt does not exist"),
        ("--method sid --encode live", "do nothing without prompts"),
        ("--method sid --prompts {place}/prompts.txt --flip", "captions may say left"),
        ("--method sid --prompts {place}/prompts.txt --prompt-dropout 2", "must be in [0, 1]"),
        ("--method dmd2 --prompts {place}/images --data digits", "two sources of data"),
    ],
)
def test_what_is_refused(place, tmp_path, line, said):
    answer = command(
        f"distill --teacher {place}/stable-diffusion-3 {SIZE} --out {tmp_path}/run --batch 2 --steps 10 "
        + line.format(place=place)
    )
    assert answer.code == 2, answer.err
    assert said in answer.err
    assert not (tmp_path / "run").exists()


def test_what_a_method_needs_is_said_before_a_pipeline_is_loaded(place, tmp_path, monkeypatch):
    from distmatch.cli import memory

    monkeypatch.setattr(memory, "LARGE", 0)
    for line, said in (
        ("--method dmd2", "needs real data"),
        ("--method dmd2 --prompts {place}/prompts.txt", "these are prompts alone"),
        ("--method dmd2 --prompts {place}/prompts.txt --dry-run", "these are prompts alone"),
        ("--method dmd --num-steps 4 --prompts {place}/prompts.txt", "Got: 4 steps with --method dmd"),
        ("--method ctm --prompts {place}/images", "no input for a second noise level"),
        ("--method mmd --prompts {place}/images --dry-run", "class labels only"),
    ):
        given = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --out {tmp_path}/run"
        answer = command(f"{given} {line.format(place=place)}")
        assert answer.code == 2, answer.err
        assert said in answer.err
        assert "tracing" not in answer.err
    assert not (tmp_path / "run").exists()


def test_teachers_without_prompts(tmp_path, place):
    for more, said in (
        (f"--prompts {place}/prompts.txt", "takes no prompts"),
        ("--prompt-dropout 0.1", "for teachers that take prompts"),
    ):
        answer = command(f"distill --teacher ring8 --method sid --steps 10 --out {tmp_path}/run {more}")
        assert answer.code == 2
        assert said in answer.err
