"""Compiled networks in a step: whole graphs, and none that is made again once all calls of a cycle were seen.

``fullgraph=True`` raises at anything that would break a graph; after the warm-up so does any new graph.
"""

from __future__ import annotations

import copy
import functools
import shutil
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.methods.construct import build
from distmatch.methods.context import Distiller
from distmatch.methods.state import DistillState
from distmatch.training.devices import check_compile_mode, compile_network, with_marked_steps
from distmatch.training.options import DistillOptions, RunOptions, TrainOptions
from distmatch.training.prepare import prepare_distillation
from distmatch.training.prepare_teacher import prepare_training
from tests.helpers.image_teachers import image_teacher, images
from tests.helpers.own_networks import Conv
from tests.helpers.small import network_teacher

ALL_CALLS = 10
"""Steps in which both calls of a two-step student came, with and without an update of it (seed 0)."""


@pytest.fixture
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs that are made; they run as captured unless a test asks for more."""
    backend = getattr(request, "param", "eager")
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no g++")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    return counter


def compiled(teacher: Any, **settings: Any) -> tuple[Distiller, DistillState]:
    """A two-step f-distill with a discriminator, its networks compiled as a run has them."""
    settings = {"num_steps": 2, "fake_score_steps": 2, "lr_rampup": 0, **settings}
    method: Any = build(teacher, "f-distill", total_steps=100, **settings)
    state = method.init(0)
    for net in (method.teacher, state.student.denoiser, state.fake_score):
        compile_network(getattr(net, "net", net))
    return method, state


def stays_compiled(
    teacher: Any, method: Distiller, state: DistillState, graphs: CompileCounterWithBackend
) -> None:
    """Runs steps: at first graphs are made, then none."""
    for step in range(ALL_CALLS):
        method.step(state, images(step, teacher))
    made = graphs.frame_count
    assert made >= 4  # features of the teacher; student and fake score with gradients and without
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(ALL_CALLS, ALL_CALLS + 6):
            info = method.step(state, images(step, teacher))
    assert graphs.frame_count == made
    assert bool(info["grad_norm_fake"] > 0)


LORA = {"train": "lora", "lora_rank": 2, "base_dtype": "bfloat16", "precision": "bf16"}


@pytest.mark.parametrize(
    ("net", "settings", "graphs"),
    [
        ("mlp", {"gan_weight": 0.1, "accumulate": 2, "precision": "bf16"}, "eager"),
        pytest.param("dit", LORA, "eager", marks=pytest.mark.slow),
        pytest.param("mlp", {"ratio_features": "fake"}, "eager", marks=pytest.mark.slow),
        pytest.param("unet", {}, "eager", marks=pytest.mark.slow),
        pytest.param("dit", {}, "eager", marks=pytest.mark.slow),
        pytest.param("diffusers", {}, "eager", marks=pytest.mark.slow),
        pytest.param("mlp", {"gan_weight": 0.1, "accumulate": 2}, "inductor", marks=pytest.mark.slow),
        pytest.param("unet", {}, "inductor", marks=pytest.mark.slow),
        pytest.param("dit", LORA, "inductor", marks=pytest.mark.slow),
    ],
    indirect=["graphs"],
)
def test_a_step_has_no_graph_breaks_and_no_new_graphs_after_warm_up(
    net: str, settings: dict[str, Any], graphs: CompileCounterWithBackend
) -> None:
    teacher = network_teacher(2) if net == "mlp" else image_teacher(net)
    stays_compiled(teacher, *compiled(teacher, **settings), graphs)


@pytest.mark.parametrize("net", ["unet", "own", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_passes_of_each_kind_are_whole_graphs_equal_to_eager_ones(
    net: str, graphs: CompileCounterWithBackend
) -> None:
    """A whole pass, one with features, and one for features alone, of networks of ours and of others."""
    teacher = image_teacher(net)
    if net == "own":
        options: dict[str, Any] = {"shape": (1, 8, 8), "sigma_data": 0.5, "features": ["first"]}
        teacher = dm.as_denoiser(Conv(), "vp", "eps", **options)
    again = copy.deepcopy(teacher)
    compile_network(again.net)
    given = images(0, teacher)
    inputs = (given.x, torch.ones(4), given.conditioning)
    with torch.no_grad():
        for kind in (False, True, "only"):
            torch.testing.assert_close(
                again(*inputs, return_features=kind), teacher(*inputs, return_features=kind)
            )
    assert graphs.frame_count == 3


@pytest.mark.parametrize(
    ("compiled", "mode", "device", "fix"),
    [
        (False, "reduce-overhead", "cuda", "add --compile"),
        (True, "max-autotune", "cpu", "use --compile alone"),
        (True, "reduce-overhead", "mps", "use --compile alone"),
    ],
)
def test_modes_that_would_do_nothing_are_refused(compiled: bool, mode: str, device: str, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        check_compile_mode(compiled, mode, torch.device(device))
    check_compile_mode(True, mode, torch.device("cuda"))
    check_compile_mode(compiled, "default", torch.device(device))


@pytest.mark.parametrize(("mode", "marks"), [("default", 0), ("reduce-overhead", 3), ("max-autotune", 3)])
def test_the_mode_reaches_the_compiler_and_its_steps_are_announced(
    mode: str, marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **given: seen.append(given["mode"]) or f)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("step"))
    compile_network(network_teacher().net, mode)
    step = with_marked_steps(lambda state, number: state + number, mode)
    assert [step(1, number) for number in range(3)] == [1, 2, 3]
    assert seen == [mode, *["step"] * marks]


def test_a_run_on_a_cpu_is_refused_before_it_begins() -> None:
    run = RunOptions(device="cpu", compile=True, compile_mode="reduce-overhead")
    with pytest.raises(UserError, match="CUDA graphs"):
        prepare_training(TrainOptions(run=run), load_data("ring8"))
    with pytest.raises(UserError, match="CUDA graphs"):
        prepare_distillation(DistillOptions(teacher="ring8", run=run))
