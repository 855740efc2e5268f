"""What samples are conditioned on, in the report: rows of grids by their values, the rest in a sentence."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import FieldSpec
from distmatch.report.run import read_samples
from distmatch.training.evaluation import evaluate_models
from distmatch.training.models import Model
from distmatch.training.runfolder import RunFolder
from tests.helpers.report_runs import Page, page

RNG = np.random.default_rng(0)


def grids(parsed: Page) -> list[tuple[list[str], np.ndarray]]:
    """The names of the rows of each grid, and the picture."""
    found = []
    for image in (a for tag, a in parsed.tags if tag == "img"):
        names = str(image["alt"]).split("condition: ")[1].split("; ")
        png = base64.b64decode(str(image["src"]).split(",")[1])
        found.append((names, np.asarray(Image.open(io.BytesIO(png)))))
    return found


def test_every_row_is_named_after_the_condition_of_its_pictures(tmp_path: Path) -> None:
    """The gray of a picture is the sum of its conditions, and the models have them in different order."""
    (tmp_path / "samples").mkdir()
    for model in ("reference", "teacher", "student"):
        labels, size = RNG.permutation(np.repeat([[0, 10], [0, 30], [2, 10]], 6, axis=0)).T
        x = np.broadcast_to((100 * labels + size)[:, None, None], (18, 8, 8)).astype(np.uint8)
        np.savez(
            tmp_path / f"samples/{model}.npz",
            x=x,
            labels=labels,
            condition_size=size.astype("float32"),
            class_names=["cat", "dog", "owl"],
        )
    text, parsed = page(tmp_path)
    for names, picture in grids(parsed):
        assert names == ["label cat, size 10", "label cat, size 30", "label owl, size 10"]
        for row, gray in enumerate((10, 30, 210)):
            strip = picture[42 * row : 42 * row + 40]
            assert (strip[..., 0][strip[..., 3] > 0] == gray).all()
        assert picture.shape[1] == 6 * 42 - 2  # all six of each
    assert "Row 1: label cat, size 10. Row 2: label cat, size 30. Row 3: label owl" in parsed.text
    assert re.findall(r"<li[^>]*>(.*?)</li>", text) == ["1", "2", "3"] * 3


def test_values_that_occur_once_have_a_row_each_and_tensors_say_their_shape(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    age, text = RNG.permutation(40).astype("float32"), RNG.standard_normal((40, 5, 4))
    for model in ("reference", "student"):
        x = np.broadcast_to(age[:, None, None], (40, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / f"samples/{model}.npz", x=x, condition_age=age, condition_text=text)
    for names, picture in grids(page(tmp_path)[1]):
        assert [name.split(", ")[1] for name in names] == ["text 5x4"] * 10
        shown = [float(name.split(", ")[0].removeprefix("age ")) for name in names]
        assert shown == sorted(shown)
        assert (shown[0], shown[-1]) == (0, 39)
        np.testing.assert_array_equal(picture[20::42, 20, 0], shown)


@pytest.mark.parametrize("shape", [(2,), (6, 2)])
def test_points_and_curves_say_it_in_a_sentence(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for model in ("reference", "student"):
        np.savez(
            tmp_path / f"samples/{model}.npz",
            x=RNG.standard_normal((30, *shape)),
            condition_age=np.linspace(-1, 0.25, 30),
            condition_text=np.zeros((30, 77, 8)),
        )
    said = "conditioned on age from -1 to 0.25; text of shape 77x8."
    assert said in re.sub(r"\s+", " ", page(tmp_path)[1].text)


def test_a_model_without_the_condition_keeps_the_rows_of_labels(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    common = {"x": RNG.integers(0, 256, (8, 8, 8), dtype=np.uint8), "labels": np.repeat([0, 1], 4)}
    np.savez(tmp_path / "samples/reference.npz", **common, condition_age=np.arange(8.0))
    np.savez(tmp_path / "samples/student.npz", **common)
    parsed = page(tmp_path)[1]
    alts = [str(a["alt"]) for tag, a in parsed.tags if tag == "img"]
    assert all("one row for each label: 0, 1" in alt for alt in alts)
    assert "conditioned" not in parsed.text


def test_a_condition_with_other_rows_is_refused(tmp_path: Path) -> None:
    for values in (np.zeros(7), np.float64(1), np.array(["a"] * 8)):
        np.savez(tmp_path / "s.npz", x=np.zeros((8, 4, 4), np.uint8), condition_age=values)
        with pytest.raises(UserError, match="condition_age does not match x"):
            read_samples(tmp_path / "s.npz")


class Told(nn.Module):
    """The prediction of x0 is the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, *, place: Tensor) -> Tensor:
        return self.scale * place


def test_an_evaluation_keeps_what_its_samples_were_conditioned_on(tmp_path: Path) -> None:
    place = RNG.uniform(-1, 1, (60, 2)).astype("float32")
    np.savez(tmp_path / "data.npz", x=place, condition_place=place)
    data = dm.load_data(tmp_path / "data.npz")
    spec = {"place": FieldSpec((2,))}
    denoiser = dm.as_denoiser(Told(), "edm", "x0", shape=(2,), conditioning=spec)
    model = Model("m", dm.Student(denoiser, (2.5,)), None, data.scaling, "")
    folder = RunFolder(tmp_path / "run")
    folder.samples.mkdir(parents=True)
    evaluate_models(data, {"student": model}, folder, n=30)
    reference, student = (np.load(folder.samples / f"{name}.npz") for name in ("reference", "student"))
    np.testing.assert_array_equal(reference["condition_place"], student["condition_place"])
    np.testing.assert_allclose(reference["x"], reference["condition_place"], rtol=0, atol=1e-6)
    scaled = torch.from_numpy(student["condition_place"])
    np.testing.assert_allclose(student["x"], data.scaling.export(scaled), rtol=0, atol=1e-6)
