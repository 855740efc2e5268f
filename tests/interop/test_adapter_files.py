"""Adapters on disk: what is written, how their base is found, and that another one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.files import load_tensors, save_tensors
from distmatch.interop import export_onnx, save_denoiser
from distmatch.interop.diffusers_export import export_diffusers
from distmatch.interop.lora import adapters_of, network_in
from distmatch.nets.shared import fingerprint, own_state
from tests.helpers.command import command, done
from tests.helpers.image_teachers import image_teacher
from tests.helpers.own_networks import Conv
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import network_teacher

QUICK: dict[str, Any] = {"steps": 2, "batch": 4, "train": "lora", "lora_rank": 2, "lr_rampup": 0}
QUICK |= {"quiet": True}


def distilled(teacher: Any, method: str = "diff-instruct", **options: Any) -> dm.Student:
    """A student whose adapters differ from what they start as."""
    torch.manual_seed(3)
    size = {"fake_score_steps": 1} if method != "ctm" else {"gan_weight": 0.0}
    data = 0.5 * torch.randn(20, *(teacher.shape if hasattr(teacher, "shape") else (2,)))
    set_ = None
    if method == "ctm":
        set_ = dm.Dataset(data, torch.arange(20) % 2, ("a", "b"), "x", dm.data.scaling.Scaling.identity(2))
    student = dm.distill(teacher, set_, method=method, **{**QUICK, **size, **options})
    with torch.no_grad():
        for layer in adapters_of(student.denoiser).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    return student


def saved_teacher(folder: Path, teacher: Any) -> Any:
    """A teacher that was loaded from a folder."""
    save_denoiser(folder, teacher, {"kind": "teacher"})
    return folder


@pytest.mark.parametrize("name", ["mlp", "unet", "dit", "edm", "edm2", "own", "diffusers"])
def test_a_saved_student_is_the_same_one(name: str, tmp_path: Path) -> None:
    made = network_teacher(2) if name == "mlp" else image_teacher(name)
    handed = {"network": Conv} if name == "own" else {}
    teacher = dm.load_teacher(saved_teacher(tmp_path / "teacher", made), **handed)
    student = distilled(teacher)
    student.save_pretrained(tmp_path / "student")
    files = {file.name for file in (tmp_path / "student").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "config.json", "README.md"}
    kept = load_tensors(tmp_path / "student/adapter_model.safetensors")
    expected = own_state(student.denoiser)
    assert sum(t.numel() for t in kept.values()) == sum(t.numel() for t in expected.values())
    again = dm.Student.from_pretrained(tmp_path / "student", **handed)
    assert all(torch.equal(value, expected[key]) for key, value in own_state(again.denoiser).items())
    x = student.sample(5, seed=1)
    assert_same_but_for_rounding(again.sample(5, seed=1), x)
    plain = student.around(teacher, student.sigmas).sample(5, seed=1)
    assert not torch.allclose(x, plain, rtol=1e-2)
    assert not any(p.requires_grad for p in again.denoiser.parameters())


def test_a_student_that_jumps_keeps_the_layers_that_its_base_lacks(tmp_path: Path) -> None:
    base = saved_teacher(tmp_path / "teacher", network_teacher(2))
    student = distilled(dm.load_teacher(base), "ctm", num_steps=2)
    layer: Any = network_in(student.denoiser).trunk.conditioning.to_level  # type: ignore[union-attr]
    assert float(layer.weight.abs().max()) > 0
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    assert_same_but_for_rounding(again.sample(5, seed=1), student.sample(5, seed=1))
    whole = again.merged()
    whole.save_pretrained(tmp_path / "whole")
    loaded = dm.Student.from_pretrained(tmp_path / "whole")
    assert_same_but_for_rounding(loaded.sample(5), whole.sample(5))
    assert_same_but_for_rounding(whole.sample(5), student.sample(5))


@pytest.mark.parametrize("name", ["unet", "dit", "diffusers"])
def test_peft_itself_reads_the_file(name: str, tmp_path: Path) -> None:
    teacher = image_teacher(name)
    student = distilled(teacher)
    student.save_pretrained(tmp_path / "student")
    net = network_in(image_teacher(name))
    whole = peft.PeftModel.from_pretrained(net, str(tmp_path / "student")).merge_and_unload()
    expected = network_in(student.merged().denoiser).state_dict()
    found = whole.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_run_folders_that_move_together_keep_together(tmp_path: Path) -> None:
    save_denoiser(tmp_path / "a/teacher", network_teacher(), {"kind": "teacher"})
    student = distilled(str(tmp_path / "a/teacher"), out=str(tmp_path / "a/student"))
    student.save_pretrained(tmp_path / "a/student/model")
    expected = student.sample(4)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert_same_but_for_rounding(dm.Student.from_pretrained(tmp_path / "b/student").sample(4), expected)
    # Away from its base it says what it needs, and takes it where it is told.
    shutil.move(tmp_path / "b/student", tmp_path / "student")
    with pytest.raises(UserError, match=r"without their base network.*--base FOLDER"):
        dm.Student.from_pretrained(tmp_path / "student")
    for base in (tmp_path / "b/teacher", dm.load_teacher(tmp_path / "b/teacher"), network_teacher()):
        found = dm.Student.from_pretrained(tmp_path / "student", base=base)
        assert_same_but_for_rounding(found.sample(4), expected)

    answer = command(f"sample {tmp_path}/student --n 4 --out {tmp_path}/no.npz")
    assert answer.code == 2
    assert "--base FOLDER" in answer.err
    given = f"--base {tmp_path}/b/teacher"
    done(f"sample {tmp_path}/student --n 4 --out {tmp_path}/x.npz {given}")
    done(f"export {tmp_path}/student --out {tmp_path}/whole {given}")
    whole = dm.Student.from_pretrained(tmp_path / "whole")
    assert_same_but_for_rounding(whole.sample(4), expected)
    assert command(f"sample {tmp_path}/whole --out {tmp_path}/y.npz {given}").code == 2


def test_another_base_is_refused(tmp_path: Path) -> None:
    student = distilled(network_teacher())
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="loaded from no folder"):
        dm.Student.from_pretrained(tmp_path / "student")
    other = network_teacher()
    with torch.no_grad():
        other.net.last.bias[0] += 1  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match="adapters for another network"):
        dm.Student.from_pretrained(tmp_path / "student", base=other)
    other = network_teacher()
    other.sigma_data = 0.5
    with pytest.raises(UserError, match=r"sigma_data 0\.5.*sigma_data 0\.7"):
        dm.Student.from_pretrained(tmp_path / "student", base=other)
    for base in (lambda x, sigma: x, 3):
        with pytest.raises(UserError, match="is a folder, or a teacher that is a module"):
            dm.Student.from_pretrained(tmp_path / "student", base=base)  # type: ignore[arg-type]
    student.merged().save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="contains a full network, not adapters"):
        dm.Student.from_pretrained(tmp_path / "whole", base=network_teacher())


def test_a_teacher_that_was_trained_again_is_another_base(tmp_path: Path) -> None:
    base = saved_teacher(tmp_path / "teacher", network_teacher())
    distilled(dm.load_teacher(base)).save_pretrained(tmp_path / "student")
    other = network_teacher()
    with torch.no_grad():
        other.net.last.bias[0] += 1  # type: ignore[index, union-attr]
    saved_teacher(tmp_path / "teacher", other)
    with pytest.raises(UserError, match="adapters for another network"):
        dm.Student.from_pretrained(tmp_path / "student")


def test_a_teacher_trained_into_a_folder_is_found_there(tmp_path: Path) -> None:
    short: dict[str, Any] = {"net": "mlp", "width": 40, "depth": 1, "batch": 16, "quiet": True}
    teacher = dm.train("ring8", steps=2, out=tmp_path / "teacher", **short)
    student = distilled(teacher)
    student.save_pretrained(tmp_path / "student")
    assert_same_but_for_rounding(
        dm.Student.from_pretrained(tmp_path / "student").sample(4), student.sample(4)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("base"),
        lambda config: config["adapters"].update(r=10**9),
        lambda config: config["adapters"].update(targets=["no.such.layer"]),
        lambda config: config["adapters"].update(targets=config["adapters"]["targets"][:2]),
        lambda config: config["adapters"].update(lora_alpha="x"),
        lambda config: config["base"].update(dtype="object"),
        lambda config: config["base"].update(use=None),
        lambda config: config.update(version=7),
        lambda config: config.update(jumps=True),
    ],
)
def test_a_damaged_folder_is_refused(change: Any, tmp_path: Path) -> None:
    teacher = network_teacher()
    distilled(teacher).save_pretrained(tmp_path / "student")
    file = tmp_path / "student/config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(UserError):
        dm.Student.from_pretrained(tmp_path / "student", base=teacher)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x) + t[:, None]))


def test_weights_of_two_names_are_the_base_s_under_both(tmp_path: Path) -> None:
    teacher = dm.as_denoiser(Tied(), "vp", "eps", shape=(2,))
    student = distilled(teacher)
    student.save_pretrained(tmp_path / "student")
    kept = load_tensors(tmp_path / "student/adapter_model.safetensors")
    assert all("lora_" in name for name in kept)
    again = dm.Student.from_pretrained(tmp_path / "student", base=teacher)
    assert_same_but_for_rounding(again.sample(4), student.sample(4))
    assert_same_but_for_rounding(again.merged().sample(4), student.sample(4))


def test_no_file_changes_the_base(tmp_path: Path) -> None:
    teacher = network_teacher()
    student = distilled(teacher)
    student.save_pretrained(tmp_path / "student")
    file = tmp_path / "student/adapter_model.safetensors"
    weight = torch.zeros_like(teacher.net.last.weight)  # type: ignore[arg-type, union-attr]
    more = {"net.last.base_layer.weight": weight, "base_model.model.last.base_layer.weight": weight}
    save_tensors(file, {**load_tensors(file), **more})
    before = fingerprint(teacher)
    with pytest.raises(UserError, match="another architecture"):
        dm.Student.from_pretrained(tmp_path / "student", base=teacher)
    assert fingerprint(teacher) == before


def test_a_base_in_bfloat16_is_found_again(tmp_path: Path) -> None:
    base = saved_teacher(tmp_path / "teacher", image_teacher("dit"))
    student = distilled(dm.load_teacher(base), base_dtype="bfloat16")
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(again.sample(4), student.sample(4), rtol=0, atol=0.02)  # bfloat16's rounding
    merged = again.merged().denoiser
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_exports_are_of_the_merged_network(tmp_path: Path) -> None:
    student = distilled(network_teacher(2))
    assert export_onnx(student, tmp_path / "onnx") < 1e-4
    teacher = image_teacher("diffusers")
    found = distilled(teacher)
    assert export_diffusers(found, tmp_path / "pipeline") < 1e-4
    assert isinstance(network_in(found.denoiser), nn.Module)


def test_equal_models_are_equal_files(tmp_path):
    """The package safetensors orders metadata in another way each time; here they are sorted."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {"format": "pt", "distmatch": '{"é": "\\"\\n"}', "encoder": "x"}
    for i in range(8):
        save_tensors(tmp_path / f"{i}.safetensors", tensors, metadata)
    written = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(file.get_tensor(name).equal(value) for name, value in tensors.items())
