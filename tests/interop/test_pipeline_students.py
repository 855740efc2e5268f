"""From a pipeline of diffusers to a student of it: loading by folder, the command line, training, saving."""

from __future__ import annotations

import inspect
import tomllib
from dataclasses import replace

import diffusers
import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop import export_onnx
from distmatch.training.options import DistillOptions
from distmatch.training.prepare import prepare_distillation
from tests.helpers.command import command, done
from tests.helpers.pipelines import SIZE, save

PROMPTS = ["a red cat", "the dog sleeps", "a house", "a small tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("stable-diffusion-3", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def teacher(folder):
    return dm.load_teacher(folder, **SIZE["stable-diffusion-3"])


def test_a_folder_of_a_pipeline_with_prompts_is_traced(teacher):
    assert teacher.pipeline.contract.sample == "hidden_states"
    assert teacher.conversion.relative < 1e-5
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_doctor_prints_the_contract(folder):
    text = done(f"doctor --teacher {folder} --size 16").out
    for words in (
        "(4, 8, 8) as hidden_states",
        "pooled_projections (16) float32",
        "flow matching (condot)",
        "shift",
    ):
        assert words in text
    found = done(f"doctor --teacher {folder} --size 16 --json").json()
    assert found["shift"] == "3"
    assert "prompts" not in found
    assert found["null"] == "the prompt ''"


def test_doctor_says_where_prompts_have_no_one_length(tmp_path):
    line = f"doctor --teacher {save('qwen-image', tmp_path)} --size 16"
    text = done(line).out
    assert "--tokens N" in text
    assert "--encode live" in text
    assert "--encode live" not in done(f"{line} --tokens 40").out


@pytest.mark.parametrize(("name", "least"), [("flux", 4), ("qwen-image", 8)])
def test_sizes_that_a_pipeline_would_round_down_are_refused(name, least, tmp_path):
    folder = save(name, tmp_path)
    for size, near in ((1, least), (9, 8)):
        answer = command(f"doctor --teacher {folder} --size {size}")
        assert answer.code == 2
        assert f"multiples of {least}. Got: {size} {size}. Fix: --size {near} {near}" in answer.err
    done(f"doctor --teacher {folder} --size {2 * least}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("doctor --teacher ring8 --size 16", "height (--size), width for ring8"),
        ("distill --teacher ring8 --tokens 5 --out o", "tokens for ring8"),
        ("sample ring8 --frames 3", "num_frames (--frames)"),
        ("doctor --teacher {folder} --frames 3", "num_frames"),
        ("doctor --teacher {folder} --size 0", "--size is a height"),
        ("doctor --teacher {folder} --size 33", "multiples of 4. Got: 33 33. Fix: --size 32 32"),
        ("doctor --teacher {folder} --size 16 3", "Fix: --size 16 4"),
    ],
)
def test_sizes_are_for_pipelines(folder, line, said):
    answer = command(line.format(folder=folder))
    assert answer.code == 2
    assert said in answer.err


