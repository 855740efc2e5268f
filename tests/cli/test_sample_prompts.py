"""`distmatch sample` with prompts: which prompt each sample has, guidance, the listing beside the images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import distmatch as dm
from distmatch.data import load_data
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.solvers import sample_teacher
from distmatch.training.sampling import Sampling
from tests.helpers.command import command, done
from tests.helpers.pipelines import save

PROMPTS = ["a red cat", "the dog sleeps"]
SIZE = {"height": 16, "width": 16, "max_sequence_length": 12}
OPTIONS = "--size 16 --max-tokens 12 --solver euler --steps 2 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline and a student of adapters on it."""
    folder = tmp_path_factory.mktemp("prompts")
    save("stable-diffusion-3", folder)
    teacher = dm.load_teacher(folder / "stable-diffusion-3", **SIZE)
    told = teacher.pipeline.encode(PROMPTS)
    common = {"steps": 10, "batch": 2, "train": "lora", "lora_rank": 2, "quiet": True}
    dm.distill(teacher, told, method="sid", **common).save_pretrained(folder / "student")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def teacher(place):
    return dm.load_teacher(place / "stable-diffusion-3", **SIZE)


def bytes_of(x: torch.Tensor) -> np.ndarray:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().numpy().transpose(0, 2, 3, 1)


def test_a_student_draws_its_prompts_in_turn(place, teacher, tmp_path):
    out = tmp_path / "images"
    line = f"sample {place}/student --prompts {place}/prompts.txt --n 3 --device cpu"
    assert done(f"{line} --out {out} --json").json()["prompts"] == 2
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    texts = [*PROMPTS, PROMPTS[0]]
    assert lines == [{"file_name": f"{i:06d}.png", "text": text} for i, text in enumerate(texts)]
    student = dm.Student.from_pretrained(place / "student")
    told = teacher.pipeline.encode(texts)
    wanted = bytes_of(student.sample(3, seed=0, conditioning=told))
    found = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(3)])
    assert np.abs(found - wanted).max() <= 1  # rounding
    assert load_data(out).captions == tuple(texts)  # a folder of images with captions again
    done(f"{line} --out {out} --overwrite")
    done(f"{line} --out {tmp_path}/s.npz")
    archive = np.load(tmp_path / "s.npz")
    assert archive["prompts"].tolist() == texts
    assert not [name for name in archive if name.startswith("condition_")]  # which can be made again
    assert load_data(tmp_path / "s.npz").shape == (3, 16, 16)


@pytest.mark.parametrize("negative", ["", "a green tree"])
def test_a_pipeline_is_guided_from_its_null_or_a_negative_prompt(place, teacher, tmp_path, negative):
    line = f"sample {place}/stable-diffusion-3 {OPTIONS} --guidance 3 --out {tmp_path}/s.npz"
    line += "".join(f' --prompt "{prompt}"' for prompt in PROMPTS)
    done(f'{line} --negative-prompt "{negative}"' if negative else line)
    told = teacher.pipeline.encode(PROMPTS)
    away = teacher.pipeline.encode([negative]) if negative else None
    grid = Sampling(solver="euler", steps=2).levels(teacher)
    z = sample_teacher(
        Guided(teacher, 3.0, negative=away), 2, solver="euler", grid=grid, conditioning=told, seed=0
    )
    wanted = bytes_of(teacher.decoder.decode(z))
    assert np.abs(np.load(tmp_path / "s.npz")["x"].astype(float) - wanted).max() <= 1


def test_the_null_prompt_is_an_option_of_the_pipeline(place, tmp_path):
    base = f"sample {place}/stable-diffusion-3 {OPTIONS} --guidance 3 --prompt cat"
    for name, more in (
        ("null", '--null-prompt "a tree"'),
        ("away", '--negative-prompt "a tree"'),
        ("plain", ""),
    ):
        done(f"{base} --out {tmp_path}/{name}.npz {more}")
    x = {name: np.load(tmp_path / f"{name}.npz")["x"].astype(float) for name in ("null", "away", "plain")}
    assert np.abs(x["null"] - x["away"]).max() <= 1
    assert np.abs(x["null"] - x["plain"]).max() > 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{place}/student", "no --prompt"),
        ("{place}/student --prompt a --conditions c.npz", "already determine"),
        ("{place}/student --prompt a --negative-prompt b", "--negative-prompt"),
        ("{place}/student --prompts none.txt", "does not exist"),
        ("ring8 --prompt a", "takes no prompts"),
        ("ring8 --negative-prompt a", "takes no prompts"),
        ("{place}/stable-diffusion-3 --size 16 --max-tokens 12 --prompt a --negative-prompt b", "scale 1"),
    ],
)
def test_what_is_refused(place, tmp_path, line, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("c.npz", condition_a=np.zeros(2))
    answer = command(f"sample {line.format(place=place)}")
    assert answer.code == 2
    assert said in answer.err
