"""Students of pipelines for plain diffusers and ComfyUI: the same noise and prompt give the same samples."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop import export_lora, export_pipeline
from distmatch.interop.lora import NAME, adapters_of, network_in, with_adapters
from distmatch.interop.pipelines.schedulers import fitted_shift
from tests.helpers.exported import FAMILIES, NOISE, PROMPT, even_sigmas, gaps, pipelines, student_of
from tests.helpers.pipelines import SIZE

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_plain_call_of_the_pipeline_gives_the_students_samples(name, lora, folders, tmp_path):
    folder, teacher = folders(name)
    for n in (4,) if lora else (1, 2, 3, 4) if name == "stable-diffusion-3" else (1, 4):
        student = student_of(teacher, n, lora=lora)
        stated = export_pipeline(student, tmp_path / "out")
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert stated < 1e-4
        assert max(gaps(pipe, student, teacher, name)) < 1e-4
    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    plain.scheduler = pipe.scheduler
    # The teacher is another network; decoded by random weights its samples may look alike, in latents not.
    assert gaps(plain, student, teacher, name)[0] > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_load_lora_weights_gives_the_students_samples(name, folders, tmp_path):
    folder, teacher = folders(name)
    for n in (1, 4) if name == "wan" else (1,):
        student = student_of(teacher, n, lora=True)
        assert export_lora(student, tmp_path / "out") < 1e-4
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
        scheduler = getattr(diffusers, json.loads((tmp_path / "out/distmatch.json").read_text())["scheduler"])
        pipe.scheduler = scheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
        assert max(gaps(pipe, student, teacher, name)) < 1e-4


# How ComfyUI finds the change of a weight (comfy/lora.py and comfy/weight_adapter/lora.py, read in 2026, the
# rule written again here): it makes for each weight of its model the names under which a file may have it.
# For U-Nets "lora_unet_" + the name in diffusers with underscores; for SD3, Flux and QwenImage "transformer."
# + the name in diffusers; for Wan, as for any model, "diffusion_model." + the name in the original code. The
# change is up @ down, flattened, times X.alpha / rank if there is one, of X.lora_up and X.lora_down or of
# X.lora_B and X.lora_A.
WAN = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
WAN |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head"}
WAN |= {f"condition_embedder.{n}_embedder.linear_1": f"{n}_embedding.0" for n in ("time", "text")}
WAN |= {f"condition_embedder.{n}_embedder.linear_2": f"{n}_embedding.2" for n in ("time", "text")}
WAN |= {"condition_embedder.time_proj": "time_projection.1"}


def comfyui_name(name: str, layer: str) -> str:
    if name == "stable-diffusion":
        return "lora_unet_" + layer.replace(".", "_")
    if name != "wan":
        return "transformer." + layer
    for ours, theirs in WAN.items():
        layer = theirs if layer == ours else layer.replace("." + ours, "." + theirs)
    return "diffusion_model." + layer


@pytest.mark.parametrize("name", FAMILIES)
def test_comfyuis_file_changes_the_same_weights(name, folders, tmp_path):
    _, teacher = folders(name)
    student = student_of(teacher, 1, lora=True)
    export_lora(student, tmp_path / "out")
    tensors = load_file(tmp_path / "out/comfyui.safetensors")
    base, whole = network_in(teacher), network_in(student.merged().denoiser)
    for layer in adapters_of(network_in(student.denoiser)):
        key = comfyui_name(name, layer)
        down, up = ("lora_down", "lora_up") if name == "stable-diffusion" else ("lora_A", "lora_B")
        down, up = tensors.pop(f"{key}.{down}.weight"), tensors.pop(f"{key}.{up}.weight")
        alpha = tensors.pop(f"{key}.alpha", torch.tensor(float(len(down))))
        change = (up.flatten(1) @ down.flatten(1)) * alpha / len(down)
        theirs = base.get_submodule(layer).weight
        torch.testing.assert_close(
            theirs + change.reshape(theirs.shape), whole.get_submodule(layer).weight, rtol=0, atol=1e-5
        )
    assert not tensors


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("stable-diffusion", ["to_q", "ff.net.2", "conv1", "proj_in"]),
        ("wan", ["to_q", "to_out.0", "ffn.net.2"]),
    ],
)
def test_diffusers_own_converter_reads_comfyuis_file(name, targets, folders, tmp_path):
    """It converts the names of kohya's and Wan's code, for the layers that it knows."""
    folder, teacher = folders(name)
    network = with_adapters(teacher, rank=2, alpha=6.0, targets=targets)
    for i, layer in enumerate(adapters_of(network).values()):
        torch.nn.init.normal_(layer.lora_B[NAME].weight, generator=torch.Generator().manual_seed(i))
    student = dm.Student(network, even_sigmas(teacher, 1))
    export_lora(student, tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "out", weight_name="comfyui.safetensors")
    pipe.fuse_lora()
    theirs = getattr(pipe, teacher.pipeline.tracer.network_name)
    whole = network_in(student.merged().denoiser)
    for layer in adapters_of(network_in(network)):
        fused = theirs.get_submodule(layer).get_base_layer().weight
        torch.testing.assert_close(fused, whole.get_submodule(layer).weight, rtol=0, atol=1e-5)


def test_fresh_noise_in_each_step(folders, tmp_path):
    """The pipeline draws it itself: FlowMatchEuler and LCM from the generator of torch, or the one passed."""
    for name in ("stable-diffusion", "stable-diffusion-3"):
        _, teacher = folders(name)
        student = student_of(teacher, 4, sampler="stochastic")
        assert export_pipeline(student, tmp_path / name) < 1e-4
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        start = json.loads((tmp_path / name / "distmatch.json").read_text())["start"]
        assert start == 1 if name == "stable-diffusion-3" else 0.99 < start < 1  # LCM starts from unit noise
        z = torch.randn(1, *student.shape, generator=NOISE)
        draws = torch.Generator().manual_seed(3)
        noise = [z, *(torch.randn(z.shape, generator=draws) for _ in range(3))]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
            x = pipe(PROMPT, latents=start * z, **options, **SIZE[name])[0]
            ours = student(noise, teacher.pipeline.encode([PROMPT]))
        assert (x - ours).abs().max() < 1e-4 * ours.abs().max().clamp_min(1)


def test_students_of_wan_with_fresh_noise_have_the_times_before_rounding(folders, tmp_path):
    """Its own scheduler rounds times down, that of a student's steps does not: 923.08, 818.18, ..."""
    _, teacher = folders("wan")
    told = teacher.pipeline.encode([PROMPT, "a dog"])
    options = {"train": "lora", "lora_rank": 2, "lr": 1e-3, "num_steps": 5, "steps": 5, "batch": 2}
    student = dm.distill(teacher, told, method="diff-instruct", quiet=True, **options)
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    x = student.sample(2, conditioning=told, decode=False)
    assert torch.equal(again.sample(2, conditioning=told, decode=False), x)
    assert export_lora(again, tmp_path / "lora") < 1e-4
    assert export_pipeline(again, tmp_path / "pipeline") < 1e-4
    assert not teacher.time.exact
    for method, exact in (("scm", True), ("sid", False)):  # a rounded time has no derivative
        built = dm.methods.build(teacher, method, total_steps=60, train="lora", lora_rank=2)
        assert built.init(0).student.denoiser.time.exact == exact


