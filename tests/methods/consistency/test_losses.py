"""Pairs, jumps and losses of the consistency family: solvers, levels, fixed points and gradients; float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.ranks import ALONE
from distmatch.diffusion.denoiser import jump
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.losses import ctm_levels, ect_lower_level, flow_speed, mean_flow_error, pseudo_huber
from distmatch.losses.tangents import bounded_tangent
from distmatch.methods.consistency.ctm import jumped
from distmatch.methods.consistency.direct import Draws
from distmatch.methods.consistency.pairs import teacher_path
from distmatch.methods.consistency.tangents import derivative_along
from distmatch.nets.jump import as_jump
from tests.helpers.small import distiller
from tests.reference.consistency_truths import (
    F64,
    NETS,
    SIGMA,
    Flow,
    network,
    noisy,
    posterior_mean,
    rectified,
    tangent_of,
)

# ------------------------------------------------------------------ CTM and pairs


def test_the_exact_jump_of_a_gaussian() -> None:
    """G = x sqrt((v + s^2) / (v + t^2)), and the limit of g at s = t is the posterior mean."""
    y, sigma = noisy(1.3)
    found = jump(Flow(1.3), y, sigma, 0.4 * sigma)
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], [1.3])
    assert torch.allclose(found, mixture.exact_map(y, sigma, 0.4 * sigma), rtol=1e-11)
    # The limit: an error of first order in the distance 1e-6, and rounding of 1e-16 / 1e-6.
    near = Flow(1.3)(y, sigma, target_sigma=(1 - 1e-6) * sigma)
    assert torch.allclose(near, posterior_mean(y, sigma, 1.3), rtol=1e-5, atol=1e-6)


def test_a_jump_may_start_where_it_ends_also_at_the_data() -> None:
    student = as_jump(network(*NETS[0]))
    y, zero = torch.ones(2, 2, dtype=F64), torch.zeros(2, dtype=F64)
    assert torch.equal(jumped(student, y, zero, zero, None), y)
    assert torch.equal(jumped(student, y, zero + 2, zero + 2, None), y)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_teacher_s_path_converges_at_the_order_of_its_solver(solver: Any, order: int) -> None:
    y, sigma = noisy(1.3)
    y, sigma = y[6:], sigma[6:]  # levels from 0.4 on: below, everything is exact to rounding
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], [1.3])
    to = 0.1 * sigma
    wanted = mixture.exact_map(y, sigma, to)
    errors = [
        (teacher_path(mixture, y, sigma, to, solver=solver, steps=steps) - wanted).norm()
        for steps in (16, 32)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0**order, rel=0.15)  # the next order at 1/16


def test_a_step_to_the_data_is_finite_beside_others() -> None:
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], [1.3])
    y, start, end = (
        torch.ones(2, 2, dtype=F64),
        torch.tensor([1.0, 1.0], dtype=F64),
        torch.tensor([0.0, 0.5], dtype=F64),
    )
    found = teacher_path(mixture, y, start, end, solver="heun")
    assert torch.allclose(found[0], posterior_mean(y, start, 1.3)[0])  # a single Euler step to 0 ends at D
    assert torch.allclose(found[1], teacher_path(mixture, y[1:], start[1:], end[1:], solver="heun")[0])


def test_levels_of_pairs() -> None:
    """At stage 0 low levels go to the data; later stages halve the distance; in units of sigma_data."""
    first = ect_lower_level(SIGMA, 0.5, 0)
    assert (first[:3] == 0).all()
    assert first[-1] == pytest.approx(40.0, rel=1e-12)  # 80 (1 - 1/2 (1 + 8 sigmoid(-80)))
    gaps = [SIGMA - ect_lower_level(SIGMA, 0.5, stage) for stage in (4, 5)]
    assert torch.allclose(gaps[0], 2 * gaps[1])
    assert torch.allclose(ect_lower_level(3 * SIGMA, 1.5, 3), 3 * ect_lower_level(SIGMA, 0.5, 3))
    # The closest that pairs come: 0.001 of the level (times the factor at high levels, 1).
    assert 1 - ect_lower_level(SIGMA, 0.5, 40)[-1] / 80 == pytest.approx(1e-3, rel=1e-6)


def test_pseudo_huber_is_a_square_and_then_a_norm() -> None:
    a = torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [0.0, 0.0]], dtype=F64, requires_grad=True)
    kept = pseudo_huber(a, torch.zeros_like(a), 0.1)
    distance = kept.detach()
    assert distance[0] == pytest.approx(math.sqrt(25.01) - 0.1)
    assert distance[1] == pytest.approx(25e-8 / 0.2, rel=1e-4)
    (slope,) = torch.autograd.grad(kept.sum(), a)
    assert torch.allclose(slope, a / (a.square().sum(1, keepdim=True) + 0.01).sqrt())
    (slope,) = torch.autograd.grad(pseudo_huber(a, torch.zeros_like(a), 0.0).sum(), a)
    assert torch.isfinite(slope).all()


@pytest.mark.statistical
def test_levels_of_jumps_are_in_order_and_reach_the_data() -> None:
    law = Karras(0.002, 80.0)
    g = torch.Generator().manual_seed(0)
    sigma = law.sample(20_000, g)
    share = torch.rand(20_000, generator=g)
    to, via = ctm_levels(sigma, law, 2 / 18, share)
    assert ((to >= 0) & (to <= via) & (via <= sigma)).all()
    crossed = law.cdf(sigma) - law.cdf(via)
    assert crossed.max() <= 2 / 18 + 1e-4
    far = (1 - share) * law.cdf(sigma) > 2 / 18 + 1e-3  # the jump goes further down than the solver
    torch.testing.assert_close(crossed[far], torch.full_like(crossed[far], 2 / 18), rtol=0, atol=1e-4)
    # With the paper's 17 of 18 cells the teacher goes all the way down to the level of the jump.
    _, near = ctm_levels(sigma, law, 17 / 18, share)
    down = torch.maximum(share, 1 - 17 / 18 / law.cdf(sigma)) * law.cdf(sigma)
    torch.testing.assert_close(law.cdf(near), down, rtol=0, atol=1e-4)
    # The chance of the data is E[min(1, (1/18) / U)] = (1 + ln 18) / 18 with U uniform; 4 standard errors.
    chance = (1 + math.log(18)) / 18
    assert float((to == 0).double().mean()) == pytest.approx(chance, abs=4 * math.sqrt(chance / 20_000))


@pytest.mark.statistical
def test_the_number_of_cells_that_ctm_crosses_is_drawn_as_published() -> None:
    method = distiller(GaussianMixture([1.0], [[0.0, 0.0]], [1.3]), method="ctm")
    state = method.init(0)
    found = []
    for state.step in range(2000):
        found.append(method.term.cells(state))
    # Uniform on 1 to 17: mean 9, standard deviation 4.9; 4 standard errors.
    assert set(found) == set(range(1, 18))
    assert abs(sum(found) / 2000 - 9) < 4 * 4.9 / 2000**0.5
    assert method.term.adversary is not None
    assert method.context.settings.gan_weight == 1


# ------------------------------------------------------------------ losses: fixed points and gradients


def state_of(student: nn.Module, step: int = 0, log_variance: float = 0.0) -> Any:
    weight = nn.Module()
    weight.forward = lambda sigma: torch.full_like(sigma, log_variance)  # type: ignore[method-assign]
    return SimpleNamespace(
        student=SimpleNamespace(denoiser=student), extra={"uncertainty": weight, "target": student}, step=step
    )


def draws_of(variance: float, n: int = 4) -> Draws:
    g = torch.Generator().manual_seed(3)
    sigma = torch.tensor([0.05, 0.4, 1.0, 5.0], dtype=F64).repeat(n)
    x0, noise = torch.randn(2, len(sigma), 2, generator=g, dtype=F64)
    tensors = {"x0": variance**0.5 * x0, "noise": noise, "sigma": sigma}
    return Draws({**tensors, "to": 0.4 * sigma, "via": 0.9 * sigma})


def gradient(loss: Tensor, student: Flow) -> float:
    return float(torch.autograd.grad(loss.sum(), student.gain)[0])


@pytest.fixture
def terms() -> Any:
    """Makes a term of a method on the exact teacher N(0, 1.3), its settings as keywords."""

    def make(method: str, **settings: Any) -> Any:
        teacher = GaussianMixture([1.0], [[0.0, 0.0]], [1.3], sigma_max=20.0)
        return distiller(teacher, method=method, **settings).term

    return make


def test_exact_students_are_fixed_points(terms: Any) -> None:
    """The gradient by a parameter that would spoil an exact student: 0 to rounding, and not 0 beside it."""
    draws = draws_of(1.3)
    for method, settings in (("scm", {"tangent_warmup": 0.0}), ("mean-flow", {"adaptive_power": 0.0})):
        term = terms(method, **settings)
        exact, wrong = Flow(1.3), Flow(1.3, gain=0.05)
        slope = gradient(term.loss(state_of(exact), draws)[0], exact)
        assert abs(slope) < 1e-9
        assert gradient(term.loss(state_of(wrong), draws)[0], wrong) > 1e-3  # and it leads back


@pytest.mark.parametrize("method", ["consistency", "ctm"])
def test_exact_students_are_fixed_points_up_to_the_solver(terms: Any, method: str) -> None:
    """The error of Heun's method falls fourfold with twice the steps, and with it the gradient."""
    draws, slopes = draws_of(1.3), []
    for steps in (8, 16):
        # A wide Huber constant: there the distance is a square, with a gradient in proportion to the error.
        term = terms(method, solver_steps=steps, huber=100.0)
        exact = Flow(1.3)
        state = state_of(exact, step=20)
        if method == "ctm":
            loss = pseudo_huber(
                term.reached(state, term.jump(state, draws), draws), term.wanted(state, draws, steps), term._c
            )
        else:
            loss, _ = term.loss(state, draws)
        slopes.append(abs(gradient(loss, exact)))
    assert slopes[0] < 1e-4
    assert slopes[0] / slopes[1] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("log_variance", [-1000.0, 0.0, 3.0])
