"""Prompts of a model of captions, whose encoder is a vocabulary: the same options as for pipelines."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.diffusion.prompts import encode_prompts
from distmatch.interop import save_denoiser
from tests.helpers.command import command, contents, done

SHORT = "--method sid --steps 10 --batch 4"
TEXTS = ["a red seven", "a blue two, then a red seven", "a red one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher of captions, hardly trained, and a file of prompts."""
    made = tmp_path_factory.mktemp("captions")
    teacher = dm.train("captioned-digits", steps=2, batch=4, width=16, depth=1, heads=2, quiet=True)
    save_denoiser(made / "teacher", teacher, {"kind": "teacher"})
    (made / "prompts.txt").write_text("\n".join(TEXTS))
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))


def test_a_student_is_distilled_and_drawn_by_prompts(folder, tmp_path):
    line = (
        f"distill --teacher {folder}/teacher --prompts {folder}/prompts.txt --method sid --steps 10 --batch 4"
    )
    assert "--prompt" in done(f"{line} --out {tmp_path}/run").out
    done(f"{line} --encode live --out {tmp_path}/live")
    students = [dm.Student.from_pretrained(tmp_path / run) for run in ("run", "live")]
    conditioning = encode_prompts(students[0].denoiser, TEXTS)
    x, live = (student.sample(3, conditioning=conditioning) for student in students)
    assert torch.equal(x, live)  # tokens are whole numbers
    done(f"sample {tmp_path}/run --prompts {folder}/prompts.txt --out {tmp_path}/s.npz --device cpu")
    found = np.load(tmp_path / "s.npz")
    assert found["prompts"].tolist() == TEXTS
    assert np.abs(found["x"].astype(float) - students[0].export(x)).max() <= 1


def test_words_that_the_model_does_not_know(folder, tmp_path):
    answer = command(f"sample {folder}/teacher --prompt zebra --out {tmp_path}/s.npz")
    assert answer.code == 2
    assert "zebra" in answer.err
    (tmp_path / "p.txt").write_text("a red zebra\n")
    line = f"distill --teacher {folder}/teacher --prompts {tmp_path}/p.txt {SHORT}"
    answer = command(f"{line} --out {tmp_path}/run")
    assert answer.code == 2
    assert "zebra" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dropout_of_captions_in_data(folder):
    teacher = dm.load_teacher(folder / "teacher")
    common = {"method": "sid", "steps": 10, "batch": 4, "quiet": True}
    plain = dm.distill(teacher, "captioned-digits", **common)
    dropped = dm.distill(teacher, "captioned-digits", prompt_dropout=0.9, **common)
    conditioning = encode_prompts(teacher, TEXTS)
    x, other = (student.sample(3, conditioning=conditioning) for student in (plain, dropped))
    assert not torch.equal(x, other)


def test_a_run_is_not_resumed_on_other_prompts(folder, tmp_path):
    """By content: the name of the file is the same."""
    file = tmp_path / "p.txt"
    file.write_text("\n".join(TEXTS))
    line = f"distill --teacher {folder}/teacher --prompts {file} {SHORT} --out {tmp_path}/run"
    done(f"{line} --checkpoint-every 5")
    before = contents(tmp_path / "run")
    for changed in ([*TEXTS, "a blue one"], TEXTS[::-1], ["a red six", *TEXTS[1:]]):
        file.write_text("\n".join(changed))
        answer = command(f"distill --resume --out {tmp_path}/run --steps 20")
        assert answer.code == 2
        assert "keeps its prompts" in answer.err
        ahead = command(f"distill --resume --out {tmp_path}/run --steps 20 --dry-run")
        assert ahead.code == 2
        assert answer.err.endswith(ahead.err)  # which encodes nothing before it refuses
        assert contents(tmp_path / "run") == before
    file.write_text("\r\n".join(TEXTS) + "\n")  # the same prompts
    done(f"distill --resume --out {tmp_path}/run --steps 20")


def test_a_run_without_a_checkpoint_may_begin_anew_on_other_prompts(folder, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n".join(TEXTS))
    line = f"distill --teacher {folder}/teacher --prompts {file} {SHORT} --out {tmp_path}/run"
    done(line)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    file.write_text("\n".join(TEXTS[:2]))
    done(f"distill --resume --out {tmp_path}/run")
    done(f"distill --resume --out {tmp_path}/run --steps 12")
