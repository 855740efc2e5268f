"""Evaluation and comparison of students of prompts without real images: against samples of the teacher."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.diffusion.prompts import encode_prompts
from distmatch.interop import save_denoiser
from distmatch.metrics.by_prompt import prompt_estimates
from tests.helpers.command import command, contents, done

TEXTS = ["a red seven", "a blue two, then a red seven", "a red one", "a green four"]
SHORT = "--steps 5 --batch 16 --fake-score-steps 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher of captions that hears them, a file of prompts, and a student of them with guidance."""
    made = tmp_path_factory.mktemp("reference")
    teacher = dm.train("captioned-digits", steps=2, batch=4, width=16, depth=1, heads=2, quiet=True)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that begin at zero would hide the captions
        for parameter in teacher.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=gen)
    save_denoiser(made / "teacher", teacher, {"kind": "teacher"})
    (made / "prompts.txt").write_text("\n".join(TEXTS))
    line = f"distill --teacher {made}/teacher --prompts {made}/prompts.txt --method sid {SHORT}"
    done(f"{line} --guidance 2 --guidance-rescale 0.5 --cache {made}/cache --out {made}/run")
    return made


def test_a_run_is_measured_on_its_own_prompts(place):
    answer = done(f"evaluate {place}/run --n 16 --steps 4 --json").json()
    of = answer["reference"]["of"]
    assert of == "32 samples of the teacher at guidance 2, from other noise, on 4 prompts"
    assert answer["evaluation"]["reference"] == of
    assert answer["teacher"]["prompt_energy"]["value"] < answer["student"]["prompt_energy"]["value"]
    files = {name: np.load(place / "run" / "samples" / f"{name}.npz") for name in ("reference", "student")}
    texts = files["student"]["prompts"].tolist()
    assert sorted(set(texts)) == sorted(TEXTS)
    assert texts == files["reference"]["prompts"].tolist()
    assert texts != sorted(texts)
    assert "In place of real data: 32 samples of the teacher" in (place / "run/model/README.md").read_text()
    page = done(f"report {place}/run") and (place / "run" / "report.html").read_text()
    assert "Teacher, other noise" in page
    assert "a red seven" in page


def test_the_reference_is_the_guided_teacher_of_the_run(place):
    """With the solver, the guidance and the rescaling of the distillation, from noise of its own."""
    answer = done(f"evaluate {place}/run --n 16 --steps 4 --json").json()
    files = {name: np.load(place / "run" / "samples" / f"{name}.npz") for name in ("reference", "student")}
    teacher = dm.load_teacher(place / "teacher")
    turn = [TEXTS[i % 4] for i in range(32)]
    guided = dm.guidance.Guided(teacher, 2.0, rescale=0.5)
    seed = stream_seed(0, "teacher as reference")
    y = dm.solvers.sample_teacher(guided, 32, steps=4, conditioning=encode_prompts(teacher, turn), seed=seed)
    pixels = ((y.clamp(-1, 1) + 1) * 127.5).movedim(1, -1).numpy()
    for image in files["reference"]["x"]:  # in another order
        assert np.abs(pixels - image).reshape(32, -1).max(1).min() < 1
    asked = files["student"]["prompts"].tolist()
    student = dm.Student.from_pretrained(place / "run")
    x = student.sample(32, seed=0, conditioning=encode_prompts(teacher, asked))
    rows = [sorted(range(32), key=lambda i, texts=texts: texts[i]) for texts in (asked, turn)]
    for name, value in prompt_estimates(x[rows[0]], y[rows[1]], sorted(turn)).items():
        assert answer["student"][name]["value"] == pytest.approx(value.value, rel=1e-4)
        assert answer["student"][name]["stderr"] == pytest.approx(value.stderr, rel=1e-3)


def test_other_prompts_and_those_that_are_not_there(place, tmp_path):
    (tmp_path / "other.txt").write_text("a blue one\na red two")
    found = done(f"evaluate {place}/run --prompts {tmp_path}/other.txt --n 12 --steps 4 --json").json()
    assert "on 2 prompts" in found["reference"]["of"]
    student = dm.distill(
        place / "teacher", prompts=TEXTS, method="sid", steps=5, batch=4, quiet=True, out=tmp_path / "python"
    )
    assert student.info["prompts"]["source"] == ""
    for line, said in (
        (f"evaluate {tmp_path}/python --n 12", "passed in Python"),
        (f"evaluate {place}/teacher-run --prompts {tmp_path}/other.txt", "does not exist"),
        (f"evaluate {place}/run --prompts {tmp_path}/none.txt", "none.txt does not exist"),
        (f"evaluate {place}/run --teacher {tmp_path}/none --n 12", "none"),
    ):
        answer = command(line)
        assert answer.code == 2, answer.err
        assert said in answer.err
    config = place / "run" / "model" / "config.json"
    kept = config.read_text()
    try:
        config.write_text(kept.replace(f"{place}/prompts.txt", f"{tmp_path}/other.txt"))
        answer = command(f"evaluate {place}/run --n 12")
        assert answer.code == 2
        assert "are not those that" in answer.err
    finally:
        config.write_text(kept)


@pytest.mark.slow
def test_methods_are_compared_on_prompts(place, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    line = (
        f"compare --teacher {place}/teacher --prompts {tmp_path}/p.txt --methods sid,diff-instruct --seeds 2"
    )
    line += f' --budget "5 steps" --batch 8 --n 12 --eval-steps 4 --cache {tmp_path}/cache'
    done(f"{line} --out {tmp_path}/c")
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert record["reference"]["of"] == "24 samples of the teacher, from other noise, on 3 prompts"
    assert {run["status"] for run in record["runs"]} == {"done"}
    for run in record["runs"]:
        config = (tmp_path / "c" / run["folder"] / "config.toml").read_text()
        assert f'prompts = "{tmp_path}/p.txt"' in config
        assert run["metrics"]["prompt_energy"]["n"] == 3
    assert "prompt_energy" in record["summary"]["means"]["sid"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Teacher, other noise" in page
    done(f"compare --resume --out {tmp_path}/c")
    (tmp_path / "p.txt").write_text("\n".join(TEXTS[1:]))
    before = contents(tmp_path / "c")
    answer = command(f"compare --resume --out {tmp_path}/c --seeds 3")
    assert answer.code == 2
    assert "keeps its prompts" in answer.err
    assert contents(tmp_path / "c") == before


@pytest.mark.slow
def test_a_comparison_in_python_takes_texts(place, tmp_path):
    common = {"methods": "sid", "budget": "2 steps", "seeds": 1, "n": 12, "batch": 8, "eval_steps": 4}
    teacher = dm.load_teacher(place / "teacher")
    record = dm.compare(teacher, prompts=TEXTS, out=tmp_path / "c", fake_score_steps=1, quiet=True, **common)
    assert record["runs"][0]["status"] == "done"
    assert "on 3 prompts" in record["reference"]["of"]
    with pytest.raises(UserError, match="takes no prompts"):
        dm.compare("ring8", prompts=TEXTS, out=tmp_path / "d", quiet=True, **common)
    assert not (tmp_path / "d").exists()