@pytest.mark.parametrize("law", ["karras", "log-normal"])
def test_the_gradient_of_scm_is_the_bounded_tangent_s(terms: Any, law: str, log_variance: float) -> None:
    """-2/D w g / (|g| + c) dF/dtheta, with dF/dtheta by central differences; w = sigma_data / sigma or 1.

    The learned weight exp(-u) divides it by e^u + 1/8, where 1/8 is the loss of a tangent of length c.
    """
    term, draws, sd = terms("scm", tangent_warmup=0.0, level_distribution=law), draws_of(1.3), math.sqrt(1.3)
    student, sigma = Flow(1.3, gain=0.2), draws["sigma"]
    y = draws["x0"] + sigma[:, None] * draws["noise"]
    wanted = bounded_tangent(tangent_of(student, y, sigma, posterior_mean(y, sigma, 1.3), sd), 0.1)

    def output(gain: float) -> Tensor:
        t = torch.atan(sigma / sd)[:, None]
        return (t.cos() ** 2 * y - Flow(1.3, gain)(y, sigma)) / (sd * t.sin())

    change = (output(0.2 + 1e-6) - output(0.2 - 1e-6)) / 2e-6
    prior = sd / sigma if law == "log-normal" else torch.ones_like(sigma)
    slope = -(prior[:, None] * wanted * change).sum()  # 2 / D = 1 in two dimensions
    values, info = term.loss(state_of(student, log_variance=log_variance), draws)
    scale = math.exp(log_variance) + 1 / 8
    assert gradient(values, student) == pytest.approx(float(slope.detach()) / scale, rel=1e-7)
    # The value, before it is weighed, is |bounded g|^2, below 1, whatever the data.
    assert (((values - math.log(scale)) * scale * 2 / prior) < 1).all()
    assert (info["tangent"] > 0).all()


