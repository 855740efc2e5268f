"""Students as stock pipelines of diffusers: one step there gives the student's samples for the same noise.

The networks are random, so that no part of the algebra is near zero; the noise is torch's own with seed 0.
Samples differ by float32's rounding only: 1e-5 of the largest value.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop import VAEDecoder, load_diffusers, teacher_from
from distmatch.interop import diffusers_export as module
from distmatch.interop.diffusers_export import export_diffusers
from distmatch.interop.frozen import frozen_call
from distmatch.methods.student import Student
from tests.helpers.command import command, contents, done
from tests.helpers.small import network_teacher

diffusers = pytest.importorskip("diffusers")
from huggingface_hub import ModelCard  # noqa: E402

from tests.helpers import diffusers_models as models  # noqa: E402

SCHEDULERS = {
    "eps": lambda: diffusers.DDPMScheduler(),
    "v": lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "sample": lambda: diffusers.DDIMScheduler(prediction_type="sample"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm v": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
}


def noise(*shape: int) -> torch.Tensor:
    """What a pipeline draws from a generator with seed 0."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def loaded(folder: Path) -> object:
    """The pipeline, as anybody loads it; the option keeps diffusers from advertising another package."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(folder: Path, n: int, **arguments: object) -> torch.Tensor:
    """What the pipeline makes with no word on steps, before it clips to images."""
    kept = []
    images = loaded(folder)(
        batch_size=n,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        callback=lambda index, time, x: kept.append(x),
        **arguments,
    ).images
    (x,) = kept  # one step
    assert torch.equal(images, (x / 2 + 0.5).clamp(0, 1))
    return x


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())))


def student_of(kind: str, sigma: float = 2.5, **network: object) -> Student:
    null = 3 if "num_class_embeds" in network else None
    return Student(teacher_from(models.unet(**network), SCHEDULERS[kind](), null_class=null), (sigma,))


@pytest.mark.parametrize("kind", ["eps", "v", "sample", "flow", "edm"])
def test_from_a_folder_of_diffusers_to_a_folder_of_diffusers(kind: str, tmp_path: Path) -> None:
    """Saved by diffusers, taken in, distilled, exported, loaded by plain diffusers."""
    models.unet(in_channels=1, out_channels=1).save_pretrained(tmp_path / "teacher/unet")
    SCHEDULERS[kind]().save_pretrained(tmp_path / "teacher/scheduler")
    teacher = load_diffusers(tmp_path / "teacher")
    data = (noise(32, 1, 8, 8) / 4).clamp(-1, 1)
    student = dm.distill(teacher, data, steps=3, batch=8, fake_score_steps=1, lr_rampup=0, quiet=True)
    moved = [a - b for a, b in zip(student.denoiser.parameters(), teacher.parameters(), strict=True)]
    assert sum(float(part.detach().abs().sum()) for part in moved) > 0
    difference = export_diffusers(student, tmp_path / "out")
    assert difference < 1e-5
    with torch.no_grad():
        expected = student([noise(3, 1, 8, 8)])
    x = drawn(tmp_path / "out", 3)
    assert (x - expected).abs().max() < 1e-5
    assert x.std() > 0.05
    # Nothing in the folder asks for code of ours.
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert {part[0] for part in index.values() if isinstance(part, list)} == {"diffusers"}
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "diffusers"


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sigma", [1.0, 80.0])
def test_classes_and_levels(kind: str, sigma: float, tmp_path: Path) -> None:
    student = student_of(kind, sigma, num_class_embeds=4)
    export_diffusers(student, tmp_path / "out")
    with torch.no_grad():
        expected = student([noise(4, 3, 8, 8)], torch.tensor([0, 2, 1, -1]))
        others = student([noise(4, 3, 8, 8)], torch.tensor([1, 1, 1, 1]))
    assert close(drawn(tmp_path / "out", 4, class_labels=[0, 2, 1, 3]), expected)
    assert not close(others, expected)


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("v", {"time_embedding_type": "fourier"}),
        ("eps", {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
        ("flow", {"out_channels": 6}),
        ("v", {"freq_shift": 1, "flip_sin_to_cos": False, "sample_size": None}),
    ],
    ids=["fourier", "learned", "variance", "other options"],
)
def test_networks(kind: str, network: dict[str, object], tmp_path: Path) -> None:
    size = 8 if "sample_size" in network else None
    student = Student(teacher_from(models.unet(**network), SCHEDULERS[kind](), size=size), (2.5,))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    export_diffusers(student, tmp_path / "out")
    with torch.no_grad():
        assert close(drawn(tmp_path / "out", 3), student([noise(3, 3, 8, 8)]))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("kind", ["eps", "v", "sample", "flow"])
@pytest.mark.parametrize("sigma", [0.6, 80.0])
def test_transformers_on_latents(kind: str, sigma: float, tmp_path: Path) -> None:
    outputs = 8 if kind == "eps" else None
    model = models.dit(num_embeds_ada_norm=3, in_channels=4, out_channels=outputs)
    student = Student(teacher_from(model, SCHEDULERS[kind](), vae=models.vae()), (sigma,))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    export_diffusers(student, tmp_path / "out")
    found = loaded(tmp_path / "out")(
        [0, 2, 1],
        guidance_scale=1.0,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    with torch.no_grad():
        z = student([noise(3, 4, 8, 8)], torch.tensor([0, 2, 1]))
        expected = (student.denoiser.decoder.decode(z) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.std() > 0.01
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_more_steps_than_the_student_has_are_refused_by_diffusers(tmp_path: Path) -> None:
    export_diffusers(student_of("v"), tmp_path / "out")
    with pytest.raises(ValueError, match="num_inference_steps"):
        loaded(tmp_path / "out")(num_inference_steps=50)


def test_a_frozen_call_is_the_denoiser() -> None:
    for kind in SCHEDULERS:
        denoiser = student_of(kind, num_class_embeds=4).denoiser
        call = frozen_call(denoiser, 7.0)
        y, labels = 7 * noise(2, 3, 8, 8), torch.tensor([0, 2])
        with torch.no_grad():
            value = denoiser.net(call.scale * y, call.time.expand(2), labels)
            expected = denoiser(y, torch.full((2,), 7.0), labels)
        assert torch.allclose(call.skip * y + call.gain * value, expected, atol=1e-5), kind


def test_what_does_not_agree_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of("eps")
    export_diffusers(student, tmp_path / "out")
    before = contents(tmp_path)
    right = module._for_one_time
    monkeypatch.setattr(module, "_for_one_time", lambda *given: 1.01 * right(*given))
    with pytest.raises(UserError, match="does not reproduce the student's samples"):
        export_diffusers(student, tmp_path / "out")
    assert contents(tmp_path) == before


def latent_dit(**options: object) -> Student:
    model = models.dit(num_embeds_ada_norm=3, in_channels=4, out_channels=4)
    return Student(teacher_from(model, SCHEDULERS["eps"](), vae=models.vae()), (1.0,), **options)


def shifted() -> Student:
    student = latent_dit()
    student.denoiser.decoder = VAEDecoder(models.vae(), [0.5], [0.1], (8, 8))
    return student


def u_net(**options: object) -> Student:
    size = options.pop("size", None)
    decoder = options.pop("vae", None)
    return Student(teacher_from(models.unet(**options), SCHEDULERS["eps"](), vae=decoder, size=size), (2.5,))


SKIPS = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: Student(network_teacher(shape=(1, 8, 8)), (2.5,)),
            "only a student of a teacher of diffusers",
        ),
        (lambda: Student(u_net().denoiser, (2.5, 0.5)), "2 calls"),
        (lambda: u_net(center_input_sample=True), "center_input_sample"),
        (lambda: u_net(size=(8, 16)), "8 x 16 pixels"),
        (lambda: u_net(in_channels=4, out_channels=4, vae=models.vae()), "U-Net on latents"),
        (
            lambda: Student(teacher_from(models.dit(num_embeds_ada_norm=3), SCHEDULERS["v"]()), (2.5,)),
            "pixels",
        ),
        (latent_dit, "at sigma 1"),
        (shifted, "a shift or a scale"),
    ],
    ids=["ours", "calls", "centered", "oblong", "latent U-Net", "pixel DiT", "sigma 1", "shifted latents"],
)
def test_refusals_say_why(make: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        export_diffusers(make(), tmp_path / "out")
    assert reason in str(caught.value)
    assert "--to onnx" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_skip_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="skip blocks"):
        export_diffusers(u_net(block_out_channels=(32, 32), norm_num_groups=8, **SKIPS), tmp_path / "out")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student_of("v").save_pretrained("student")
    told = done("export student --to diffusers --out pipe --license apache-2.0 --json").json()
    assert (told["kind"], told["to"]) == ("student", "diffusers")
    assert told["difference"] < 1e-5
    assert ModelCard.load("pipe/README.md").data.license == "apache-2.0"
    assert "pipe exists" in command("export student --to diffusers --out pipe").err
    done("export student --to diffusers --out pipe --overwrite")
    diffusers.DDPMPipeline(models.unet(), diffusers.DDPMScheduler()).save_pretrained("teacher")
    answer = command("export teacher --to diffusers --out never")
    assert answer.code == 2
    assert "teacher" in answer.err
    assert not Path("never").exists()
