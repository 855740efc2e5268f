"""What exported students carry with them, the command that writes them, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop import export_lora, export_pipeline
from tests.helpers.command import command, done
from tests.helpers.exported import PROMPT, gaps, pipelines, student_of
from tests.helpers.pipelines import SIZE, save

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipelines(tmp_path_factory.mktemp("pipelines"))


def test_the_contract_travels_with_the_files(folders, tmp_path):
    folder, teacher = folders("stable-diffusion-3")
    student = student_of(teacher, 2, lora=True)
    export_lora(student, tmp_path / "lora", metrics=None)
    export_pipeline(student, tmp_path / "pipeline")
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        inside = json.loads(file.metadata()["distmatch"])
    for place in ("lora", "pipeline"):
        found = json.loads((tmp_path / place / "distmatch.json").read_text())
        assert inside.items() <= found.items()
        assert found["times"] == pytest.approx([1, 0.75], abs=2e-6)
        assert found["sigmas"] == list(student.sigmas)
        assert (found["shift"], found["guidance"], found["null"]) == (3.0, 4.5, "")
        assert (found["sampler"], found["prediction"], found["num_steps"]) == ("ddim", "flow", 2)
        assert found["call"]["guidance_scale"] == 1
        assert found["encoder"] == teacher.pipeline.fingerprint
        assert found["base"]["name"] == folder.name
        card = (tmp_path / place / "README.md").read_text()
        for words in ("num_inference_steps=2", "guidance_scale=1.0", found["base"]["sha256"], "0.75", "4.5"):
            assert words in card
        assert "text-to-image" in card
        assert f'base_model: "{folder.name}"  # the name of a local folder' in card
        assert str(folder.parent) not in card + json.dumps(found)


@pytest.mark.slow
def test_the_command_line_writes_both_forms(folders, tmp_path):
    _, teacher = folders("stable-diffusion-3")
    student = tmp_path / "student"
    adapted = student_of(teacher, 1, lora=True)
    adapted.save_pretrained(student)
    base = sum(p.numel() for p in teacher.parameters())
    adapters = sum(p.numel() for n, p in adapted.denoiser.named_parameters() if "lora_" in n)
    for form in ("lora", "pipeline"):
        found = done(f"export {student} --to {form} --out {tmp_path / form} --json").json()
        assert found["difference"] < 1e-4
        assert (found["parameters"], found["adapters"]) == (base, adapters)
        counted = f"{base:,} and {adapters:,} in adapters" if form == "lora" else f"{base:,}"  # merged
        assert f"| parameters | {counted} |" in (tmp_path / form / "README.md").read_text()
    assert (tmp_path / "lora/comfyui.safetensors").is_file()
    assert (tmp_path / "pipeline/model_index.json").is_file()
    assert "--overwrite" in command(f"export {student} --to lora --out {tmp_path / 'lora'}").err
    for line, said in (
        (f"{tmp_path / 'lora'}", "contains adapters for diffusers or peft alone"),
        (
            f"{student} --base nothere",
            "nothere does not exist. Expected: --base",
        ),
    ):
        answer = command(f"sample {line} --prompt cat --out {tmp_path}/x.png")
        assert answer.code == 2
        assert said in answer.err


@pytest.mark.slow
def test_adapters_of_another_base_are_refused(folders, tmp_path):
    _, teacher = folders("stable-diffusion-3")
    student = tmp_path / "student"
    student_of(teacher, 1, lora=True).save_pretrained(student)
    other = save("stable-diffusion-3", tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="sha256"):
        dm.Student.from_pretrained(student, base=other)
    for verb in ("export", "sample"):
        refused = command(f"{verb} {student} --out {tmp_path / 'new'} --base {other}")
        assert refused.code == 2
        assert "sha256" in refused.err
        assert not (tmp_path / "new").exists()
    cut = (student / "adapter_model.safetensors").read_bytes()[:-50]
    (student / "adapter_model.safetensors").write_bytes(cut)
    damaged = command(f"export {student} --to lora --out {tmp_path / 'new'}")
    assert (damaged.code, (tmp_path / "new").exists()) == (2, False)


@pytest.mark.slow
def test_a_full_student_finds_its_pipeline_again(folders, tmp_path):
    folder, teacher = folders("stable-diffusion-3")
    moved_away = shutil.copytree(folder, tmp_path / "teacher")
    student = student_of(dm.load_teacher(moved_away, **SIZE["stable-diffusion-3"]), 1)
    student.save_pretrained(tmp_path / "student")
    told = teacher.pipeline.encode([PROMPT])
    x = student.sample(1, conditioning=told)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other text encoders")
        again = dm.Student.from_pretrained(tmp_path / "student")
    assert torch.equal(again.sample(1, conditioning=told), x)
    again.save_pretrained(tmp_path / "again")  # it still knows its pipeline
    assert dm.Student.from_pretrained(tmp_path / "again").denoiser.pipeline.shape == (3, 16, 16)

    schedule = json.loads((tmp_path / "student/config.json").read_text())["extra"]["schedule"]
    with safe_open(tmp_path / "student/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["distmatch"]) == schedule
    assert schedule["times"] == pytest.approx([1])
    assert "encode" in (tmp_path / "student/README.md").read_text()

    shutil.rmtree(moved_away)
    with pytest.raises(UserError, match="--base"):
        dm.Student.from_pretrained(tmp_path / "student")
    answer = command(f"export {tmp_path / 'student'} --to pipeline --out {tmp_path / 'out'}")
    assert (answer.code, (tmp_path / "out").exists()) == (2, False)
    done(f"export {tmp_path / 'student'} --to pipeline --out {tmp_path / 'out'} --base {folder}")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert max(gaps(pipe, student, teacher, "stable-diffusion-3")) < 1e-4
    retrained = save("stable-diffusion-3", tmp_path / "encoders", seed=3)
    with pytest.warns(UserWarning, match="other text encoders"):
        dm.Student.from_pretrained(tmp_path / "student", base=retrained)
    other = save("flux", tmp_path)
    with pytest.raises(UserError, match="pipeline of another family") as raised:
        dm.Student.from_pretrained(tmp_path / "student", base=other)
    assert "FluxPipeline" in raised.value.parts["got"]
    assert "StableDiffusion3Pipeline" in raised.value.parts["expected"]


def test_a_student_as_it_is_distilled_is_exported(folders, tmp_path):
    """Its steps are those of the teacher's own sampler by default; the base may have 16 bits."""
    folder, plain = folders("stable-diffusion-3")
    half = dm.load_teacher(folder, dtype="bfloat16", **SIZE["stable-diffusion-3"])
    for n, dtype, export in ((1, "float32", export_pipeline), (4, "bfloat16", export_lora)):
        teacher = plain if dtype == "float32" else half
        told = teacher.pipeline.encode([PROMPT, "a dog"])
        options = {"train": "lora", "lora_rank": 2, "base_dtype": dtype, "lr": 1e-3, "num_steps": n}
        student = dm.distill(teacher, told, method="diff-instruct", steps=5, batch=2, quiet=True, **options)
        assert export(student, tmp_path / str(n)) < 1e-4


