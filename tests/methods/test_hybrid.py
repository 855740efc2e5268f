"""Hybrid sampling and the picture of when a layout is decided, against closed forms on exact teachers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import initial_noise
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import CallCounter, Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, sample_teacher, solve
from distmatch.diffusion.trajectory import Trajectory, coarse, x0_trajectory
from distmatch.methods.hybrid import hybrid_sample
from distmatch.methods.hybrid_schedule import hybrid_schedule, stations
from distmatch.methods.student import Student
from distmatch.methods.transport.semi_discrete import BrenierMap
from distmatch.nets.jump import as_jump
from tests.helpers.small import PAIR, network_teacher

LEVELS = (20.0, 3.0, 0.8)  # of a student of three calls, below a teacher that starts at 20


class Rule(nn.Module):
    """A denoiser that is a rule, for students of which everything is known."""

    def __init__(self, teacher: Denoiser, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.zeros(()))  # tells the device
        self.shape, self.num_classes = teacher.shape, teacher.num_classes
        self.sigma_data, self.sigma_min = teacher.sigma_data, teacher.sigma_min
        self.sigma_max = teacher.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.rule(x, sigma)


def student_by(teacher: Any, rule: Callable[[Tensor, Tensor], Tensor], *levels: float) -> Student:
    return Student(Rule(teacher, rule), levels)  # type: ignore[arg-type]


def network_student(
    chain: Any = "stochastic", levels: tuple[float, ...] = LEVELS, classes: int = 2
) -> Student:
    return Student(network_teacher(classes), levels, sampler=chain)


# ------------------------------------------------------------------- the two ends, and the middle


@pytest.mark.parametrize("levels", [(20.0,), (2.5,), LEVELS])
@pytest.mark.parametrize("chain", ["stochastic", "ddim", "posterior"])
def test_without_the_teacher_it_is_the_student_to_the_bit(levels: tuple[float, ...], chain: str) -> None:
    student = network_student(chain, levels)
    alone = student.sample(50, seed=3, batch=16)
    assert torch.equal(hybrid_sample(PAIR, student, 50, calls=0, seed=3, batch=16), alone)


@pytest.mark.parametrize("levels", [(20.0,), (2.5,), LEVELS])
@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m", "ddim:1"])
def test_with_all_calls_it_is_the_teacher_to_the_bit(levels: tuple[float, ...], solver: str) -> None:
    student = network_student(levels=levels)
    labels = torch.arange(50) % 2
    alone = sample_teacher(PAIR, 50, steps=7, solver=solver, conditioning=labels, seed=3, batch=16)
    every = len(stations(PAIR, student))
    common: dict[str, Any] = {"steps": 7, "solver": solver, "conditioning": labels, "seed": 3, "batch": 16}
    assert torch.equal(hybrid_sample(PAIR, student, 50, calls=every, **common), alone)


def test_a_student_that_starts_below_the_teacher_is_handed_its_own_first_level() -> None:
    assert stations(PAIR, network_student(levels=(2.5,))) == (2.5, 0.0)
    assert stations(PAIR, network_student(levels=(20.0,))) == (0.0,)  # nothing above it for the teacher
    assert stations(PAIR, network_student()) == (3.0, 0.8, 0.0)
    way = hybrid_schedule(PAIR, network_student(levels=(2.5,)), grid("karras", 8, 0.002, 20.0))
    assert way.student_sigmas == (2.5,)
    assert way.teacher_levels[0] == 20.0
    assert way.teacher_levels[-1] == 2.5
    full = grid("karras", 8, 0.002, 20.0)
    assert way.teacher_levels[:-1] == tuple(full[full > 2.5].tolist())  # its own levels, cut where it stops


@pytest.mark.parametrize("chain", ["stochastic", "ddim", "posterior"])
def test_the_later_calls_are_those_of_the_student(chain: str) -> None:
    """The first station of a three-call student: the teacher to 3, then two calls on the student's noise."""
    student, levels = network_student(chain), grid("karras", 9, 0.002, 20.0)
    labels = torch.arange(40) % 2
    x = hybrid_sample(PAIR, student, 40, calls=1, grid=levels, conditioning=labels, seed=5)
    z = 20.0 * initial_noise(40, (2,), 5)
    y = solve(PAIR, z, [*levels[levels > 3].tolist(), 3.0], conditioning=labels).y
    full = torch.full((40,), 3.0)
    x0 = student.denoiser(y, full, labels)
    ratio = 0.8 / 3.0
    fresh = initial_noise(40, (2,), 5, "latents/2")
    y = {
        "stochastic": x0 + 0.8 * fresh,
        "ddim": x0 + ratio * (y - x0),
        "posterior": x0 + ratio**2 * (y - x0) + 0.8 * math.sqrt(1 - ratio**2) * fresh,
    }[chain]
    torch.testing.assert_close(x, student.denoiser(y, torch.full((40,), 0.8), labels).detach())


