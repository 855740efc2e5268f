"""Pipelines in bfloat16, and without their weights: against the same pipelines in float32."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.cli import memory
from distmatch.interop.pipelines import load_pipeline, skeleton
from distmatch.interop.pipelines.comparison import compare
from distmatch.interop.pipelines.contract import TimeMap
from distmatch.interop.pipelines.teacher import without_weights
from distmatch.training.options import DistillOptions
from distmatch.training.pipeline_options import PipelineOptions
from distmatch.training.prepare import prepare_distillation
from tests.helpers.command import done
from tests.helpers.pipelines import SIZE, save

# Flux rounds its time to bfloat16; Z-Image keeps its samples in float32, and lists them; Lumina2 looks at
# numbers to find its shapes.
NAMES = ("stable-diffusion-3", "flux", "z-image", "lumina2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")

    @cache
    def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
        place = folder / name
        place = place if place.exists() else save(name, folder)
        return place, load_pipeline(place, dtype=dtype, **SIZE[name])

    return load


def reading(teacher: Any) -> dict[str, Any]:
    """How a pipeline calls its network, without constants and dtypes."""
    found = teacher.pipeline.contract
    fields = {name: spec.shape for name, spec in found.fields.items()}
    names = ("sample", "sample_shape", "listed", "shape", "time", "time_shape", "lists", "numbers", "output")
    found = {name: getattr(found, name) for name in names}
    return found | {"fields": fields, "shift": round(teacher.shift, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_in_bfloat16_is_the_one_in_float32_but_for_rounding(made, name):
    plain, low = made(name)[1], made(name, "bfloat16")[1]
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    own, network = low.pipeline.tracer.pipeline, low.pipeline.tracer.network
    others = [p for p in own.components.values() if isinstance(p, torch.nn.Module) and p is not network]
    assert {p.dtype for part in others for p in part.parameters()} == {torch.float32}
    told, same = (t.pipeline.encode(["a red cat"]) for t in (low, plain))
    assert all(torch.equal(value, same[name]) for name, value in told.items())
    assert low.pipeline.fingerprint == plain.pipeline.fingerprint
    z = torch.randn(2, *plain.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(low.decoder.decode(z), plain.decoder.decode(z))
    x = torch.rand(2, *plain.decoder.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(low.decoder.encode(x), plain.decoder.encode(x))
    assert low.conversion.relative < 1e-2
    assert low.conversion.points >= 10
    assert reading(low) == reading(plain)
    ours, theirs = low.pipeline.times, plain.pipeline.times
    t = torch.linspace(0.05, 0.95, 7)
    torch.testing.assert_close(ours(t), theirs(t), rtol=1e-5, atol=1e-5)
    told = plain.pipeline.encode(["a red cat", "a small green tree"])
    x, sigma = torch.randn(2, *plain.shape), torch.tensor([0.1, 0.5])
    with torch.no_grad():
        x0, other = plain(x, sigma, told), low(x, sigma, told)
    assert other.dtype == torch.float32
    assert 0 < (x0 - other).abs().max() < 0.05 * x0.abs().max()
    image = low.decoder.decode(x)
    assert (image - plain.decoder.decode(x)).abs().max() < 0.1


def test_what_rounding_would_hide_is_refused_without_the_weights(made):
    """The time is off by 4 of 1000, and a shift of samples by 1/500: less than the last bits of bfloat16."""
    _, low = made("stable-diffusion-3", "bfloat16")
    _, plain = made("stable-diffusion-3")
    traces = [plain.pipeline.tracer.run(["a cat", "a dog"])]
    found = low.pipeline
    assert compare(low, traces, recorded=True).relative < 1e-5
    try:
        for times in (TimeMap(1.0, 4.0, 1000.0), TimeMap(1.004, 0.0, 1000.0)):
            found.times, kept = times, found.times
            with pytest.raises(UserError, match="would receive another 'timestep'"):
                compare(low, traces, recorded=True)
            found.times = kept
        found.contract, kept = dataclasses.replace(found.contract, output="negated"), found.contract
        with pytest.raises(UserError, match="does not predict"):
            compare(low, traces, recorded=True)
    finally:
        found.contract = kept


def test_without_weights_a_pipeline_is_read_the_same_and_needs_no_memory(made):
    folder, plain = made("flux")
    shapes = without_weights(folder, dtype="bfloat16", **SIZE["flux"])
    assert reading(shapes) == reading(plain)
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    assert {p.dtype for p in shapes.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in shapes.parameters()) == sum(p.numel() for p in plain.parameters())
    with pytest.raises(UserError, match="Lumina2"):
        without_weights(made("lumina2")[0], **SIZE["lumina2"])
    with pytest.raises(UserError, match=r"dtype of a pipeline.*float16"):
        load_pipeline(folder, dtype="float16")


@pytest.mark.slow
def test_adapters_on_a_base_in_bfloat16_are_trained_saved_and_loaded(made, tmp_path):
    folder, _ = made("stable-diffusion-3")
    size = PipelineOptions(size=(16,), max_tokens=12)
    options = DistillOptions.of("diff-instruct", teacher=str(folder), pipeline=size)
    settings = dataclasses.replace(
        options.settings, train="lora", base_dtype="bfloat16", lora_rank=2, fake_score_steps=1
    )
    options = dataclasses.replace(
        options, settings=settings, run=dataclasses.replace(options.run, steps=2, batch=2, device="cpu")
    )
    told = made("stable-diffusion-3")[1].pipeline.encode(["a red cat", "a house"])
    job = prepare_distillation(options, data=told)
    network = job.state.student.denoiser
    kinds = {p.dtype: p.requires_grad for p in network.parameters()}
    assert kinds == {torch.bfloat16: False, torch.float32: True}
    for step in range(2):
        info = job.step(job.state, job.batches(step))
    assert all(torch.isfinite(value).all() for value in info.values())
    moments = [m["exp_avg"] for m in job.state.optimizers["student"].state.values()]
    assert {m.dtype for m in moments} == {torch.float32}
    student = job.result()
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    assert {p.dtype for p in again.denoiser.parameters()} == {torch.bfloat16, torch.float32}
    x, other = (s.sample(2, conditioning=told, seed=3, decode=False) for s in (student, again))
    torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_dry_run_of_a_pipeline_reads_no_weights(made, tmp_path, monkeypatch):
    folder, _ = made("stable-diffusion-3")
    place = tmp_path / "sd3"
    shutil.copytree(folder, place)
    monkeypatch.setattr(memory, "LARGE", 0)
    for weights in place.glob("*/*.safetensors"):
        weights.write_bytes(b"")
    line = f"distill --teacher {place} --size 16 --max-tokens 12 --method diff-instruct --batch 2 --dry-run"
    found = done(f"{line} --train lora --base-dtype bfloat16 --json").json()["predicted"]
    sizes = found["sizes"]
    assert sizes["teacher"]["weights"] == 2 * sizes["teacher"]["parameters"] + 8 * 8 * 16 * 4  # and positions
    assert 0 < sizes["student"]["parameters"] < sizes["teacher"]["parameters"]
    assert found["peak"] == found["weights"] + found["optimizer"] + found["passes"]
    assert set(found["parts"]) == {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    text = done(line).out
    assert "read no weights" in text
    assert "predicted   fake: " in text
    assert "at the peak" in text


def test_shapes_are_computed_once_for_equal_shapes(tmp_path):
    """Other shapes, dtypes and plain arguments are computed anew; numbers are drawn for each call."""
    seen = []

    class Counted(diffusers.UNet2DModel):
        def forward(self, sample, timestep, return_dict=True):
            seen.append(tuple(sample.shape))
            return super().forward(sample, timestep, return_dict=return_dict)

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2}
    ends = {"in_channels": 1, "out_channels": 1, "sample_size": 8}
    diffusers.UNet2DModel(**ends, **sizes, **blocks).save_config(tmp_path)
    network, time = skeleton.without_weights(Counted, tmp_path), torch.tensor(1)
    first, again = (network(torch.ones(2, 1, 8, 8), time, return_dict=True).sample for _ in range(2))
    assert first.shape == again.shape == (2, 1, 8, 8)
    assert not torch.equal(first, again)
    assert network(torch.ones(3, 1, 8, 8), time).sample.shape == (3, 1, 8, 8)
    assert isinstance(network(torch.ones(2, 1, 8, 8), time, return_dict=False), tuple)
    network(torch.ones(2, 1, 8, 8), time.float())
    assert seen == [(2, 1, 8, 8), (3, 1, 8, 8), (2, 1, 8, 8), (2, 1, 8, 8)]
