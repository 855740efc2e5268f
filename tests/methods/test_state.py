"""Stopping and going on is the same as never stopping; backward simulation trains what sampling runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import UNCONDITIONAL, as_conditioning
from distmatch.methods.matching.loop import Matching
from distmatch.methods.sampler import student_sigmas
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.training.checkpoint import load_checkpoint, save_checkpoint
from distmatch.training.packing import pack
from tests.helpers.small import PAIR, batch, distiller, network_teacher


def advance(method: Matching, state: DistillState, steps: int) -> None:
    for _ in range(steps):
        method.step(state, batch(state.step, method.teacher.num_classes))


def tensors(state: DistillState) -> tuple[dict[str, Tensor], Any]:
    return pack(state.state_dict())


def assert_equal(one: DistillState, two: DistillState) -> None:
    (mine, shape), (theirs, other) = tensors(one), tensors(two)
    assert shape == other
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, calls: int, classes: int) -> None:
    settings = {"num_steps": calls, "gan_weight": 0.1, "r1": 0.5, "lr_decay": "cosine", "weight_decay": 0.01}

    def method() -> Matching:
        return distiller(network_teacher(classes), "kl", **settings)

    whole = method().init(0)
    advance(method(), whole, 5)
    save_checkpoint(tmp_path, whole.step, whole.state_dict())
    kept = copy.deepcopy(whole.state_dict())
    advance(method(), whole, 6)
    step, tree = load_checkpoint(tmp_path)
    assert step == 5
    for source in (tree, kept):
        again = method().init(7)  # another seed: everything must come from the state
        again.load_state_dict(source)
        advance(method(), again, 6)
        assert_equal(again, whole)
    other = method().init(7)
    advance(method(), other, 11)
    with pytest.raises(AssertionError):
        assert_equal(other, whole)


@pytest.mark.parametrize("features", ["own", "fake"])
def test_resuming_needs_no_second_fit_to_an_exact_teacher(features: str) -> None:
    method = distiller(PAIR, "js", ratio_features=features, fit_steps=3)
    x0 = PAIR.sample(600, seed=0)
    whole = method.init(0, lambda n: (x0[:n], None))
    advance(method, whole, 3)
    again = method.init(0)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    for state in (whole, again):
        advance(method, state, 4)
    assert_equal(again, whole)


def test_a_state_of_another_network_is_refused() -> None:
    state = distiller(network_teacher(), "js").init(0)
    other = distiller(network_teacher(classes=3), "js").init(0)
    with pytest.raises(UserError, match="another architecture"):
        other.load_state_dict(state.state_dict())


def test_levels_of_a_student_fall_from_the_first() -> None:
    assert student_sigmas(1, 20.0, 0.5) == (20.0,)
    levels = student_sigmas(4, 80.0, 0.5)
    assert levels[0] == 80.0
    steps = torch.tensor([*levels, 0.002]).double() ** (1 / 7)  # even in sigma^(1/7), down to 0.002
    torch.testing.assert_close(
        steps.diff(), torch.full((4,), float(steps.diff().mean())).double(), rtol=1e-4, atol=0
    )


def test_backward_simulation_trains_every_call_about_equally_often() -> None:
    method = distiller(network_teacher(), "js", num_steps=4)
    state, seen = method.init(0), torch.zeros(4)
    for step in range(600):
        state.step = step
        called: list[int] = []
        state.student.call = lambda x, i, y=None, called=called: called.append(i) or x  # type: ignore[method-assign,assignment]
        method._call(state, *method._simulate(state, 1, UNCONDITIONAL), UNCONDITIONAL, False)
        assert called == list(range(len(called)))  # every call before the trained one is run
        seen[called[-1]] += 1
    assert (seen - 150).abs().max() < 5 * (600 * 0.25 * 0.75) ** 0.5


def test_backward_simulation_gives_what_sampling_gives_with_a_gradient_through_the_last_call_alone() -> None:
    method = distiller(network_teacher(3), "js", num_steps=4)
    state, labels = method.init(0), as_conditioning(torch.arange(16) % 3)
    lengths = set()
    for step in range(12):
        state.step = step
        again = torch.Generator()
        again.set_state(state.generator.get_state())
        inputs: list[tuple[Tensor, int]] = []
        call = Student.call.__get__(state.student)
        state.student.call = lambda x, i, y=None, f=call, s=inputs: s.append((x, i)) or f(x, i, y)  # type: ignore[method-assign,assignment]
        x0 = method._call(state, *method._simulate(state, 16, labels), labels, True)
        del state.student.call
        last = inputs[-1][1]
        noise = [torch.randn(16, 2, generator=again) for _ in range(last + 1)]
        with torch.no_grad():
            prefix = Student(state.student.denoiser, state.student.sigmas[: last + 1])
            assert torch.equal(prefix(noise, labels), x0)
            if last:
                before = Student(state.student.denoiser, state.student.sigmas[:last])(noise[:-1], labels)
                assert torch.equal(inputs[-1][0], before + state.student.sigmas[last] * noise[-1])
        assert not inputs[-1][0].requires_grad
        one_call = state.student.call(inputs[-1][0], last, labels)
        first = next(state.student.parameters())
        mine, theirs = (torch.autograd.grad(out.square().sum(), first)[0] for out in (x0, one_call))
        assert torch.equal(mine, theirs)
        lengths.add(last)
    assert lengths == {0, 1, 2, 3}