def test_samples_do_not_depend_on_the_batch() -> None:
    student = network_student()
    common: dict[str, Any] = {"calls": 2, "seed": 1, "solver": "ddim:1", "steps": 6}
    torch.testing.assert_close(
        hybrid_sample(PAIR, student, 30, batch=7, **common), hybrid_sample(PAIR, student, 30, **common)
    )


def test_a_guided_call_of_the_teacher_counts_twice() -> None:
    student = network_student()
    counter = CallCounter(Guided(PAIR, 2.0))
    levels = [20.0, 9.0, 3.0, 1.0, 0.0]
    hybrid_sample(
        counter, student, 10, calls=1, grid=levels, solver="heun", conditioning=torch.ones(10).long()
    )
    assert counter.calls == 2 * 2 * 2  # two steps to 3, two calls each, two networks a call


# ------------------------------------------------------------------- what it does, in closed form


@pytest.mark.statistical
def test_the_teacher_leaves_the_noised_law_at_the_handover() -> None:
    """Gaussian data and exact scores: the state that is handed over has the mean and variance of p_tau.

    n = 20000, seed 0: standard errors are 0.7 % of a standard deviation for means and 1 % for variances; the
    start without the data's own part of the variance costs 1e-3 of it at sigma 20.
    """
    teacher = GaussianMixture([1.0], [[0.7, -0.3]], [0.5], sigma_max=20.0)
    student = student_by(teacher, lambda x, sigma: x, 2.0)
    y = hybrid_sample(teacher, student, 20_000, calls=1, steps=40).double()
    variance = 0.5 + 2.0**2
    spread = math.sqrt(variance)
    # the start N(0, sigma_max^2) lacks the mean, of which s / sqrt(s^2 + sigma_max^2) is therefore missing
    missing = torch.tensor([0.7, -0.3]) * math.sqrt(variance / (0.5 + 400))
    torch.testing.assert_close(
        y.mean(0), torch.tensor([0.7, -0.3]).double() - missing, atol=4 * spread / 141, rtol=0
    )
    torch.testing.assert_close(y.var(0), torch.full((2,), variance).double(), atol=0, rtol=0.04)


TWO = GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], [0.01, 0.01], sigma_max=40.0)


def _decided_at_once(x: Tensor, sigma: Tensor) -> Tensor:
    """A student whose first call always takes the left mode, and whose later ones are exact."""
    return torch.where(sigma[:, None] > 5, torch.full_like(x, -3.0), TWO(x, sigma))


