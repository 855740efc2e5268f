"""Pipelines that receive their guidance scale on the command line: distillation and sampling."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest
import torch

import distmatch as dm
from tests.helpers.command import command, done
from tests.helpers.pipelines import SIZE, save

PROMPTS = ["a red cat", "the dog sleeps"]
SIZED = "--size 16 --max-tokens 12 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Flux pipeline, and a student of it that receives its scale."""
    folder = tmp_path_factory.mktemp("guidance")
    save("flux", folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    done(
        f"distill --teacher {folder}/flux --prompts {folder}/prompts.txt --method sid --train lora "
        f"--lora-rank 2 --guidance-range 1 6 --student-times 1 0.8 --steps 10 --batch 2 --lr 1e-2 {SIZED} "
        f"--out {folder}/run"
    )
    return folder


def test_settings_are_kept_and_a_run_continues(place):
    values = tomllib.loads((place / "run/config.toml").read_text())["distill"]
    assert values["guidance_range"] == [1.0, 6.0]
    assert values["student_times"] == [1.0, 0.8]
    about = json.loads((place / "run/model/config.json").read_text())["extra"]
    assert about["guidance_range"] == about["schedule"]["guidance_range"] == [1.0, 6.0]
    assert "guidance_interval" not in about
    student = dm.Student.from_pretrained(place / "run/model")
    assert student.sigmas == pytest.approx((student.denoiser.sigma_max, 4.0))
    done(f"distill --resume --steps 12 --out {place}/run")


def test_the_scale_of_a_student_is_an_option_of_sampling(place, tmp_path):
    line = f"sample {place}/run --prompts {place}/prompts.txt --n 2 --device cpu"
    done(f"{line} --guidance 5 --out {tmp_path}/strong.npz")
    done(f"{line} --out {tmp_path}/plain.npz")
    strong, plain = (np.load(tmp_path / f"{name}.npz")["x"] for name in ("strong", "plain"))
    assert not np.array_equal(strong, plain)
    student = dm.Student.from_pretrained(place / "run/model")
    teacher = dm.load_teacher(place / "flux", **SIZE["flux"])
    told = dm.Conditioning({**teacher.pipeline.encode(PROMPTS), "guidance": torch.full((2,), 5.0)})
    images = (student.sample(2, conditioning=told).clamp(-1, 1) + 1) * 127.5
    assert np.abs(strong - images.round().numpy().transpose(0, 2, 3, 1)).max() <= 1


def test_other_options_of_a_solver_stay_refused(place, tmp_path):
    line = f"sample {place}/run --prompts {place}/prompts.txt --n 2 --device cpu --out {tmp_path}/x.npz"
    answer = command(f"{line} --guidance 5 --guidance-interval 0.1 2")
    assert answer.code == 2
    assert "there is no ODE to solve" in answer.err
