"""Moment matching: its gradient, its auxiliary loss, and noise from the posterior between two calls."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data.toys import toy
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.discrepancies.mmd import mmd
from distmatch.losses import edm_weight, moment_matching_loss, posterior_noise
from distmatch.methods.matching.moments import levels_between
from distmatch.methods.student import Student
from distmatch.training.packing import pack
from tests.helpers.draws import normal
from tests.helpers.small import batch, distiller, network_teacher


def test_the_auxiliary_denoiser_lies_half_way_between_samples_and_teacher() -> None:
    x0, teacher = normal(6, 2), normal(6, 2, seed=1)
    sigma = torch.linspace(0.1, 3.0, 6, dtype=torch.float64)
    middle = ((x0 + teacher) / 2).requires_grad_()
    (slope,) = torch.autograd.grad(
        moment_matching_loss(middle, x0, teacher, edm_weight(sigma, 0.5)).sum(), middle
    )
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * ((x0 - middle).square() + (teacher - middle).square()).mean(1)
    torch.testing.assert_close(moment_matching_loss(middle, x0, teacher, edm_weight(sigma, 0.5)), expected)


def test_at_the_optimum_the_gradient_is_half_of_that_of_the_reverse_kl() -> None:
    # Student N(m, s^2), teacher N(0, 1), both exact: D_q - D_p = 2 (g - D_p), so E[w (g - D_p) dx/dm] at
    # w = 1 / sigma^2 is half of d/dm KL(q_t || p_t) = m / (1 + sigma^2).
    m, s, sigma = 0.7, 0.6, 0.9
    teacher = GaussianMixture([1.0], [[0.0]], [1.0])
    student = GaussianMixture([1.0], [[m]], [s**2])
    x0 = m + s * normal(400_000, 1)
    z = x0 + sigma * normal(400_000, 1, seed=1)
    level = torch.full((len(z),), sigma, dtype=torch.float64)
    auxiliary = (student(z, level) + teacher(z, level)) / 2
    gradient = (auxiliary - teacher(z, level)) / sigma**2
    error = float(gradient.std() / math.sqrt(len(z)))
    assert abs(float(gradient.mean()) - 0.5 * m / (1 + sigma**2)) < 5 * error


@pytest.mark.parametrize("scaling", ["score", "dmd2"])
def test_one_step_of_one_call_is_diff_instruct_to_the_bit(scaling: Any) -> None:
    found = []
    for name in ("moment-matching", "diff-instruct"):
        method = distiller(network_teacher(3), method=name, scaling=scaling, fake_score_steps=1)
        state = method.init(0)
        with torch.no_grad():
            for parameter in state.fake_score.parameters():
                parameter.mul_(1.1)  # a fake score that is not the teacher
        method.step(state, batch(0, classes=3))
        found.append(state)
    one, two = (pack(s.student.denoiser.state_dict())[0] for s in found)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (pack(s.fake_score.state_dict())[0] for s in found)
    assert not all(torch.equal(one[name], two[name]) for name in one)  # it is drawn to the teacher


@pytest.mark.statistical
def test_posterior_noise_is_that_of_the_diffusion() -> None:
    # Of a pair z_s = x0 + s e, z_t = z_s + sqrt(t^2 - s^2) e' the law of z_s given z_t and x0 is known: draws
    # of it must have the joint moments of the pair itself.
    n, now, after = 400_000, 2.0, 0.8
    x0 = normal(n, 1)
    z_t = x0 + now * normal(n, 1, seed=1)
    sigma = torch.full((n,), after, dtype=torch.float64)
    z_s = x0 + after * posterior_noise(x0, z_t, now, sigma, normal(n, 1, seed=2))
    found = torch.cov(torch.cat([z_s - x0, z_t - x0], 1).T)
    expected = torch.tensor([[after**2, after**2], [after**2, now**2]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    # At its own level nothing is fresh.
    same = torch.full((n,), now, dtype=torch.float64)
    torch.testing.assert_close(x0 + now * posterior_noise(x0, z_t, now, same, normal(n, 1)), z_t)


def test_a_student_of_several_calls_draws_from_the_posterior() -> None:
    network = network_teacher()
    student = Student(network, (5.0, 2.0, 0.8), sampler="posterior")
    noise = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    x0 = student.call(student.start(noise[0]), 0)
    x = x0 + 2.0 * noise[1]  # the first input was noise alone: there is nothing to keep of it
    x0 = student.call(x, 1)
    sigma = torch.full((8,), 0.8)
    x = x0 + 0.8 * posterior_noise(x0, x, 2.0, sigma, noise[2])
    torch.testing.assert_close(student(noise), student.call(x, 2), rtol=1e-5, atol=1e-6)


def test_samples_of_a_call_are_compared_between_its_level_and_the_next() -> None:
    noise = Karras(0.02, 80.0)
    ends = [levels_between((5.0, 2.0, 0.8), call, noise) for call in range(3)]
    assert [(k.low, k.high) for k in ends] == [(2.0, 80.0), (0.8, 2.0), (0.02, 0.8)]
    assert levels_between((5.0,), 0, noise) == noise
    with pytest.raises(UserError, match="low < high"):
        distiller(network_teacher(), method="moment-matching", num_steps=3, noise_low=1.5)


@pytest.mark.parametrize("calls", [1, 3])
def test_parts_change_nothing_but_rounding(calls: int) -> None:
    found = []
    for parts in (1, 3):
        settings = {"num_steps": calls, "accumulate": parts, "fake_score_steps": 1, "grad_clip": 0.0}
        method = distiller(network_teacher(3), method="moment-matching", **settings)
        state = method.init(0)
        # Gradients, before Adam makes steps of one size of them.
        state.optimizers = {
            n: torch.optim.SGD(o.param_groups[0]["params"], 1e-3) for n, o in state.optimizers.items()
        }
        for step in range(3):
            method.step(state, batch(step, classes=3))
        found.append(pack(state.state_dict()["modules"])[0])
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    method = distiller(network_teacher(3), method="moment-matching", num_steps=3)
    whole, again = method.init(0), method.init(7)
    for step in range(6):
        if step == 3:
            again.load_state_dict(copy.deepcopy(whole.state_dict()))
        for state in (whole, again)[: 1 + (step >= 3)]:
            method.step(state, batch(step, classes=3))
    mine, theirs = pack(whole.state_dict())[0], pack(again.state_dict())[0]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_teacher_is_a_fixed_point() -> None:
    method = distiller(network_teacher(), method="moment-matching", num_steps=2, fake_score_steps=1)
    state = method.init(0)
    before = copy.deepcopy(state.student.denoiser.state_dict())
    info = method.step(state, batch(0))  # the fake score still is the teacher
    assert float(info["grad_dm"]) == 0
    assert all(torch.equal(v, before[k]) for k, v in state.student.denoiser.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 3])
def test_it_brings_a_student_close_to_the_data(calls: int) -> None:
    ring = toy("ring8")
    real = ring.sample(4000, seed=0)
    settings = {"num_steps": calls, "fit_steps": 150, "total_steps": 200, "lr": 1e-3, "lr_fake_score": 2e-3}
    method = distiller(ring, method="moment-matching", **settings)
    state = method.init(0, lambda n: (real[:n], None))
    before = mmd(method.result(state, {}).sample(2000), real, "energy").value
    for step in range(200):
        method.step(state, batch(step, n=128))
    after = mmd(method.result(state, {}).sample(2000), real, "energy").value
    assert after < 0.5 * before
