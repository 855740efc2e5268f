"""`distmatch sample --conditions`: every row of the file reaches its sample, and comes back in the output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.data import Scaling
from distmatch.diffusion.conditioning import FieldSpec
from distmatch.interop import save_denoiser
from distmatch.methods.student import Student
from tests.helpers.command import command, contents, done

SPEC = {"age": FieldSpec(), "text": FieldSpec((-1, 2)), "label": FieldSpec((), torch.int64, 3)}


class Told(nn.Module):
    """The prediction of x0 is the condition: (age, class + the first number of the text)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, *, age: Tensor, text: Tensor, label: Tensor) -> Tensor:
        return self.scale * torch.stack([age, label + text[:, 0, 0]], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("conditions")
    denoiser = dm.as_denoiser(Told(), "edm", "x0", shape=(2,), conditioning=SPEC)
    about = {"data": {"scaling": Scaling.identity(2).to_dict()}}
    save_denoiser(made / "teacher", denoiser, {"kind": "teacher", **about})
    Student(denoiser, (2.5, 0.7), about).save_pretrained(made / "student")
    return made


def rows(n: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "condition_age": rng.random(n),
        "condition_text": rng.standard_normal((n, 4, 2)).astype("float32"),
        "labels": np.arange(n) % 3,
    }


NETWORK = f"--network {__name__}:Told"


@pytest.mark.parametrize(
    ("kind", "batch"), [("student", 64), ("student", 2), ("teacher", 64), ("teacher", 2)]
)
def test_the_rows_arrive(
    kind: str, batch: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = rows()
    np.savez("told.npz", **told, x=np.zeros((5, 2)))  # samples among them are not read
    answer = done(f"sample {folder / kind} {NETWORK} --conditions told.npz --batch {batch} --out x.npz")
    assert "5 samples in x.npz" in answer.out
    assert "label, age, text from told.npz" in answer.out
    found = np.load("x.npz")
    expected = np.stack([told["condition_age"], told["labels"] + told["condition_text"][:, 0, 0]], 1)
    np.testing.assert_allclose(found["x"], expected, rtol=0, atol=1e-4)
    for name, value in told.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))
    again = done(f"sample {folder / kind} {NETWORK} --conditions x.npz --n 5 --out again.npz --json").json()
    assert (again["n"], again["conditions"]) == (5, "x.npz")
    np.testing.assert_array_equal(np.load("again.npz")["x"], found["x"])


BAD = {
    "rows": ({}, "--n 4", "5 rows and --n 4"),
    "fewer": ({"condition_age": np.zeros(4)}, "", "condition_age must have one row"),
    "field": ({"condition_age": None}, "", "Got: label, text. Expected: age, text, label"),
    "other": ({"condition_size": np.zeros(5)}, "", "takes another conditioning"),
    "shape": ({"condition_text": np.zeros((5, 4, 3))}, "", "'text' does not match"),
    "whole": ({"condition_age": np.zeros(5, int)}, "", "'age' does not match"),
    "words": ({"condition_age": np.array(["a"] * 5)}, "", "must contain numbers"),
    "nan": ({"condition_age": np.full(5, np.nan)}, "", "NaN"),
    "class": ({"labels": np.full(5, 3)}, "", "class labels are out of range"),
    "fractions": ({"labels": np.zeros(5)}, "", "must be the numbers of classes"),
    "none": (dict.fromkeys(rows()), "", "contains no conditions"),
    "empty": ({name: value[:0] for name, value in rows().items()}, "", "contains no conditions"),
    "classes": ({}, "--classes 1", "--conditions already determines"),
    "balance": ({}, "--class-balance uniform", "--conditions already determines"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_what_does_not_fit_is_refused_and_nothing_written(
    case: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, options, words = BAD[case]
    told = {name: value for name, value in {**rows(), **changes}.items() if value is not None}
    np.savez("told.npz", **told)
    before = contents(tmp_path)
    answer = command(f"sample {folder / kind} {NETWORK} --conditions told.npz --out x.npz {options}")
    assert answer.code == 2
    assert words in answer.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", ["", "--conditions missing.npz", "--conditions text.npz"])
def test_without_a_usable_file(
    options: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.npz").write_text("age,1")
    answer = command(f"sample {folder / 'student'} {NETWORK} {options} --out x.npz")
    assert answer.code == 2
    words = {"": "--conditions FILE.npz", "--conditions missing.npz": "does not exist"}
    assert words.get(options, "as an .npz archive") in answer.err
    assert not Path("x.npz").exists()


def test_an_unconditional_model_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("told.npz", **rows())
    answer = command("sample ring8 --conditions told.npz --out x.npz")
    assert answer.code == 2
    assert "this model is unconditional" in answer.err
    assert not Path("x.npz").exists()


def test_labels_alone_are_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples as of --classes in the same order."""
    from tests.helpers.small import network_teacher

    monkeypatch.chdir(tmp_path)
    about = {"data": {"scaling": Scaling.identity(2).to_dict()}}
    Student(network_teacher(3), (2.5,), about).save_pretrained("s")
    np.savez("told.npz", labels=np.array([2, 0, 2, 0]))
    done("sample s --conditions told.npz --out a.npz")
    done("sample s --n 4 --classes 2 0 --out b.npz")
    for name in ("x", "labels"):
        np.testing.assert_array_equal(np.load("a.npz")[name], np.load("b.npz")[name])
