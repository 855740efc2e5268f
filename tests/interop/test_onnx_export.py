"""Students as ONNX graphs: the same samples in onnxruntime as in torch, at any batch size.

The networks are random. Graph and student differ by float32's rounding, of which 1e-4 is a hundred times.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import Scaling, from_arrays
from distmatch.interop import onnx_export as module
from distmatch.interop.onnx_export import export_onnx
from distmatch.methods.student import Student
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.jump import as_jump
from tests.helpers.command import command, contents, done
from tests.helpers.small import network_teacher

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BATCHES = (1, 3, 17)


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def worst(student: Student, folder: Path, lowest: int = 0) -> float:
    """The largest difference between graph and student, labels from ``lowest`` on among the inputs."""
    ready, far = session(folder), 0.0
    for n in BATCHES:
        gen = torch.Generator().manual_seed(n)
        noise = [torch.randn(n, *student.shape, generator=gen) for _ in range(student.draws)]
        fed = {"noise" if i == 0 else f"noise_{i}": z.numpy() for i, z in enumerate(noise)}
        labels = None
        if student.num_classes:
            labels = torch.randint(lowest, student.num_classes, (n,), generator=gen)
            fed["labels"] = labels.numpy()
        with torch.no_grad():
            expected = student(noise, labels)
        (found,) = ready.run(["samples"], fed)
        assert found.shape == (n, *student.shape)
        far = max(far, float(np.abs(found - expected.numpy()).max()))
    return far


@pytest.mark.slow
def test_jumps_from_level_to_level(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = as_jump(network_teacher(3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    student = Student(network, (2.5, 0.7, 0.2), {"method": "ctm"}, "gamma", 0.5)
    assert export_onnx(student, tmp_path / "m") < 1e-4
    assert worst(student, tmp_path / "m") < 1e-4


@pytest.mark.slow
def test_several_calls_with_classes(tmp_path: Path) -> None:
    info = {"method": "dmd2", "data": {"class_names": ["a", "b", "c"]}}
    student = Student(as_jump(network_teacher(3)), (2.5, 0.7), info, "ddim")
    difference = export_onnx(student, tmp_path / "out")
    assert difference < 1e-5
    assert worst(student, tmp_path / "out", lowest=-1) < 1e-5
    ready = session(tmp_path / "out")
    inputs = {i.name: (i.type, i.shape[1:]) for i in ready.get_inputs()}
    assert inputs == {
        **{name: ("tensor(float)", [2]) for name in ("noise", "noise_1")},
        "labels": ("tensor(int64)", []),
    }
    assert {type(i.shape[0]) for i in (*ready.get_inputs(), *ready.get_outputs())} == {str}  # any batch
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["inputs"]["noise_1"] == ["batch", 2]
    assert config["extra"]["data"]["class_names"] == ["a", "b", "c"]


def test_images(tmp_path: Path) -> None:
    config = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(config, (1, 9, 9), 0)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    student = Student(EDMDenoiser(net, shape=(1, 9, 9), num_classes=0), (2.5,))
    export_onnx(student, tmp_path / "out")
    assert worst(student, tmp_path / "out") < 1e-4
    assert [i.name for i in session(tmp_path / "out").get_inputs()] == ["noise"]


def units(student: Student, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The graph's output in units of the data, and what the student exports of the same noise."""
    gen = torch.Generator().manual_seed(5)
    noise = torch.randn(7, *student.shape, generator=gen)
    labels = torch.arange(7) % student.num_classes if student.num_classes else None
    fed = {"noise": noise.numpy(), **({"labels": labels.numpy()} if labels is not None else {})}
    (found,) = session(folder).run(["data"], fed)
    with torch.no_grad():
        return found, student.export(student([noise], labels))


