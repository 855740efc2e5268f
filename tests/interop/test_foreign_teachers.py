"""Teachers from elsewhere through the whole product: command line, distillation, saved students, latents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.data import Scaling, load_data
from distmatch.methods.initialization import has_network, starting_network
from distmatch.training.latent_data import as_latents
from distmatch.training.teachers import open_denoiser
from tests.helpers.command import command, done
from tests.helpers.edm_pickles import teacher_and_pickle

diffusers = pytest.importorskip("diffusers")
from tests.helpers import diffusers_models as models  # noqa: E402
from tests.helpers.rounding import assert_same_but_for_rounding  # noqa: E402

FEW = "--steps 3 --batch 8 --fake-score-steps 1"


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with pipelines ``plain`` (grey, 8x8), ``classes`` and ``latent``, and ``edm.pkl``."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        grey = {"in_channels": 1, "out_channels": 1}
        ddpm = diffusers.DDPMScheduler()
        diffusers.DDPMPipeline(models.unet(**grey), ddpm).save_pretrained("plain")
        told = models.unet(num_class_embeds=11, **grey)
        diffusers.DDPMPipeline(told, ddpm).save_pretrained("classes")
        transformer = models.dit(num_embeds_ada_norm=3, in_channels=4, out_channels=4)
        diffusers.DiTPipeline(transformer, models.vae(), diffusers.DDIMScheduler()).save_pretrained("latent")
        teacher_and_pickle(folder, "edm")
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
        np.savez("images.npz", x=images, y=np.arange(30) % 3)
        yield folder


@pytest.mark.parametrize("teacher", ["plain", "classes"])
def test_a_folder_of_diffusers_is_distilled_and_its_student_sampled(teacher: str) -> None:
    told = done(f"distill --teacher {teacher} --data digits {FEW} --out of_{teacher} --json")
    assert f"{teacher}: largest difference from the original" in told.err
    start = json.loads(Path(f"of_{teacher}/log.jsonl").read_text().splitlines()[0])
    assert start["conversion"].startswith("largest difference")
    assert start["parameters"]["student"] == start["parameters"]["teacher"]
    sampled = done(f"sample of_{teacher} --n 5 --out {teacher}.npz --json").json()
    assert (sampled["model"], sampled["nfe"]) == ("student", 1)
    assert np.load(f"{teacher}.npz")["x"].shape == (5, 8, 8)
    student = dm.Student.from_pretrained(f"of_{teacher}")
    assert student.info["teacher_conversion"] == start["conversion"]
    student.save_pretrained("again")
    again = dm.Student.from_pretrained("again")
    assert_same_but_for_rounding(again.sample(4, seed=1), student.sample(4, seed=1))
    assert again.sigmas == student.sigmas
    assert again.info == student.info
    # It moved: three steps of training from the teacher's weights.
    first = dm.load_teacher(teacher)
    moved = [
        not torch.equal(a, b) for a, b in zip(first.parameters(), student.denoiser.parameters(), strict=True)
    ]
    assert any(moved)


@pytest.mark.slow
def test_a_run_with_a_foreign_teacher_resumes_to_the_same_student() -> None:
    four = "--data digits --steps 4 --batch 8 --fake-score-steps 1 --checkpoint-every 2"
    done(f"distill --teacher plain {four} --out whole")
    done(f"distill --teacher plain {four} --out cut")
    (Path("cut") / "model/model.safetensors").unlink()
    done("distill --out cut --resume 2")
    first, second = (dm.Student.from_pretrained(run).denoiser for run in ("whole", "cut"))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_teachers_are_sampled_and_measured_from_the_command_line() -> None:
    told = done("sample plain --n 3 --steps 4 --solver dpmpp-2m --out a.npz --json")
    assert told.json()["nfe"] == 4
    assert "largest difference" in told.err
    assert np.load("a.npz")["x"].shape == (3, 8, 8)
    told = done("sample edm.pkl --n 4 --steps 3 --classes 0 1 --out b.npz --json")
    assert told.json()["nfe"] == 5
    assert "not compared" in told.err
    assert np.load("b.npz")["x"].shape == (4, 8, 8, 3)
    done(f"distill --teacher plain --data digits {FEW} --method diff-instruct --out measured")
    found = done("evaluate measured --n 40 --steps 3 --features pixels --json").json()
    assert found["teacher"]["nfe"] == 5
    assert found["student"]["nfe"] == 1


def test_export_makes_model_folders_of_them() -> None:
    told = done("export classes --null-class 10 --out named")
    assert "teacher with" in told.out
    teacher, info = open_denoiser("named")
    assert teacher.num_classes == 10
    assert info["conversion"].startswith("largest difference")
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 5.0])
    named = dm.load_teacher("classes", null_class=10)
    for labels in (None, torch.tensor([3, -1])):
        assert_same_but_for_rounding(teacher(x, sigma, labels), named(x, sigma, labels))
    done("sample named --n 2 --steps 2 --guidance 2 --out c.npz")
    assert done("export edm.pkl --out converted --json").json()["kind"] == "teacher"
    x = torch.randn(2, 3, 8, 8)
    converted, labels = dm.load_teacher("converted"), torch.tensor([0, 1])
    assert_same_but_for_rounding(converted(x, sigma, labels), dm.load_teacher("edm.pkl")(x, sigma, labels))


def test_latents_are_decoded_by_teacher_and_student() -> None:
    done("sample latent --n 3 --steps 2 --out d.npz")
    assert np.load("d.npz")["x"].shape == (3, 16, 16, 3)
    done(f"distill --teacher latent --data images.npz {FEW} --out of_latent")
    done("sample of_latent --n 3 --out e.npz")
    assert np.load("e.npz")["x"].shape == (3, 16, 16, 3)
    student = dm.Student.from_pretrained("of_latent")
    z = student.sample(3, decode=False)
    assert tuple(z.shape) == (3, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(student.sample(3), student.denoiser.decoder.decode(z))
    assert student.export(student.sample(3)).shape == (3, 16, 16, 3)
    assert Path("of_latent/model/vae/config.json").exists()
    found = done("evaluate of_latent --n 12 --steps 2 --features pixels --json").json()
    assert found["teacher"]["nfe"] == 3
    assert command("sample of_latent --n 1 --out f.npz").err.count("difference") == 0


@pytest.mark.statistical
def test_encoded_data_have_the_moments_of_the_encoder() -> None:
    teacher = dm.load_teacher("latent")
    data = load_data("images.npz")
    latents = as_latents(data, teacher, 0, torch.device("cpu"))
    assert latents.shape == (4, 8, 8)
    assert torch.equal(latents.labels, data.labels)
    assert latents.scaling == Scaling.for_images(-1.0, 1.0, "latents, as they are")
    x, _ = latents.batch(torch.arange(30))
    images, _ = data.batch(torch.arange(30))
    with torch.no_grad():
        found = teacher.decoder.vae.encode(images).latent_dist
    mean, std = found.mean * teacher.decoder.scale[0], found.std * teacher.decoder.scale[0]
    z = ((x - mean) / std).flatten()
    # 7680 standard normals: mean within 5 standard errors, 1/sqrt(7680) = 0.011, deviation likewise.
    assert abs(float(z.mean())) < 0.06
    assert float(z.std()) == pytest.approx(1, abs=0.05)
    again = as_latents(data, teacher, 0, torch.device("cpu"))
    assert torch.equal(again.raw, latents.raw)
    # Data of the teacher's own shape are latents already; without autoencoder nothing is done.
    assert as_latents(latents, teacher, 0, torch.device("cpu")) is latents
    assert as_latents(data, dm.load_teacher("plain"), 0, torch.device("cpu")) is data


def test_students_share_the_autoencoder_and_copy_the_network() -> None:
    teacher = dm.load_teacher("latent")
    student = starting_network(teacher, None, 0, torch.device("cpu"))
    assert student.decoder is teacher.decoder
    assert not any(p.requires_grad for p in student.decoder.vae.parameters())
    assert all(p.requires_grad for p in student.parameters())
    ids = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in ids for p in student.parameters())
    wrapped = dm.as_denoiser(torch.nn.Identity(), shape=(2,))
    assert not has_network(wrapped)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("distill --teacher plain --out x", ("--data", "teacher")),
        ("distill --teacher latent --data digits --out x", ("autoencoder", "(3, 16, 16)")),
        ("distill --teacher latent --data images.npz --flip --out x", ("--flip", "latents")),
        ("distill --teacher plain --data images.npz --out x", ("shape", "(1, 8, 8)")),
        ("sample classes --n 2 --steps 2 --guidance 2 --out x.npz", ("null_class",)),
        ("export edm.pkl --null-class 3 --out x", ("folders of diffusers", "null_class")),
        ("export of_plain --vae latent/vae --out x", ("folders of diffusers",)),
        ("evaluate plain", ("is a model folder", "distmatch sample plain")),
        ("evaluate edm.pkl --data digits", ("a pretrained model",)),
        ("export edm.pkl --vae latent/vae --out x", ("pixels",)),
    ],
)
def test_mistakes_are_explained(line: str, said: tuple[str, ...]) -> None:
    answer = command(line)
    assert answer.code == 2, answer.err
    assert all(text in answer.err for text in said), answer.err
    assert not Path("x").exists()
