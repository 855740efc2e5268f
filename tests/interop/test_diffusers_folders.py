"""Folders of diffusers: what is read, saved, and refused. The networks are random."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distmatch import load_teacher
from distmatch.base.errors import UserError
from distmatch.interop.diffusers_parts import scheduler_from
from distmatch.interop.diffusers_teacher import (
    check_teacher,
    is_diffusers_folder,
    load_diffusers,
    teacher_from,
)
from distmatch.interop.saved import load_denoiser, load_external, save_denoiser
from tests.helpers.diffusers_models import diffusers, dit, schedule, unet, vae
from tests.helpers.rounding import assert_same_but_for_rounding


def saved_pipeline(folder, name="ddim sample", **options):
    diffusers.DDPMPipeline(unet(**options), schedule(name)).save_pretrained(folder)
    return folder


def test_folders_are_loaded(tmp_path):
    folder = saved_pipeline(tmp_path / "pipeline")
    assert is_diffusers_folder(folder)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 30.0])
    expected = teacher_from(unet(), schedule("ddim sample"))(x, sigma)
    before = torch.get_rng_state()
    whole = load_diffusers(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_but_for_rounding(whole(x, sigma), expected)
    assert whole.conversion.relative < 1e-5
    assert "largest difference" in str(whole.conversion)
    assert_same_but_for_rounding(load_external(folder)(x, sigma), expected)
    assert_same_but_for_rounding(load_diffusers(folder / "unet")(x, sigma), expected)
    bare = tmp_path / "bare"
    unet().save_pretrained(bare)
    assert is_diffusers_folder(bare)
    assert_same_but_for_rounding(load_diffusers(bare, scheduler=folder / "scheduler")(x, sigma), expected)
    with pytest.raises(UserError, match=r"no scheduler_config\.json"):
        load_diffusers(bare)
    schedule("ddim sample").save_pretrained(bare)  # everything in one folder, as early models have it
    assert_same_but_for_rounding(load_diffusers(bare)(x, sigma), expected)
    half = tmp_path / "half"
    saved_pipeline(half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet().half().save_pretrained(half / "unet", variant="fp16")
    loaded = load_diffusers(half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(x, sigma), expected, atol=1e-2)  # its weights were rounded to float16


def test_weights_are_in_aligned_memory_of_their_own(tmp_path):
    """Those of the mapped file begin at any byte, where kernels may round in another way (64: a vector)."""
    folder = tmp_path / "dit"
    diffusers.DiTPipeline(dit(num_embeds_ada_norm=2), vae(), schedule("ddpm eps")).save_pretrained(folder)
    teacher = load_diffusers(folder)
    assert {p.data_ptr() % 64 for net in (teacher, teacher.decoder.vae) for p in net.parameters()} == {0}


def test_latent_folders_bring_their_autoencoder(tmp_path):
    model, codec = dit(num_embeds_ada_norm=2), vae()
    diffusers.DiTPipeline(model, codec, schedule("ddpm eps")).save_pretrained(tmp_path / "dit")
    teacher = load_diffusers(tmp_path / "dit")
    assert teacher.decoder.shape == (3, 16, 16)
    z = torch.randn(1, 4, 8, 8)
    expected = teacher_from(model, schedule("ddpm eps"), vae=codec).decoder.decode(z)
    assert_same_but_for_rounding(teacher.decoder.decode(z), expected)
    assert load_diffusers(tmp_path / "dit", vae=False).decoder is None
    assert load_diffusers(tmp_path / "dit", vae=tmp_path / "dit" / "vae").decoder is not None
    save_denoiser(tmp_path / "run" / "model", teacher, {"kind": "teacher"})
    back, extra = load_denoiser(tmp_path / "run")
    assert extra == {"kind": "teacher"}
    assert_same_but_for_rounding(back.decoder.decode(z), expected)
    sigma, labels = torch.ones(1), torch.tensor([1])
    assert_same_but_for_rounding(back(z, sigma, labels), teacher(z, sigma, labels))


def ldm(folder):
    """A pipeline on the latents of a quantizing autoencoder, as LDM's are stored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=3,
            sample_size=16,
            num_vq_embeddings=16,
        ).eval()
    diffusers.LDMPipeline(codec, unet(), schedule("ddim sample")).save_pretrained(folder)
    return codec