def test_the_gradient_of_mean_flow(terms: Any) -> None:
    """2 w error du/dtheta, with du/dtheta by central differences and the weight constant."""
    term, draws, sd = terms("mean-flow"), draws_of(1.3), math.sqrt(1.3)
    student, sigma, to = Flow(1.3, gain=0.2), draws["sigma"], draws["to"]
    y = draws["x0"] + sigma[:, None] * draws["noise"]
    target, speed = posterior_mean(y, sigma, 1.3), flow_speed(sigma, sd)
    value, derivative = derivative_along(
        student, y, sigma, (speed / sigma)[:, None] * (y - target), speed, to=to
    )
    error = mean_flow_error(value, target, derivative, sigma, to, sd)
    t = rectified(sigma, sd)[:, None]

    def velocity(gain: float) -> Tensor:
        return ((1 - t) * y - Flow(1.3, gain)(y, sigma, target_sigma=to)) / (t * sd)

    change = (velocity(0.2 + 1e-6) - velocity(0.2 - 1e-6)) / 2e-6
    weight = (error.square().sum(1) + 4e-3) ** -0.75
    slope = float(2 * (weight[:, None] * error * change).sum().detach())
    assert gradient(term.loss(state_of(student), draws)[0], student) == pytest.approx(slope, rel=1e-6)