def test_what_is_refused(folders, tmp_path, monkeypatch):
    _, teacher = folders("stable-diffusion-3")
    full = student_of(teacher, 1)
    with pytest.raises(UserError, match="no adapters"):
        export_lora(full, tmp_path / "out")
    with pytest.raises(UserError, match="differs by"):
        export_pipeline(dm.Student(teacher, (5.0,)), tmp_path / "out")  # starts within the path
    with pytest.raises(UserError, match="sampler posterior"):
        export_pipeline(dm.Student(teacher, (1e8, 5.0, 1.0), sampler="posterior"), tmp_path / "out")
    with pytest.raises(UserError, match="PixArtSigmaPipeline of diffusers loads no adapters"):
        export_lora(student_of(folders("pixart-sigma")[1], 1, lora=True), tmp_path / "out")
    monkeypatch.setattr(teacher.pipeline, "folder", tmp_path / "gone")
    with pytest.raises(UserError, match="is not found"):
        export_pipeline(full, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_students_of_other_teachers_are_refused(tmp_path):
    teacher = dm.train("digits", steps=2, net="mlp", quiet=True)
    student = dm.distill(
        teacher, "digits", method="dmd2", steps=5, batch=8, train="lora", lora_rank=2, quiet=True
    )
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        export_lora(student, tmp_path / "out")
    with pytest.raises(UserError, match="pipeline with prompts"):
        export_pipeline(student, tmp_path / "out")
