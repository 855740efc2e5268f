"""Teachers made of pipelines by tracing: against what the pipelines compute, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.paths import discrete_path
from distmatch.diffusion.solvers import solve
from distmatch.interop.pipelines import load_pipeline
from distmatch.interop.pipelines.comparison import compare
from distmatch.interop.pipelines.contract import TimeMap, fit_contract
from tests.helpers.pipelines import BUILDERS, SIZE, diffusers, save

FAMILIES = tuple(BUILDERS)
PROMPTS = ["a red cat", "the small green dog runs", "a house"]


def first_order(pipeline: Any) -> Any:
    """A first-order sampler of diffusers with the noise levels of a pipeline's own: DDIM in our terms."""
    scheduler = pipeline.scheduler
    if isinstance(scheduler, (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.CogVideoXDDIMScheduler)):
        return scheduler
    options = {"solver_order": 1, "final_sigmas_type": "zero", "algorithm_type": "dpmsolver++"}
    return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, **options)


def prompts_of(name: str) -> list[Any]:
    return [1, 4, 2] if name == "dit" else PROMPTS


def run(
    teacher: Any, prompts: list[Any], steps: int, output_type: str = "latent"
) -> tuple[Tensor, Tensor, Any]:
    """A plain call of the pipeline: its noise, its last sample, and what it returns."""
    tracer, samples = teacher.pipeline.tracer, []
    pipeline = tracer.pipeline
    step = pipeline.scheduler.step

    def noted(output: Tensor, time: Any, sample: Tensor, *args: Any, **more: Any) -> Any:
        result = step(output, time, sample, *args, **more)
        samples.extend([sample, result[0]])
        return result

    options = {**tracer.options, **tracer.guidance, "output_type": output_type}
    options[tracer.asks] = list(prompts)  # Z-Image changes the list
    pipeline.scheduler.step = noted
    try:
        seed = torch.Generator().manual_seed(3)
        found = pipeline(num_inference_steps=steps, generator=seed, **options)[0]
    finally:
        del pipeline.scheduler.step
    return samples[0], samples[-1], found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_computes_what_the_pipeline_computes(teacher_of, name):
    teacher = teacher_of(name)
    assert teacher.conversion.points >= 10
    assert teacher.conversion.relative < 5e-5  # rounding of float32


@pytest.mark.parametrize("name", FAMILIES)
def test_our_solver_arrives_where_a_plain_call_of_the_pipeline_does(teacher_of, name, monkeypatch):
    """The whole run, which the reader never sees: other noise, other prompts, other levels."""
    teacher = teacher_of(name)
    pipeline = teacher.pipeline.tracer.pipeline
    monkeypatch.setattr(pipeline, "scheduler", first_order(pipeline))
    noise, theirs, _ = run(teacher, prompts_of(name), 5)
    grid = teacher.pipeline.grid(5)
    start = noise / teacher.path.alpha(teacher.path.t_of_rho(grid[0]))
    ours = solve(
        teacher, start.float(), grid, "euler", conditioning=teacher.pipeline.encode(prompts_of(name))
    ).y
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["stable-diffusion-3", "wan"])
def test_the_default_solver_samples_a_flow(teacher_of, name):
    """By default 18 steps of Heun; the pipeline's own steps, of Euler, lead to about the same samples."""
    teacher = teacher_of(name)
    told = teacher.pipeline.encode(prompts_of(name)[:2])
    fine = teacher.sample(2, conditioning=told, steps=300, solver="euler", decode=False)
    found, euler = (
        teacher.sample(2, conditioning=told, solver=solver, decode=False) for solver in ("heun", "euler")
    )
    assert (found - fine).square().mean() < (euler - fine).square().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_depend_on_their_own_prompt_alone(teacher_of, name):
    teacher = teacher_of(name)
    told = teacher.pipeline.encode(prompts_of(name))
    x, sigma = torch.randn(1, *teacher.shape).expand(3, *teacher.shape), torch.full((3,), 2.0)
    with torch.no_grad():
        x0 = teacher(x, sigma, told)
        alone = teacher(x[:1], sigma[:1], teacher.pipeline.encode(prompts_of(name)[:1]))
        null = teacher(x, sigma)
    assert (x0[0] - x0[1]).abs().max() > 1e-4
    if (
        name != "cogview4"
    ):  # it pads to the longest prompt without a mask, so that encodings depend on the batch
        assert (x0[:1] - alone).abs().max() < 1e-5
    assert (null[0] - null[1]).abs().max() < 1e-5
    if name != "dit":
        assert (null - teacher(x, sigma, teacher.pipeline.encode(["", "", ""]))).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_the_end_of_the_pipeline(teacher_of, name):
    """A plain call with pixels against the same call with latents, decoded."""
    teacher = teacher_of(name)
    _, latents, pixels = run(teacher, prompts_of(name)[:2], 2, "pt")
    theirs = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    ours = teacher.decoder.decode(latents)
    assert ours.shape == (2, *teacher.decoder.shape)
    assert (ours - (2 * theirs - 1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def seen(teacher_of):
    """What two pipelines compute, and their teachers."""
    names = ("stable-diffusion-xl", "stable-diffusion-3")
    return {name: (teacher_of(name), [teacher_of(name).pipeline.tracer.run(PROMPTS[:2])]) for name in names}


def altered(teacher: Any, **changes: Any) -> Any:
    """A copy that was read in another way."""
    other = copy.deepcopy(teacher)
    if "output" in changes:
        other.net.call = dataclasses.replace(other.net.call, output=changes.pop("output"))
    for name, value in changes.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stable-diffusion-3", {"output": "negated"}),
        ("stable-diffusion-3", {"time": TimeMap(1.0, 20.0, 1000.0)}),
        ("stable-diffusion-3", {"prediction": "v"}),
        ("stable-diffusion-xl", {"prediction": "v"}),
        ("stable-diffusion-xl", {"time": TimeMap(1.0, 20.0)}),
        ("stable-diffusion-xl", {"path": discrete_path(torch.linspace(0.999, 0.004, 1000))}),
    ],
)
def test_a_teacher_that_was_misread_is_refused(seen, name, changes):
    teacher, traces = seen[name]
    assert compare(teacher, traces).relative < 1e-5
    with pytest.raises(UserError, match="does not predict what the pipeline computes"):
        compare(altered(teacher, **changes), traces)


