"""The watch of students of pipelines: prompts as conditions, latents that are decoded, adapters, video."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distmatch as dm
from tests.helpers.pipelines import SIZE, save

PROMPTS = ["a red cat", "the dog sleeps", "a house"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("stable-diffusion-3", {"train": "lora", "lora_rank": 2, "num_steps": 2, "base_dtype": "bfloat16"}),
        ("wan", {"guidance": 2.0}),
    ],
)
def test_students_of_pipelines_are_watched(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    teacher: Any = dm.load_teacher(save(name, tmp_path / "pipelines"), **SIZE[name])
    told = teacher.pipeline.encode(PROMPTS)
    out = tmp_path / "run"
    common: dict[str, Any] = {"steps": 2, "batch": 2, "fake_score_steps": 2, "method": "diff-instruct"}
    watch: dict[str, Any] = {"watch_every": 2, "watch_grid": (2, 2), "keep_best": "energy", "result": "best"}
    dm.distill(teacher, told, out=out, quiet=True, **common, **watch, **settings)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = [e for e in log if e["event"] == "watch"]
    assert [e["step"] for e in seen] == [0, 2]
    video = len(teacher.decoder.shape) == 4
    for event in seen:
        assert all(math.isfinite(event[key]) for key in ("diversity", "vendi", "energy"))
        assert {"saturation", "solid", "teacher_solid"} <= event.keys()  # of what is decoded
        assert ("motion" in event) == video
    with np.load(out / "watch" / "step-000002.npz") as file:
        assert file["condition_prompt"].tolist() == [1, 1, 2, 2]
        assert len(file["x"]) == 4
        assert file["x"].ndim == 4 + video