@pytest.mark.parametrize("far", [pytest.param(0.0, marks=pytest.mark.slow), 1.7e9])
def test_vectors_come_out_in_the_units_of_their_columns(far: float, tmp_path: Path) -> None:
    """Euros, and seconds since 1970, which float32 does not hold."""
    raw = np.linspace([9.0, far], [250_000.0, far + 86_401.0], 99)
    scaling = from_arrays(raw if far else raw.astype("float32")).scaling
    student = Student(network_teacher(3), (2.5,), {"data": {"scaling": scaling.to_dict()}})
    export_onnx(student, tmp_path / "out")
    found, expected = units(student, tmp_path / "out")
    assert found.dtype == expected.dtype == (np.float64 if far else np.float32)
    half = np.array([124_995.5, 43_200.5])
    assert np.abs((found - expected) / half).max() < 1e-4
    assert np.abs(found - raw.mean(0)).max() > 1e3  # not in units of the model
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["outputs"] == {"samples": ["batch", 2], "data": ["batch", 2]}
    assert 'session.run(["data"], inputs)' in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_out_as_bytes(channels: int, tmp_path: Path) -> None:
    shape = (channels, 9, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(UNetConfig(width=8, multipliers=(1,), blocks=1, attention=()), shape, 4)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    info = {"data": {"scaling": Scaling.for_images(0, 1, "floats").to_dict()}}
    student = Student(EDMDenoiser(net, shape=shape, num_classes=4), (2.5,), info)
    export_onnx(student, tmp_path / "out")
    found, expected = units(student, tmp_path / "out")
    assert found.dtype == np.uint8
    assert found.shape == expected.shape == ((7, 9, 6) if channels == 1 else (7, 9, 6, 3))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len(np.unique(found)) > 50


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 2), marks=pytest.mark.slow),
        (2, 9, 7),
        pytest.param((1, 3, 5, 4), marks=pytest.mark.slow),
        pytest.param((3, 3, 5, 4), marks=pytest.mark.slow),
    ],
)
def test_a_transformer_of_any_shape_is_exported_for_every_batch(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(DiTConfig(patch=2, width=12, depth=1, heads=1), shape, 4)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    scaling = Scaling.identity(2) if len(shape) == 2 else Scaling.for_images(0, 1, "floats")
    info = {"data": {"scaling": scaling.to_dict()}}
    student = Student(EDMDenoiser(net, shape=shape, num_classes=4), (2.5,), info)
    export_onnx(student, tmp_path / "out")
    assert worst(student, tmp_path / "out") < 1e-4
    found, expected = units(student, tmp_path / "out")
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.abs(found.astype(float) - expected).max() <= (1e-4 if len(shape) == 2 else 1)
    assert (
        found.shape
        == {
            (5, 2): (7, 5, 2),
            (2, 9, 7): (7, 9, 7, 2),
            (1, 3, 5, 4): (7, 3, 5, 4, 1),
            (3, 3, 5, 4): (7, 3, 5, 4, 3),
        }[shape]
    )


@pytest.mark.slow
def test_latents_have_no_units_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decoder_of", lambda model: object())
    export_onnx(Student(network_teacher(), (2.5,)), tmp_path / "out")
    assert [output.name for output in session(tmp_path / "out").get_outputs()] == ["samples"]
    assert json.loads((tmp_path / "out/config.json").read_text())["space"] == "latents"


@pytest.mark.slow
def test_a_graph_with_other_units_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write_graph

    def other(graph: module._Outputs, names: list[str], path: Path) -> None:
        right, graph.scaling = graph.scaling, Scaling("vector", (0.0, 0.0), (3.0, 3.001), "wrong")
        write(graph, names, path)
        graph.scaling = right

    monkeypatch.setattr(module, "_write_graph", other)
    scaling = Scaling("vector", (0.0, 0.0), (3.0, 3.0), "right")
    student = Student(network_teacher(), (2.5,), {"data": {"scaling": scaling.to_dict()}})
    with pytest.raises(UserError, match="does not reproduce the student's samples"):
        export_onnx(student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_networks_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from distmatch.interop import teacher_from
    from tests.helpers import diffusers_models as models

    one = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = models.unet(num_class_embeds=4, **one)
    student = Student(teacher_from(model, diffusers.DDPMScheduler(), null_class=3), (2.5,))
    export_onnx(student, tmp_path / "out")
    assert worst(student, tmp_path / "out", lowest=-1) < 1e-4


def test_the_command_and_weights_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_ONE_FILE", 0)
    student = Student(network_teacher(), (2.5,))
    student.save_pretrained("student")
    told = done("export student --to onnx --out graph")
    assert "difference from the student" in told.out
    assert told.err == ""
    assert {"model.onnx", "model.onnx.data"} < {file.name for file in Path("graph").iterdir()}
    Path("graph").rename("moved")
    assert worst(student, Path("moved")) < 1e-5
    again = command("export moved --to onnx --out again")
    assert again.code == 2
    assert "distmatch-onnx" in again.err

    # A graph of other numbers, in the place of a good one, does not stay.
    def others(graph: object, names: list[str], path: Path) -> None:
        for file in ("model.onnx", "model.onnx.data"):
            shutil.copy(tmp_path / "moved" / file, path.parent)

    monkeypatch.setattr(module, "_write_graph", others)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="does not reproduce the student's samples"):
        export_onnx(Student(student.denoiser, (2.4,)), "moved")
    assert contents(tmp_path) == before


def test_what_looks_at_values_cannot_be_a_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Picky(Student):
        def begin(self, noise: list[torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
            return noise[0] if bool(noise[0].sum() > 0) else 2 * noise[0]

    with pytest.raises(UserError, match="cannot be written as a graph"):
        export_onnx(Picky(network_teacher(), (2.5,)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install distmatch\[onnx\]"):
        export_onnx(Student(network_teacher(), (2.5,)), tmp_path / "out")