def test_latents_of_a_quantizing_autoencoder_are_decoded(tmp_path):
    codec = ldm(tmp_path / "ldm")
    teacher = load_diffusers(tmp_path / "ldm")
    assert (teacher.shape, teacher.decoder.shape) == ((3, 8, 8), (3, 16, 16))
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = codec.decode(z / codec.config.scaling_factor).sample
        assert_same_but_for_rounding(teacher.decoder.decode(z), expected)


def test_a_part_that_is_not_read_is_named(tmp_path):
    """Without it the samples would be something else: latents taken for pixels, for example."""
    ldm(tmp_path / "ldm")
    (tmp_path / "ldm" / "vqvae").rename(tmp_path / "ldm" / "quantizer")
    with pytest.raises(UserError, match=r"a component that is not supported.*Got: quantizer\."):
        load_diffusers(tmp_path / "ldm")


def test_an_autoencoder_that_is_listed_and_missing_is_asked_for(tmp_path):
    ldm(tmp_path / "ldm")
    (tmp_path / "ldm" / "vqvae").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"lists an autoencoder that is not in it.*vqvae/config\.json"):
        load_diffusers(tmp_path / "ldm")
    assert load_diffusers(tmp_path / "ldm", vae=False).decoder is None
    assert load_diffusers(tmp_path / "ldm", vae=tmp_path / "elsewhere").decoder is not None


TEXT = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "vae": "AutoencoderKL"}


@pytest.mark.parametrize(
    ("pipeline", "part", "network"),
    [
        ("StableDiffusionPipeline", "unet", "UNet2DConditionModel"),
        ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel"),
        ("FluxPipeline", "transformer", "FluxTransformer2DModel"),
        ("PixArtAlphaPipeline", "transformer", "PixArtTransformer2DModel"),
    ],
)
def test_pipelines_that_read_text_are_refused_with_what_to_do(pipeline, part, network, tmp_path):
    parts = {**TEXT, part: network, "scheduler": "DDPMScheduler"}
    for name, kind in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    index = {"_class_name": pipeline, **{name: ["library", kind] for name, kind in parts.items()}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as whole:
        load_diffusers(tmp_path)
    with pytest.raises(UserError) as alone:
        load_diffusers(tmp_path / part)
    for caught, words in ((whole, (pipeline, "conditioned on text", "text_encoder")), (alone, (network,))):
        message = str(caught.value)
        assert all(word in message for word in (*words, "UNet2DModel", "as_denoiser(", "fix the text"))
        assert "did you mean" not in message


def test_a_pipeline_with_a_scheduler_of_another_kind_is_refused_with_what_to_do(tmp_path):
    """``ScoreSdeVeScheduler`` is near to many names and is none of them."""
    diffusers.ScoreSdeVePipeline(unet(), diffusers.ScoreSdeVeScheduler()).save_pretrained(tmp_path / "ve")
    with pytest.raises(UserError) as caught:
        load_external(tmp_path / "ve")
    assert all(words in str(caught.value) for words in ("ScoreSdeVeScheduler", "as_denoiser(", 'path="ve"'))
    assert "did you mean" not in str(caught.value)


def test_an_id_on_a_hub_is_not_taken_for_a_wrong_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_diffusers, load_teacher):
        with pytest.raises(UserError, match=r"does not download.*hf download google/ddpm-cifar10-32"):
            load("google/ddpm-cifar10-32")


def test_tied_weights_of_a_network_are_saved(tmp_path):
    """Safetensors refuse two names of one memory."""
    teacher = teacher_from(unet(), schedule("ddim sample"))
    norms = [module for module in teacher.net.model.modules() if isinstance(module, nn.GroupNorm)]
    first, second = [norm for norm in norms if norm.num_channels == norms[0].num_channels][:2]
    nn.init.normal_(first.weight)
    second.weight = first.weight
    save_denoiser(tmp_path / "model", teacher)
    back, _ = load_denoiser(tmp_path / "model")
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 10.0])
    assert_same_but_for_rounding(back(x, sigma), teacher(x, sigma))


