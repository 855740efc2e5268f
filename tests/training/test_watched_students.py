"""The watch with students of every kind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import distmatch as dm
from distmatch.data import Dataset
from distmatch.data.scaling import Scaling
from distmatch.methods.matching.loop import Matching
from distmatch.methods.table import METHODS
from distmatch.training.watch_grid import MOST_PICTURES
from tests.helpers.image_teachers import image_teacher
from tests.helpers.small import PAIR, distiller, network_teacher
from tests.helpers.watching import SMALL, events


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("unet", {"method": "dmd2", "num_steps": 2}),
        pytest.param(
            "unet", {"method": "f-distill", "train": "lora", "accumulate": 3}, marks=pytest.mark.slow
        ),
        ("dit", {"method": "consistency"}),
        ("diffusers", {"method": "sid"}),
        ("own", {"method": "rcm"}),
    ],
)
def test_students_of_images_are_watched(name, settings, tmp_path):
    teacher = image_teacher(name)
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(40) % 2 if teacher.num_classes else None
    data = Dataset(x, labels, (), "noise", Scaling.for_images(-1.0, 1.0, "noise"))
    out = tmp_path / "run"
    if "fake_score_steps" in METHODS[settings["method"]].options():
        settings = {**settings, "fake_score_steps": 2}
    given: dict[str, Any] = {"steps": 2, "batch": 6, "watch_every": 1, "watch_grid": (2, 4), "quiet": True}
    given["watch_samples"] = 24 if name == "dit" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dm.distill(teacher, data, out=None if name in ("own", "diffusers") else out, **given, **settings)
        if out.exists():
            seen = events(out, "watch")
            assert [e["step"] for e in seen] == [0, 1, 2]
            assert all(
                {"saturation", "teacher_saturation", "solid", "teacher_solid"} <= e.keys() for e in seen
            )


def test_many_pictures_are_thinned_out(tmp_path):
    out = tmp_path / "run"
    dm.distill(PAIR, out=out, steps=2 * MOST_PICTURES, watch_every=1, watch_grid=(1, 2), **SMALL)
    found = sorted(path.name for path in (out / "watch").glob("step-*.npz"))
    assert MOST_PICTURES // 2 < len(found) <= MOST_PICTURES
    assert found[0] == "step-000000.npz"
    assert found[-1] == f"step-{2 * MOST_PICTURES:06d}.npz"


def test_the_loop_of_methods_with_a_fake_score_is_measured():
    for name, method in METHODS.items():
        if method.has_fake_score and name not in ("disback",):
            made = distiller(network_teacher(classes=2), None, name)
            assert isinstance(made, Matching) or hasattr(made, "fake_score_error"), name
