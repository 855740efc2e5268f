"""Students of pipelines for plain diffusers and ComfyUI: the same noise and prompt give the same samples."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop import export_lora, export_pipeline
from distmatch.interop.lora import NAME, adapters_of, network_in, with_adapters
from distmatch.interop.pipelines.schedulers import fitted_shift
from tests.helpers.command import command, done
from tests.helpers.pipelines import SIZE, save

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

FAMILIES = ("stable-diffusion", "stable-diffusion-3", "flux", "qwen-image", "wan")
PROMPT = "a small red cat in the house"
# What turns guidance off: the scale is an input of Flux, and QwenImage calls that of two passes "true".
OFF = {"flux": {"guidance_scale": 3.5}, "qwen-image": {"true_cfg_scale": 1.0}}
NOISE = torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place, known = tmp_path_factory.mktemp("pipelines"), {}

    def find(name):
        if name not in known:
            folder = save(name, place)
            known[name] = (folder, dm.load_teacher(folder, **SIZE[name]))
        return known[name]

    return find


def moved(teacher, lora: bool):
    """A student's network: the teacher with other weights, in full or by adapters on all layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if not lora:
            network = copy.deepcopy(teacher)
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            return network
        network = with_adapters(teacher, rank=2, alpha=6.0)
        for layer in adapters_of(network).values():
            torch.nn.init.normal_(layer.lora_B[NAME].weight, std=0.05)
        return network


def even_sigmas(teacher, n: int) -> tuple[float, ...]:
    """The steps of the teacher's sampler: even in time, t = s u / (1 + (s - 1) u) for a flow of shift s."""
    if teacher.pipeline.schedule.family == "flow":
        s, shares = teacher.pipeline.shift, [1 - i / n for i in range(1, n)]
        return (teacher.path.rho_max, *(s * u / (1 - u) for u in shares))
    rates = teacher.pipeline.tracer.pipeline.scheduler.alphas_cumprod.double()
    chosen = rates[[round(1000 * (1 - i / n)) - 1 for i in range(n)]]
    return tuple((1 / chosen - 1).sqrt().tolist())


def student_of(teacher, n: int, *, sampler: str = "ddim", lora: bool = False) -> dm.Student:
    info = {"method": "sid", "guidance": 4.5}
    return dm.Student(moved(teacher, lora), even_sigmas(teacher, n), info, sampler=sampler)


@torch.no_grad()
def gaps(pipe, student, teacher, name: str) -> tuple[float, float]:
    """The differences of a plain call and the student from the same noise, in latents and in pixels."""
    z = torch.randn(1, *student.shape, generator=NOISE)
    n = len(student.sigmas)
    x = student([z] * n, teacher.pipeline.encode([PROMPT]))
    off = OFF.get(name, {"guidance_scale": 1.0})
    options = {**SIZE[name], **off, "num_inference_steps": n, "latents": z}
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(PROMPT, output_type="latent", **options)[0]
    pixels = 2 * pipe(PROMPT, output_type="pt", **options)[0] - 1
    theirs = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    difference = (theirs - teacher.decoder.decode(x)).abs().max().item()
    return ((latents - x).abs().max() / x.abs().max().clamp_min(1)).item(), difference


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
    assert min(gaps(plain, student, teacher, name)) > 1e-2  # the teacher is another network


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
