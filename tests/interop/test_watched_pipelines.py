"""The watch of students of pipelines: prompts as conditions, latents that are decoded, adapters, video."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distmatch as dm
from tests.helpers.command import done
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


def test_prompts_of_a_file_are_the_rows_of_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoders are freed by then; prompts that are dropped in training are not watched."""
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    folder, out, file = save("stable-diffusion-3", tmp_path), tmp_path / "run", tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS[:1], *PROMPTS, *6 * ["a river"], ""]))
    given = f"--teacher {folder} --size 16 --max-tokens 12 --prompts {file} --prompt-dropout 0.5"
    options = "--method diff-instruct --train lora --lora-rank 2 --fake-score-steps 2 --batch 2 --guidance 2"
    watch = "--watch-every 2 --watch-grid 3 2"
    done(f"distill {given} {options} --negative-prompt river --steps 2 {watch} --out {out}")
    with np.load(out / "watch" / "step-000002.npz") as found:
        assert found["prompts"].tolist() == [
            text for text in PROMPTS for _ in range(2)
        ]  # in the file's order
        first = found["x"]
    written = (out / "watch" / "teacher.safetensors").stat().st_mtime_ns
    done(f"distill --resume --steps 4 --out {out}")
    assert (out / "watch" / "teacher.safetensors").stat().st_mtime_ns == written
    with np.load(out / "watch" / "step-000004.npz") as found:
        assert found["x"].shape == first.shape == (6, 16, 16, 3)
    done(f"report {out}")
    assert f": {PROMPTS[0]}." in (out / "report.html").read_text()
