"""bfloat16 autocast and torch.compile change speed, not the result beyond rounding."""

import functools
import shutil

import pytest
import torch
import torch._dynamo.testing

from distmatch.data import load_data
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.options import DistillOptions, NetOptions, RunOptions, TrainOptions
from distmatch.training.prepare import prepare_distillation
from distmatch.training.prepare_teacher import prepare_training

NET = NetOptions(net="mlp", width=16, depth=1)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def teacher_after(steps: int, **run) -> EDMDenoiser:
    options = TrainOptions(net=NET, run=RunOptions(steps=steps, batch=32, device="cpu", **run))
    job = prepare_training(options, load_data("digits"))
    for step in range(steps):
        info = job.step(job.state, job.batches(step))
    assert torch.isfinite(info["loss"])
    return job.state.denoiser


def test_bf16_trains_like_fp32_and_keeps_float32_weights():
    exact, rough = teacher_after(20), teacher_after(20, precision="bf16")
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    difference = (weights(exact) - weights(rough)).norm() / weights(exact).norm()
    assert 0 < difference < 0.05  # bfloat16 has 8 bits; Adam's normalized steps carry the rounding over


def test_bf16_distillation_keeps_ratio_statistics_in_high_precision():
    teacher = teacher_after(5)
    run = RunOptions(steps=10, batch=32, device="cpu", precision="bf16")
    options = DistillOptions(data="digits", divergence="kl", run=run)
    job = prepare_distillation(options, teacher, load_data("digits"))
    for step in range(10):
        info = job.step(job.state, job.batches(step))
    assert all(total.dtype == torch.float64 for total in job.state.normalizer.state_dict().values())
    assert info["ess"].dtype == torch.float32
    assert all(torch.isfinite(v).all() for k, v in info.items() if v.ndim == 0)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # the graphs of forward and backward pass, run as they are
        pytest.param(  # compiles C++ for half a minute
            "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")]
        ),
    ],
)
def test_compiled_training_equals_eager(backend, monkeypatch):
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    eager, compiled = teacher_after(3), teacher_after(3, compile=True)
    assert list(eager.state_dict()) == list(compiled.state_dict())
    torch.testing.assert_close(weights(eager), weights(compiled), rtol=1e-3, atol=1e-4)
    assert graphs.frame_count > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_distillation_runs_on_an_accelerator():
    teacher = teacher_after(2)
    run = RunOptions(steps=10, batch=32, device="cuda", precision="bf16")
    job = prepare_distillation(DistillOptions(data="digits", run=run), teacher, load_data("digits"))
    for step in range(10):
        info = job.step(job.state, job.batches(step))
    assert info["ess"].device.type == "cuda"