def test_variety_comes_back_where_the_first_call_lost_it() -> None:
    """Two modes at -3 and 3, noise 0.8 in between: the later call keeps the side that it is given."""
    student = student_by(TWO, _decided_at_once, 40.0, 0.8)
    alone = student.sample(4000)
    assert float((alone > 0).double().mean()) < 1e-3  # sqrt(0.8^2) is 3.7 deviations from the other side
    both = hybrid_sample(TWO, student, 4000, calls=1)
    assert float((both > 0).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    assert float(both.abs().mean()) == pytest.approx(3.0, abs=0.05)


def test_a_student_that_ignores_its_input_stays_collapsed() -> None:
    student = student_by(TWO, lambda x, sigma: torch.full_like(x, 3.0), 10.0)
    for calls in (0, 1):
        assert torch.equal(hybrid_sample(TWO, student, 100, calls=calls), torch.full((100, 1), 3.0))
    assert float(hybrid_sample(TWO, student, 100, calls=2).std()) > 2  # the teacher alone


# ------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("teacher", "student", "options", "said"),
    [
        (PAIR, network_student(), {"calls": 4}, "that many of this student's steps"),
        (PAIR, network_student(), {"calls": -1}, "that many of this student's steps"),
        (TWO, network_student(), {}, "another shape"),
        (PAIR, network_student(classes=0), {}, "another number of classes"),
        (PAIR, network_student(), {"level": 1.7}, "not trained to take over"),
        (PAIR, network_student(), {"level": math.nan}, "not trained to take over"),
        (PAIR, network_student(levels=(0.5,)), {}, "cannot take over"),
        (PAIR, network_student(), {"grid": [2.0, 1.0, 0.0]}, "no noise level above"),
        (PAIR, network_student(), {"solver": "rhoab:3", "grid": [20.0, 1.0, 0.0]}, "at least 4 steps"),
    ],
)
def test_what_a_student_cannot_follow(
    teacher: GaussianMixture, student: Student, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        hybrid_sample(teacher, student, 4, **options)


def test_a_teacher_without_a_gaussian_kernel_is_refused() -> None:
    teacher = network_teacher(2)
    teacher.pfgm_dims = 128.0
    with pytest.raises(UserError, match="same Gaussian noise"):
        hybrid_sample(teacher, network_student(), 4)


def test_a_consistency_function_takes_over_anywhere() -> None:
    teacher = network_teacher()
    jumping = Student(as_jump(teacher), (20.0,))
    levels = grid("karras", 9, 0.002, 20.0)
    x = hybrid_sample(teacher, jumping, 20, level=1.7, grid=levels, seed=2)
    y = solve(teacher, 20.0 * initial_noise(20, (2,), 2), [*levels[levels > 1.7].tolist(), 1.7]).y
    torch.testing.assert_close(x, teacher(y, torch.full((20,), 1.7)))  # untrained, the second level is idle
    with pytest.raises(UserError, match="not trained to take over"):
        hybrid_sample(teacher, jumping, 20, level=25.0)


def test_a_student_of_stored_latents_follows_a_teacher() -> None:
    """Its first input is noised data already, so a level below sigma_data is no reason to refuse."""
    bank = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    student = Student(network_teacher(2), (0.5, 0.2), None, "posterior", transport=BrenierMap(bank))
    alone = student.sample(20, seed=2)
    assert torch.equal(hybrid_sample(PAIR, student, 20, calls=0, seed=2), alone)
    x = hybrid_sample(PAIR, student, 20, calls=2, seed=2, conditioning=torch.arange(20) % 2, steps=9)
    levels = grid("karras", 9, 0.002, 20.0)
    y = solve(
        PAIR,
        20.0 * initial_noise(20, (2,), 2),
        [*levels[levels > 0.2].tolist(), 0.2],
        conditioning=torch.arange(20) % 2,
    ).y
    torch.testing.assert_close(x, student.denoiser(y, torch.full((20,), 0.2), torch.arange(20) % 2))
    assert hybrid_sample(PAIR, student, 20, calls=1, seed=2).shape == (20, 2)


def test_an_own_level_can_be_named() -> None:
    student = network_student()
    by_level = hybrid_sample(PAIR, student, 10, level=3.0)
    assert torch.equal(by_level, hybrid_sample(PAIR, student, 10, calls=1))


# ------------------------------------------------------------------- when the layout is decided


@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m", "ddim:1"])
def test_the_last_prediction_is_the_sample(solver: str) -> None:
    levels = grid("karras", 9, 0.002, 20.0)
    labels = torch.arange(30) % 2
    way = x0_trajectory(PAIR, 30, levels, solver, conditioning=labels, seed=4, batch=7)
    assert way.x0.shape == (9, 30, 2)
    torch.testing.assert_close(way.x0[-1], way.final, atol=1e-6, rtol=1e-5)
    alone = sample_teacher(PAIR, 30, grid=levels, solver=solver, conditioning=labels, seed=4)
    torch.testing.assert_close(way.final, alone)
    assert float(way.open_share()[0]) == 1
    assert float(way.open_share()[-1]) < 1e-9


def test_the_share_still_open_of_a_gaussian() -> None:
    """On the exact flow x0_hat = x s / sqrt(s^2 + sigma^2); Heun with 300 steps is within 1e-3 of it."""
    s, high = 0.6, 30.0
    teacher = GaussianMixture([1.0], [[0.0, 0.0]], [s**2], sigma_max=high)
    way = x0_trajectory(teacher, 50, grid("karras", 300, 0.002, high))
    kept = s / torch.sqrt(s**2 + way.levels**2)
    expected = ((1 - kept) / (1 - kept[0])).square()
    torch.testing.assert_close(way.open_share(), expected, atol=2e-3, rtol=0)
    for share in (0.5, 0.9):
        inside = 1 - (1 - s / math.sqrt(s**2 + high**2)) * math.sqrt(1 - share)
        level = s * math.sqrt(1 / inside**2 - 1)
        assert way.decided(share) == pytest.approx(level, rel=0.01)


def test_a_layout_is_decided_before_the_detail() -> None:
    """Tiles of a final image appear at sigma 4, its pixels within them at 1."""
    gen = torch.Generator().manual_seed(0)
    tiles = torch.randn(20, 1, 4, 4, generator=gen).repeat_interleave(2, 2).repeat_interleave(2, 3)
    detail = torch.randn(20, 1, 8, 8, generator=gen)
    detail = detail - coarse(detail).float().repeat_interleave(2, 2).repeat_interleave(2, 3)
    final = tiles + detail
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    way = Trajectory(levels, torch.stack([0 * tiles, tiles, tiles, final]), final)
    torch.testing.assert_close(
        way.open_share(layout=True), torch.tensor([1.0, 0, 0, 0]).double(), atol=1e-6, rtol=0
    )
    assert float(way.open_share()[1]) == pytest.approx(
        float(detail.square().mean() / final.square().mean()), rel=1e-5
    )
    assert way.decided(0.5) == pytest.approx(math.sqrt(8.0 * 4.0))  # half way in log sigma
    assert 1 < way.decided(0.9, layout=False) < 2


def test_decided_is_where_it_stays_decided() -> None:
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    final = torch.ones(3, 1)
    there_and_back = Trajectory(levels, torch.stack([0 * final, final, 0.5 * final, final]), final)
    assert 1 < there_and_back.decided(0.9) < 2
    settled = Trajectory(levels, torch.stack([final] * 4), final)
    assert settled.decided(0.9) == 8.0


# ------------------------------------------------------------------- the command line
