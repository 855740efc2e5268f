"""Graphs of students with conditions: each field is an input, and onnxruntime returns what torch computes.

The networks are random. Graph and student differ by float32's rounding, of which 1e-4 is a hundred times.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import FieldSpec
from distmatch.interop import export_onnx
from distmatch.interop import onnx_export as module
from distmatch.methods.student import Student

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES = FieldSpec((), torch.int64, 3)
SPEC = {"text": FieldSpec((-1, 4)), "mask": FieldSpec((-1,), torch.int64), "age": FieldSpec()}


class TextNet(nn.Module):
    """Reads a text of any length with a mask over it, a number and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.rest, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.classes = nn.Embedding(4, 8)

    def forward(
        self, x: Tensor, t: Tensor, *, text: Tensor, mask: Tensor, age: Tensor, label: Tensor | None = None
    ) -> Tensor:
        words = (self.text(text) * mask[..., None]).sum(1) / (1 + mask.sum(1, keepdim=True))
        hidden = self.rest(torch.cat([x, torch.stack([t.log(), age], 1)], 1)) + words
        hidden = hidden if label is None else hidden + self.classes(label)
        return self.last(nn.functional.silu(hidden))


def student_of(spec: dict[str, FieldSpec], net: nn.Module | None = None, **options: int) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TextNet() if net is None else net
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    teacher = dm.as_denoiser(net, "edm", "x0", shape=(2,), conditioning=spec, sigma_data=1.0, **options)
    return Student(teacher, (2.5, 0.7), {"method": "sid"}, "ddim")


def conditions(n: int, length: int, seed: int, lowest: int | None = None) -> dm.Conditioning:
    gen = torch.Generator().manual_seed(seed)
    text, mask = torch.randn(n, length, 4, generator=gen), torch.randint(2, (n, length), generator=gen)
    fields = {"text": text, "mask": mask, "age": torch.rand(n, generator=gen)}
    if lowest is not None:
        fields["label"] = torch.randint(lowest, 3, (n,), generator=gen)
    return dm.Conditioning(fields)


def found_and_expected(
    student: Student, folder: Path, n: int, told: dm.Conditioning
) -> tuple[np.ndarray, Tensor]:
    noise = [torch.randn(n, 2, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    fed = {"noise": noise[0], "noise_1": noise[1], **told}
    if "label" in fed:
        fed["labels"] = fed.pop("label")
    ready = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = ready.run(["samples"], {name: value.numpy() for name, value in fed.items()})
    with torch.no_grad():
        return found, student(noise, told)


@pytest.mark.parametrize("lowest", [None, -1])
def test_every_field_is_an_input(lowest: int | None, tmp_path: Path) -> None:
    spec = SPEC if lowest is None else {**SPEC, "label": CLASSES}
    student = student_of(spec, **({} if lowest is None else {"null_class": 1}))
    assert export_onnx(student, tmp_path / "m") < 1e-4
    results = []
    for n, length, seed in ((5, 3, 0), (5, 3, 1), (1, 9, 2), (2, 1, 3)):
        found, expected = found_and_expected(student, tmp_path / "m", n, conditions(n, length, seed, lowest))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        results.append(found)
    assert np.abs(results[0] - results[1]).max() > 0.1  # the same noise under another condition
    inputs = json.loads((tmp_path / "m/config.json").read_text())["inputs"]
    labels = {} if lowest is None else {"labels": ["batch"]}
    assert inputs == {
        **{name: ["batch", 2] for name in ("noise", "noise_1")},
        **{"text": ["batch", "any", 4], "mask": ["batch", "any"], "age": ["batch"]},
        **labels,
    }


@pytest.mark.slow
def test_each_field_arrives(tmp_path: Path) -> None:
    """A change of one field alone changes the samples as it does in torch."""
    student = student_of({**SPEC, "label": CLASSES}, null_class=3)
    export_onnx(student, tmp_path / "m")
    told, other = conditions(4, 3, 0, 0), conditions(4, 3, 1, 0)
    before = found_and_expected(student, tmp_path / "m", 4, told)[0]
    for field in told:
        changed = dm.Conditioning({**told, field: other[field]})
        found, expected = found_and_expected(student, tmp_path / "m", 4, changed)
        assert np.abs(found - before).max() > 1e-3, field
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=field)


@pytest.mark.slow
def test_the_card_feeds_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(student_of({**SPEC, "label": CLASSES}, null_class=3), tmp_path / "m")
    code = (tmp_path / "m/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    space: dict[str, np.ndarray] = {}
    exec(code.replace("this/folder", "m"), space)
    assert space["samples"].shape == (16, 2)


def test_labels_below_zero_are_the_null_class_of_a_network_that_is_called_with_labels(tmp_path: Path) -> None:
    class Plain(TextNet):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self.last(torch.relu(self.classes(labels) + self.rest(torch.cat([x, x * t[:, None]], 1))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = dm.as_denoiser(Plain(), "edm", "x0", shape=(2,), num_classes=3, null_class=1)
    student = Student(teacher, (2.5, 0.7))
    export_onnx(student, tmp_path / "m")
    found, expected = found_and_expected(
        student, tmp_path / "m", 3, dm.Conditioning({"label": torch.tensor([-1, 2, 0])})
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


class Aged(TextNet):
    def forward(self, x: Tensor, t: Tensor, age: Tensor) -> Tensor:
        return age[:, None] * x


class OwnDenoiser(nn.Module):
    """A denoiser of the user's with a part called ``net``, which it calls in its own way."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, 0.5, 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.conditioning_spec = {"age": FieldSpec()}
        self.net = nn.Linear(2, 2)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: dm.Conditioning) -> Tensor:
        return self.net(x / sigma[:, None]) * conditioning["age"][:, None]


@pytest.mark.slow
def test_a_denoiser_that_passes_conditions_on_in_its_own_way(tmp_path: Path) -> None:
    student = Student(OwnDenoiser(), (2.5, 0.7))
    export_onnx(student, tmp_path / "m")
    told = dm.Conditioning({"age": torch.tensor([0.3, 0.0, -2.0])})
    found, expected = found_and_expected(student, tmp_path / "m", 3, told)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (found[1] == 0).all()


@pytest.mark.parametrize("name", ["noise_1", "samples"])
def test_a_field_with_the_name_of_another_input_or_output_is_refused(name: str, tmp_path: Path) -> None:
    class Named(TextNet):
        def forward(self, x: Tensor, t: Tensor, **fields: Tensor) -> Tensor:
            return x * fields[name][:, None]

    with pytest.raises(UserError, match=f"different names.*{name}"):
        export_onnx(student_of({name: FieldSpec()}, Named()), tmp_path / "m")
    assert not list(tmp_path.iterdir())


class OfValues(TextNet):
    def forward(self, x: Tensor, t: Tensor, age: Tensor) -> Tensor:
        return x if bool((age > 0).all()) else 2 * x


class OfTheBatch(TextNet):
    def forward(self, x: Tensor, t: Tensor, age: Tensor) -> Tensor:
        return age[:, None] * x.reshape(len(x), 2)


@pytest.mark.parametrize("net", [OfValues, OfTheBatch])
def test_a_graph_that_cannot_be_made_leaves_nothing(net: type[TextNet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written as a graph"):
        export_onnx(student_of({"age": FieldSpec()}, net()), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_one_batch_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_axes", lambda shape, batch: {})
    with pytest.raises(UserError, match="that takes any batch"):
        export_onnx(student_of({"age": FieldSpec()}, Aged()), tmp_path / "m")
    assert not list(tmp_path.iterdir())