def test_the_conditioning_of_another_sample_is_seen_by_the_comparison(seen):
    teacher, traces = seen["stable-diffusion-3"]
    calls = []
    for call in traces[0].calls:
        arguments = {**call.arguments, "pooled_projections": call.arguments["pooled_projections"].flip(0)}
        calls.append(dataclasses.replace(call, arguments=arguments))
    with pytest.raises(UserError, match="does not predict"):
        compare(teacher, [dataclasses.replace(traces[0], calls=calls)])


@pytest.fixture
def folder(tmp_path):
    return save("stable-diffusion-3", tmp_path)


def edited(path: Any, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_folders_as_they_are_downloaded(folder, teacher_of):
    """Weights of half precision alone, pickles beside safetensors, a safety checker that is not read."""
    for weights in folder.glob("text_encoder*/model.safetensors"):
        weights.rename(weights.with_name("model.fp16.safetensors"))
        weights.with_name("pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    edited(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    teacher, plain = load_pipeline(folder, **SIZE["stable-diffusion-3"]), teacher_of("stable-diffusion-3")
    told, wanted = (t.pipeline.encode(PROMPTS) for t in (teacher, plain))
    assert all(torch.equal(told[name], wanted[name]) for name in wanted)


def only_pickled(folder: Any) -> None:
    weights = folder / "text_encoder_3" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "pipeline.py").write_text("raise SystemExit(3)"), "pipeline.py"),
        (lambda f: edited(f / "model_index.json", _class_name="MyPipeline"), "MyPipeline"),
        (lambda f: edited(f / "model_index.json", transformer=["mine", "Net"]), "mine.Net"),
        (lambda f: edited(f / "model_index.json", transformer=["diffusers", "Net"]), "Net"),
        (
            lambda f: edited(f / "model_index.json", transformer_2=["diffusers", "SD3Transformer2DModel"]),
            "_2",
        ),
        (lambda f: edited(f / "text_encoder" / "config.json", auto_map={"AutoModel": "m.M"}), "auto_map"),
        (lambda f: edited(f / "transformer" / "config.json", quantization_config={"bits": 4}), "quantized"),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2"),
        (only_pickled, "pickle"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"cut"), "text_encoder"),
        (lambda f: edited(f / "scheduler" / "scheduler_config.json", invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_what_would_run_code_or_is_not_complete_is_refused(folder, change, said):
    change(folder)
    with pytest.raises(UserError) as raised:
        load_pipeline(folder, **SIZE["stable-diffusion-3"])
    assert said in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_weights_that_are_not_finite_are_refused_with_their_tensors(folder, part, dtype):
    """A pipeline that computes NaN would be one that no contract explains."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(key for key, value in tensors.items() if value.ndim == 2)
    tensors[name][0, 0], tensors[name][1, :2] = float("nan"), float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="not finite") as raised:
        load_pipeline(folder, dtype=dtype, **SIZE["stable-diffusion-3"])
    assert f"{part} has weights" in str(raised.value)
    assert f"3 NaN or infinite: 3 in {name}" in raised.value.parts["got"]


def test_options_are_those_of_the_pipelines_call(folder):
    with pytest.raises(UserError, match="num_frames"):
        load_pipeline(folder, num_frames=3)
    with pytest.raises(UserError, match="multiples of"):
        load_pipeline(folder, height=17, width=16)
    with pytest.raises(UserError, match=r"images larger than 32 x 32.*256 16.*--size 32 or less"):
        load_pipeline(folder, height=256, width=16)


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_a_fixed_number_of_tokens_changes_no_prediction(teacher_of, name, tmp_path):
    """Zeros behind the tokens are hidden by a mask or cut off, so that guidance has prompts of one length."""
    plain = teacher_of(name)
    teacher = load_pipeline(save(name, tmp_path), tokens=40, **SIZE[name])
    x, sigma = torch.randn(3, *teacher.shape), torch.full((3,), 2.0)
    told = teacher.pipeline.encode(PROMPTS)
    with torch.no_grad():
        ours, theirs = teacher(x, sigma, told), plain(x, sigma, plain.pipeline.encode(PROMPTS))
        assert (ours - theirs).abs().max() < 1e-5
        guided = Guided(teacher, 3.0)(x, sigma, told)
        null = plain(x, sigma)
    assert (guided - (null + 3.0 * (theirs - null))).abs().max() < 1e-4
    with pytest.raises(UserError, match="fixed number of tokens"):
        load_pipeline(tmp_path / name, tokens=2, **SIZE[name])


def test_the_number_of_tokens_is_fixed_where_there_is_no_mask(folder):
    with pytest.raises(UserError, match="no mask"):
        load_pipeline(folder, tokens=40, **SIZE["stable-diffusion-3"])


def with_calls(trace: Any, change: Any) -> Any:
    calls = [dataclasses.replace(call, **change(i, call)) for i, call in enumerate(trace.calls)]
    return dataclasses.replace(trace, calls=calls)


def changed_arguments(**change: Any) -> Any:
    """Some arguments of all calls in another way, functions of step and value."""
    return lambda i, call: {
        "arguments": {**call.arguments, **{k: f(i, call.arguments.get(k)) for k, f in change.items()}}
    }


UNEXPLAINED = {
    "receives": lambda i, call: {"model_output": 2 * call.model_output},
    "is the scheduler's sample": lambda i, call: {"sample": call.sample.flip(0)},
    "no affine function": changed_arguments(timestep=lambda i, t: t**2),
    "differs within a batch": changed_arguments(timestep=lambda i, t: t + torch.arange(len(t))),
    "should be its time": changed_arguments(pooled_projections=lambda i, v: v + i),
    "has no row for each": changed_arguments(pooled_projections=lambda i, v: v[-1:]),
}


@pytest.mark.parametrize("words", UNEXPLAINED)
def test_what_no_contract_explains_is_refused_with_what_was_seen(teacher_of, words):
    tracer = teacher_of("stable-diffusion-3").pipeline.tracer
    traces = [tracer.run(PROMPTS[:2]), tracer.run(PROMPTS)]
    assert fit_contract(traces).sample == "hidden_states"
    traces = [with_calls(trace, UNEXPLAINED[words]) for trace in traces]
    with pytest.raises(UserError) as raised:
        fit_contract(traces)
    assert words in str(raised.value)
    assert raised.value.parts["got"]


def test_guidance_that_stays_on_is_refused(folder):
    with pytest.raises(UserError, match="cannot be turned off"):
        load_pipeline(folder, guidance_scale=5.0, **SIZE["stable-diffusion-3"])


def test_a_scheduler_that_does_not_show_clean_samples_is_refused(tmp_path):
    place = save("pixart-sigma", tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(place, local_files_only=True)
    options = {"prediction_type": "v_prediction", "skip_prk_steps": True}
    scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, **options)
    scheduler.save_pretrained(place / "scheduler")
    edited(place / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    with pytest.raises(UserError, match="does not show its clean samples"):
        load_pipeline(place, **SIZE["pixart-sigma"])
    assert load_pipeline(place, check=False, **SIZE["pixart-sigma"]).shape == (4, 8, 8)


def test_many_prompts_are_encoded_in_parts(teacher_of):
    pipeline = teacher_of("stable-diffusion-3").pipeline
    prompts = [PROMPTS[i % 3] for i in range(70)]
    told = pipeline.encode(prompts)
    assert told.batch_size == 70
    few = pipeline.encode(PROMPTS)
    for name in told:
        assert (told[name][66:69] - few[name]).abs().max() < 1e-5  # row 66 is the first prompt again
    ragged = teacher_of("qwen-image").pipeline
    with pytest.raises(UserError, match="tokens"):
        ragged.encode(["a cat"] * 64 + ["a small red cat runs in a house"])