def test_doctor_describes_other_teachers_too():
    found = done("doctor --teacher ring8 --json").json()
    assert found["sample"] == "(2,)"


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("name", "factor"),
    [("stable-diffusion-3", 1000), pytest.param("stable-diffusion", 1, marks=pytest.mark.slow)],
)
def test_a_dry_run_shows_the_times_that_the_network_of_the_student_receives(name, factor, steps, tmp_path):
    """A flow with shift 3, and noise prediction at timesteps; options of other levels are left out."""
    place = save(name, tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    seen = []
    line = f"distill --teacher {place} --size 16 --prompts {tmp_path}/prompts.txt --method sid --batch 2"
    line += f" --steps 10 --num-steps {steps} --dry-run"
    found = done(f"{line} --json").json()
    teacher = dm.load_teacher(place, **SIZE[name])
    told = teacher.pipeline.encode(PROMPTS[:2])
    student = dm.distill(teacher, told, method="sid", num_steps=steps, steps=10, batch=2, quiet=True)
    network = next(m for m in student.denoiser.modules() if isinstance(m, diffusers.ModelMixin))

    def record(module, given, named):
        seen.append(
            float(inspect.signature(module.forward).bind(*given, **named).arguments["timestep"].max())
        )

    network.register_forward_pre_hook(record, with_kwargs=True)
    student.sample(2, conditioning=told, decode=False)
    assert found["times"] == pytest.approx([time / factor for time in seen], rel=1e-6)
    assert found["levels"] == list(student.sigmas)
    text = done(line).out
    plain = {(1000, 1): "1", (1000, 4): "1, 0.9, 0.75, 0.5", (1, 1): "999", (1, 4): "999, 749, 499, 249"}
    count = f"{steps} steps, at times" if steps > 1 else "1 step, at time"
    shift = ", shift 3" if factor == 1000 else ""
    assert f"# student     {count} {plain[factor, steps]}{shift}, noise " in text
    assert (
        not {"student_sigma", "noise_mean", "noise_std", "noise_rho"} & tomllib.loads(text)["distill"].keys()
    )


@pytest.mark.parametrize("method", ["diff-instruct", "sid"])
def test_a_student_is_distilled_from_prompts_alone(teacher, method, tmp_path):
    told = teacher.pipeline.encode(PROMPTS)
    student = dm.distill(teacher, told, method=method, steps=10, batch=2, guidance=2.0, lr=1e-3, quiet=True)
    before = [p.clone() for p in teacher.parameters()]
    x = student.sample(2, conditioning=told.index(slice(0, 2)), decode=False)
    assert x.shape == (2, 4, 8, 8)
    with torch.no_grad():
        start = student.denoiser(torch.zeros(2, 4, 8, 8), torch.full((2,), 5.0), told.index(slice(0, 2)))
        theirs = teacher(torch.zeros(2, 4, 8, 8), torch.full((2,), 5.0), told.index(slice(0, 2)))
    assert 0 < (start - theirs).abs().max() < 1  # it has moved, and not far
    assert all(torch.equal(p, q) for p, q in zip(before, teacher.parameters(), strict=True))
    images = student.sample(2, conditioning=told.index(slice(0, 2)))
    assert torch.equal(images, teacher.decoder.decode(x))

    student.save_pretrained(tmp_path / "student")
    for given in ({}, {"network": teacher}, {"base": teacher}):  # without: from where the teacher was
        again = dm.Student.from_pretrained(tmp_path / "student", **given)
        assert torch.equal(again.sample(2, conditioning=told.index(slice(0, 2)), decode=False), x)


def test_adapters_find_their_pipeline_again(teacher, tmp_path):
    told = teacher.pipeline.encode(PROMPTS)
    student = dm.distill(
        teacher, told, method="sid", steps=10, batch=2, lr=1e-3, train="lora", lora_rank=2, quiet=True
    )
    x = student.sample(2, conditioning=told.index(slice(0, 2)))
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")  # its base: the folder, at the same size
    assert torch.equal(again.sample(2, conditioning=told.index(slice(0, 2))), x)


def test_a_student_keeps_options_with_several_values(tmp_path):
    """Those of Flux2 choose layers of its text encoder."""
    teacher = dm.load_teacher(save("flux2", tmp_path), **SIZE["flux2"])
    dm.Student(teacher, (teacher.sigma_max,)).save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    assert again.denoiser.prompt_encoder.fingerprint == teacher.prompt_encoder.fingerprint
    teacher.loaded_from = None
    dm.Student(teacher, (teacher.sigma_max,)).save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="--base FOLDER, in Python base=, which takes the loaded teacher"):
        dm.Student.from_pretrained(tmp_path / "student")


@pytest.mark.slow
def test_a_student_is_a_graph_with_an_input_for_each_embedding(teacher, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = dm.Student(teacher, (5.0,))
    export_onnx(student, tmp_path / "graph")
    ready = runtime.InferenceSession(tmp_path / "graph/model.onnx", providers=["CPUExecutionProvider"])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        told = teacher.pipeline.encode(prompts)
        fed = {"noise": noise.numpy(), **{name: value.numpy() for name, value in told.items()}}
        results.append(torch.from_numpy(ready.run(["samples"], fed)[0]))
        with torch.no_grad():
            torch.testing.assert_close(results[-1], student(noise, told), rtol=0, atol=1e-4)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_prompts_are_no_data(teacher):
    told = teacher.pipeline.encode(PROMPTS)
    with pytest.raises(UserError, match="needs real data"):
        dm.distill(teacher, told, method="dmd2", steps=2, quiet=True)
    with pytest.raises(UserError, match="Got: text"):
        dm.distill(
            teacher, dm.Conditioning({"text": torch.zeros(2, 3)}), method="sid", steps=10, batch=2, quiet=True
        )
    with pytest.raises(UserError, match="cannot be drawn without data"):
        dm.distill(teacher, method="sid", steps=10, batch=2, quiet=True)


def test_batches_of_prompts_are_rows_by_seed_and_step(teacher):
    told = teacher.pipeline.encode(PROMPTS)
    base = DistillOptions.of("sid", "laptop")

    def drawn(seed: int, step: int) -> torch.Tensor:
        """The numbers of the prompts in a batch."""
        options = replace(base, run=replace(base.run, steps=10, batch=32, seed=seed))
        batch = prepare_distillation(options, teacher, told).batches(step)
        same = {n: (v[:, None] == told[n][None]).flatten(2).all(2) for n, v in batch.conditioning.items()}
        first, *others = same.values()
        assert all(torch.equal(first, other) for other in others)  # all fields of one prompt
        assert bool((first.sum(1) == 1).all())
        return first.long().argmax(1)

    assert set(drawn(0, 0).tolist()) == {0, 1, 2, 3}
    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 0), drawn(0, 1))
    assert not torch.equal(drawn(0, 0), drawn(1, 0))


def test_what_encode_refuses(teacher):
    with pytest.raises(UserError, match="list"):
        teacher.pipeline.encode("a red cat")
    with pytest.raises(UserError, match="list"):
        teacher.pipeline.encode([])
