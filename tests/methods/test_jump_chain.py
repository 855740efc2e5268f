"""Students that jump from level to level: exact on a Gaussian, between following the path and fresh noise."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import jump
from distmatch.methods.hybrid import follower_of
from distmatch.methods.hybrid_schedule import HybridSchedule
from distmatch.methods.sampler import sampler_weights
from distmatch.methods.student import Student
from distmatch.nets.jump import as_jump
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import distiller, network_teacher
from tests.reference.consistency_truths import F64, Flow

LEVELS = (10.0, 1.5, 0.3)
V = 0.49


def exact(gamma: float, levels: tuple[float, ...] = LEVELS) -> Student:
    """The student whose network knows every jump of N(0, v)."""
    network: Any = Flow(V)
    return Student(network, levels, sampler="gamma", gamma=gamma)


def noise(n: int, draws: int = 3) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, generator=gen, dtype=F64) for _ in range(draws)]


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    found = as_jump(network_teacher(3))
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found.double()


def test_jumps_along_the_path_end_where_one_jump_does() -> None:
    z = noise(50)
    with torch.no_grad():
        several, one = exact(0.0)(z), exact(0.0, LEVELS[:1])(z[:1])
    torch.testing.assert_close(several, one)
    torch.testing.assert_close(one, z[0] * LEVELS[0] * (V / (V + LEVELS[0] ** 2)) ** 0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_states_on_the_way_have_the_spread_of_their_level(gamma: float) -> None:
    # x ~ N(0, v + t^2) at every level, here in coefficients: each state is a sum of a_i z_i.
    student = exact(gamma)
    squares = V + LEVELS[0] ** 2
    for index, (t, s) in enumerate(itertools.pairwise(LEVELS)):
        x = torch.full((1, 2), squares**0.5, dtype=F64)
        with torch.no_grad():
            there = student.advance(x, student.call(x, index), torch.zeros_like(x), index + 1)
        fresh = sampler_weights("gamma", t, s, gamma)[1]
        squares = float(there[0, 0]) ** 2 + fresh**2
        assert squares == pytest.approx(V + s**2, rel=1e-10)
        assert student.goal(index) == pytest.approx((1 - gamma**2) ** 0.5 * s)
    assert student.goal(len(LEVELS) - 1) == 0


def test_fresh_noise_alone_is_the_other_chain_to_the_bit() -> None:
    net, z, labels = network(), noise(20), torch.arange(20) % 3
    with torch.no_grad():
        jumped = Student(net, LEVELS, sampler="gamma", gamma=1.0)(z, labels)
        assert torch.equal(jumped, Student(net, LEVELS)(z, labels))


def test_a_chain_is_jumps_of_the_network() -> None:
    net, z, labels = network(), noise(20), torch.arange(20) % 3

    def level(sigma: float) -> Tensor:
        return torch.full((20,), sigma, dtype=F64)

    with torch.no_grad():
        x = 10.0 * z[0]
        x = jump(net, x, level(10.0), level(0.8 * 1.5), labels) + 0.6 * 1.5 * z[1]
        x = jump(net, x, level(1.5), level(0.8 * 0.3), labels) + 0.6 * 0.3 * z[2]
        x = jump(net, x, level(0.3), level(0.0), labels)
        student = Student(net, LEVELS, sampler="gamma", gamma=0.6)
        torch.testing.assert_close(student(z, labels), x)


def test_a_trained_student_jumps_and_keeps_its_share_of_noise(tmp_path: Path) -> None:
    for name in ("ctm", "mean-flow", "imm"):
        method = distiller(network_teacher(), method=name, num_steps=2, gamma=0.4)
        student = method.result(method.init(0), {"method": name})
        assert (student.sampler, student.gamma) == ("gamma", 0.4)
        student.save_pretrained(tmp_path / name)
        again = Student.from_pretrained(tmp_path / name)
        assert (again.sampler, again.gamma) == ("gamma", 0.4)
        assert_same_but_for_rounding(again.sample(16, seed=1), student.sample(16, seed=1))


def test_what_would_do_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="a one-step student"):
        distiller(network_teacher(), method="ctm", gamma=0.5)
    with pytest.raises(UserError, match=r"--gamma must be in \[0, 1\]"):
        distiller(network_teacher(), method="ctm", num_steps=2, gamma=1.5)


def test_the_student_goes_on_from_a_teacher_as_it_does_alone() -> None:
    student = Student(network(), LEVELS, sampler="gamma", gamma=0.5)
    way = HybridSchedule((10.0, 3.0, 1.5), (1.5, 0.3))
    follower = follower_of(student, way)
    assert (follower.sigmas, follower.sampler, follower.gamma) == ((1.5, 0.3), "gamma", 0.5)


@pytest.mark.parametrize(("spread", "start"), [(0.5, 7.0), (1.0, 14.0), (3.0, 42.0), (40.0, 80.0)])
def test_the_default_start_hides_wide_data(spread: float, start: float) -> None:
    teacher = network_teacher()
    teacher.sigma_data, teacher.sigma_max = spread, 80.0
    for name in ("consistency", "imm"):
        assert distiller(teacher, method=name).context.first_sigma == start
        assert distiller(teacher, method=name, student_sigma=1.5).context.first_sigma == 1.5 * spread