@pytest.mark.statistical
def test_times_of_mean_flow_are_the_paper_s_in_the_paper_s_unit() -> None:
    """x_t = (1 - t) x0 + t eps with unit noise and data of 1/2: logit t has means -0.6 and -4, std 1.6."""
    teacher = GaussianMixture([1.0], [[0.0]], [0.25], sigma_min=1e-6, sigma_max=1e6)  # cuts no tails off
    term = distiller(teacher, method="mean-flow", student_sigma=0.0).term
    for levels, mean in ((term._levels, -0.6), (term._lower, -4.0)):
        stream = SimpleNamespace(generator=torch.Generator().manual_seed(0), ranks=ALONE)
        sigma = levels(20_000, stream).double()
        t = sigma / (1 + sigma)  # sigma = t / (1 - t) in that unit
        # 4 standard errors of 20,000 draws, seed 0.
        assert float(torch.logit(t).mean()) == pytest.approx(mean, abs=4 * 1.6 / 20_000**0.5)
        assert float(torch.logit(t).std()) == pytest.approx(1.6, abs=4 * 1.6 / 40_000**0.5)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_the_gradient_of_a_pair(terms: Any, source: str) -> None:
    """1 / (t - r) times the slope of the distance by its first argument only."""
    term, draws, sd = terms("consistency", consistency_from=source), draws_of(1.3), math.sqrt(1.3)
    student, sigma = Flow(1.3, gain=0.2), draws["sigma"]
    y = draws["x0"] + sigma[:, None] * draws["noise"]
    lower = ect_lower_level(sigma, sd, 4)  # step 20 of 40 in 8 stages
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], [1.3])
    below = draws["x0"] + lower[:, None] * draws["noise"]
    if source == "teacher":
        below = teacher_path(mixture, y, sigma, lower)
    fixed = student(below, lower).detach()
    c = 1e-3 * sd * math.sqrt(2)

    def loss(gain: float) -> Tensor:
        away = (Flow(1.3, gain)(y, sigma) - fixed).square().sum(1)
        return (1 / (sigma - lower) * ((away + c**2).sqrt() - c)).sum()

    slope = float((loss(0.2 + 1e-6) - loss(0.2 - 1e-6)).detach()) / 2e-6
    assert gradient(term.loss(state_of(student, step=20), draws)[0], student) == pytest.approx(
        slope, rel=1e-6
    )


def test_the_gradient_of_a_jump_flows_through_the_frozen_target(terms: Any) -> None:
    """By the student's own jump only: the target and the way on to the data have no part in it."""
    term, draws = terms("ctm"), draws_of(1.3)
    student, target = Flow(1.3, gain=0.2), Flow(1.3, gain=0.1).requires_grad_(False)
    state = state_of(student)
    state.extra["target"] = target
    y = draws["x0"] + draws["sigma"][:, None] * draws["noise"]
    wanted = term.wanted(state, draws, 1)

    def loss(gain: float) -> Tensor:
        reached = target(jump(Flow(1.3, gain), y, draws["sigma"], draws["to"]), draws["to"])
        return pseudo_huber(reached, wanted, term._c).sum()

    slope = float((loss(0.2 + 1e-6) - loss(0.2 - 1e-6)).detach()) / 2e-6
    found = pseudo_huber(term.reached(state, term.jump(state, draws), draws), wanted, term._c)
    assert gradient(found, student) == pytest.approx(slope, rel=1e-6)