@pytest.mark.parametrize("name", ["ddpm v cosine", "edm euler v", "flow shifted"])
def test_students_of_every_family_are_saved_whole(name, tmp_path):
    options = {
        "null_class": 2,
        "features": ["conv_in", "mid_block"],
    }
    options |= {} if name.startswith("edm") else {"sigma_data": 0.7}  # EDM's own is stated
    student = teacher_from(unet(num_class_embeds=3), schedule(name), **options)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    save_denoiser(tmp_path / "model", student)
    back, _ = load_denoiser(tmp_path / "model")
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.02, 1.0, 30.0])
    labels = torch.tensor([0, 1, -1])
    for a, b in zip(
        student(x, sigma, labels, return_features=True)[1],
        back(x, sigma, labels, return_features=True)[1],
        strict=True,
    ):
        assert_same_but_for_rounding(a, b)
    assert_same_but_for_rounding(student(x, sigma, labels), back(x, sigma, labels))
    kept = ("shape", "num_classes", "sigma_data", "sigma_min", "sigma_max")
    assert all(getattr(student, key) == getattr(back, key) for key in kept)
    save_denoiser(tmp_path / "model", back)  # replaces


def test_pickled_weights_are_refused(tmp_path):
    folder = saved_pipeline(tmp_path / "p")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(unet().state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="is a pickle and was not opened"):
        load_diffusers(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_diffusers(folder)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    assert load_external(tmp_path) is None
    assert load_external(tmp_path / "nothing") is None
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError):
            load_diffusers(place)
    folder = saved_pipeline(tmp_path / "p")
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UserError, match="UNet2DModel"):
        load_diffusers(folder)
    config.write_text(json.dumps({**values, "block_out_channels": [8, 32]}))
    with pytest.raises(UserError, match="cannot load"):
        load_diffusers(folder)
    config.write_text(json.dumps(values))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load"):
        load_diffusers(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    missing = tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"conv_in\.weight"):
        load_diffusers(folder)
    save_file({**tensors, "conv_in.weight": missing, "conv_on.weight": missing.clone()}, weights)
    with pytest.raises(UserError, match=r"conv_on\.weight"):
        load_diffusers(folder)
    weights.write_bytes(whole)
    plan = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(plan.read_text())
    for change, message in (
        ({"_class_name": "ScoreSdeVeScheduler"}, 'path="ve"'),
        ({"prediction_type": "epsilons"}, "prediction_type"),
        ({"beta_schedule": "steep"}, "cannot read"),
    ):
        plan.write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=message):
            load_diffusers(folder)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="not supported as a teacher"):
        teacher_from(nn.Linear(2, 2), schedule("ddpm eps"))
    with pytest.raises(UserError, match="do not match"):
        teacher_from(unet(), schedule("ddpm eps"), vae=vae())
    with pytest.raises(UserError, match="class_embed_type"):
        teacher_from(unet(class_embed_type="timestep"), schedule("ddpm eps"))
    with pytest.raises(UserError, match="image size"):
        teacher_from(unet(sample_size=None), schedule("ddpm eps"))
    assert teacher_from(unet(sample_size=None), schedule("ddpm eps"), size=(8, 16)).shape == (3, 8, 16)
    with pytest.raises(UserError, match="pure noise"):
        teacher_from(unet(), schedule("ddim zero snr", prediction_type="epsilon"))
    with pytest.raises(UserError, match="only a teacher of diffusers"):
        check_teacher(unet())


def test_without_the_package(monkeypatch, tmp_path):
    folder = saved_pipeline(tmp_path / "p")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install distmatch\[diffusers\]"):
        load_external(folder)


@pytest.mark.parametrize("key", ["num_train_timesteps", "solver_order"])
@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_does_not_say_how_much_memory_is_taken(name, key):
    """Both are lengths of lists that diffusers makes when it reads a config (found by fuzzing)."""
    kept = scheduler_from({"_class_name": name, key: 2})
    assert kept.config[key] == 2
    for wrong in (10**12, 0, "2"):
        with pytest.raises(UserError, match="invalid"):
            scheduler_from({"_class_name": name, key: wrong})