def test_the_call_of_a_pipeline_that_divides_its_steps_otherwise_has_their_times(folders, tmp_path):
    """CogView4 would take the times 1000, 667, 334, 1. Its call is given whole times before the shift."""
    _, teacher = folders("cogview4")
    student = student_of(teacher, 4)
    assert export_pipeline(student, tmp_path / "pipeline") < 1e-4
    call = json.loads((tmp_path / "pipeline/distmatch.json").read_text())["call"]
    assert call["timesteps"] == [1000, 750, 500, 250]
    assert "timesteps=[1000, 750, 500, 250]" in (tmp_path / "pipeline/README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    z = torch.randn(1, *student.shape, generator=NOISE)
    with torch.no_grad():
        x = student([z] * 4, teacher.pipeline.encode([PROMPT]))
        theirs = pipe(PROMPT, num_inference_steps=4, latents=z, output_type="latent", **call)[0]
    assert (theirs - x).abs().max() < 1e-4 * x.abs().max().clamp_min(1)
    assert export_lora(student_of(teacher, 2, sampler="stochastic", lora=True), tmp_path / "lora") < 1e-4
    with pytest.raises(UserError, match="no scheduler of diffusers takes the steps"):
        export_pipeline(student_of(teacher, 3), tmp_path / "pipeline")  # 667 and 333 are no thirds


def test_fitted_shift_gives_the_levels_of_a_pipeline_that_divides_evenly():
    for s in (0.5, 1.0, 3.0, 7.0):
        times = [s * u / (1 + (s - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
        assert fitted_shift(times, lambda _: 1 / 4) == pytest.approx(s)
    assert fitted_shift([1.0, 0.4], lambda _: 1 / 2) == 1
    assert fitted_shift([1.0, 0.9, 0.1], lambda _: 1 / 3) is None
