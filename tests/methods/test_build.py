"""A method for a loop of one's own: the same as a distillation, and refused where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import from_arrays
from distmatch.data.batches import Batch, Batches
from distmatch.nets.config import MLPConfig
from tests.helpers.small import batch, network_teacher

SETTINGS = {"fake_score_steps": 2, "lr_rampup": 0}


@pytest.mark.parametrize(
    ("method", "divergence", "settings"),
    [("f-distill", "kl", {"gan_weight": 0.1}), ("sid", None, {}), ("scm", None, {"lr_rampup": 0})],
)
def test_a_loop_of_one_s_own_is_the_distillation_to_the_bit(
    method: str, divergence: str | None, settings: dict[str, Any]
) -> None:
    teacher = network_teacher()
    data = from_arrays(0.7 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), None, name="x")
    settings = {**(SETTINGS if method != "scm" else {}), **settings}
    wanted = dm.distill(
        teacher, data, method=method, divergence=divergence, steps=6, batch=16, seed=3, quiet=True, **settings
    )
    own = dm.methods.build(teacher, method, divergence=divergence, total_steps=6, **settings)
    state = own.init(seed=3)
    batches = Batches(data, 16, 3)
    for step in range(6):
        info = own.step(state, batches(step))
    assert all(isinstance(value, torch.Tensor) for value in info.values())
    student = own.result(state)
    assert torch.equal(student.sample(32, seed=0), wanted.sample(32, seed=0))
    assert student.info == {}


def test_its_state_goes_on_elsewhere_to_the_bit() -> None:
    own = dm.methods.build(network_teacher(3), "dmd2", total_steps=8, **SETTINGS)
    whole, half = own.init(seed=0), own.init(seed=0)
    for step in range(8):
        own.step(whole, batch(step, 3))
    for step in range(4):
        own.step(half, batch(step, 3))
    again = own.init(seed=1)
    again.load_state_dict(half.state_dict())
    for step in range(4, 8):
        own.step(again, batch(step, 3))
    assert torch.equal(own.result(again).sample(8, seed=0), own.result(whole).sample(8, seed=0))


def test_the_teacher_does_not_change() -> None:
    teacher = network_teacher().requires_grad_(True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    own = dm.methods.build(teacher, "sid", total_steps=4, **SETTINGS)
    state = own.init(seed=0)
    for step in range(4):
        own.step(state, batch(step))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_method_without_data_reads_the_size_and_the_labels_of_a_batch() -> None:
    own = dm.methods.build(network_teacher(3), "diff-instruct", total_steps=4, **SETTINGS)
    assert not own.needs_data
    found = []
    for fill in (0.0, 5.0):
        state = own.init(seed=0)
        for _ in range(4):
            own.step(state, Batch(torch.full((16, 2), fill), torch.arange(16) % 3))
        found.append(own.result(state).sample(8, seed=0))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "f-destill"}, ["f-destill", "f-distill"]),
        ({"method": "sid", "gan_weight": 0.1}, ["--gan-weight", "sid", "sida"]),
        ({"method": "sid", "sid_alhpa": 1.0}, ["sid_alhpa", "sid_alpha"]),
        ({"method": "sid", "divergence": "js"}, ["js"]),
        ({"method": "dmd2", "lr": -1.0}, ["--lr", "-1"]),
        ({"method": "dmd2", "guidance": 2.0}, []),
        ({"method": "dmd2", "total_steps": 0}, ["total_steps must be", "0"]),
        ({"method": "dmd2", "student_sigma": 1e6}, ["--student-sigma"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        dm.methods.build(network_teacher(), **{"total_steps": 10, **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("method", ["f-distill", "sid", "consistency"])
def test_a_student_smaller_than_its_teacher_is_fitted_and_leaves_the_fake_score_a_copy(method: str) -> None:
    teacher, small = network_teacher(), MLPConfig(width=8, depth=1)
    own = dm.methods.build(teacher, method, total_steps=4, net=small, fit_steps=200)

    def draw(n: int) -> tuple[Tensor, None]:
        return torch.randn(n, 2), None

    state, untrained = own.init(seed=0, draw=draw), own.init(seed=0)
    x, sigma = torch.randn(512, 2, generator=torch.Generator().manual_seed(1)), torch.ones(512)
    wanted = teacher(x, sigma)
    far, near = ((s.student.denoiser(x, sigma) - wanted).square().mean() for s in (untrained, state))
    assert sum(p.numel() for p in state.student.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert near < far / 10, (near, far)
    if method != "consistency":
        fake: Any = state.fake_score
        assert torch.equal(fake(x, sigma), wanted)
        assert all(p.requires_grad for p in fake.parameters())
    own.step(state, batch(0))


def test_a_function_that_is_no_denoiser_is_refused() -> None:
    with pytest.raises(UserError):
        dm.methods.build(lambda x, sigma: x, total_steps=10)  # type: ignore[arg-type]
