"""Formulas of the consistency family against closed forms on Gaussians, the papers' own coordinates, and
central differences; float64, where agreement is to rounding unless a reason is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import jump
from distmatch.losses import flow_speed, mean_flow_error, trigflow_speed
from distmatch.losses.tangents import bounded_tangent
from distmatch.methods.consistency.tangents import derivative_along
from distmatch.nets.config import MLPConfig, NetConfig
from distmatch.nets.jump import as_jump
from tests.reference.consistency_truths import (
    F64,
    NETS,
    VARIANCES,
    Flow,
    network,
    noisy,
    posterior_mean,
    rectified,
    tangent_of,
)

# ------------------------------------------------------------------ sCM


@pytest.mark.parametrize(("sd", "variance"), VARIANCES)
def test_the_exact_consistency_function_has_no_tangent(sd: float, variance: float) -> None:
    """The tangent is 0 at rho = 1 for all t, also where sigma_data is not the data's."""
    y, sigma = noisy(variance)
    g = tangent_of(Flow(variance), y, sigma, posterior_mean(y, sigma, variance), sd)
    assert g.abs().max() < 1e-10
    wrong = tangent_of(Flow(variance, gain=0.1), y, sigma, posterior_mean(y, sigma, variance), sd)
    assert wrong[3:].abs().max() > 1e-2


def test_the_golden_network_output_of_standard_data() -> None:
    """With data of standard deviation sigma_data, F = -tan(t/2) x / sigma_data and f = x."""
    sd = 0.5
    y, sigma = noisy(sd**2)
    t = torch.atan(sigma / sd)[:, None]
    x = t.cos() * y
    assert torch.allclose(t.cos() * x + t.sin() * torch.tan(t / 2) * x, x, atol=1e-13)
    assert torch.allclose(Flow(sd**2)(y, sigma), x, atol=1e-13)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sd", [0.5, 0.9])
def test_the_tangent_is_the_paper_s_in_the_paper_s_coordinates(sd: float, rho: float) -> None:
    """g of sCM from F(x_t, t), its total derivative by central differences in (x_t, t), against ours."""
    torch.manual_seed(0)
    student, y, sigma = network(MLPConfig(width=16, depth=2), (2,)), *noisy(1.3)
    teacher = Flow(1.3, gain=-0.2)  # any field will do
    t = torch.atan(sigma / sd)

    def output(x: Tensor, t: Tensor) -> Tensor:
        c, s = t.cos()[:, None], t.sin()[:, None]
        return (c * x - student(x / c, sd * t.tan())) / (sd * s)

    c, s = t.cos()[:, None], t.sin()[:, None]
    x = c * y
    velocity = (c * x - teacher(y, sigma)) / s  # sigma_data F_teacher
    # A share of the distance to the ends of the angle: the error of second order and rounding are below 1e-6.
    h = 1e-4 * torch.minimum(t, math.pi / 2 - t)
    ahead, behind = (output(x + k * h[:, None] * velocity, t + k * h) for k in (1, -1))
    derivative = (ahead - behind) / (2 * h[:, None])
    wanted = -(c**2) * (sd * output(x, t) - velocity) - rho * c * s * (x + sd * derivative)
    ours = tangent_of(student, y, sigma, teacher(y, sigma), sd, rho)
    assert torch.allclose(sd * ours, wanted, rtol=1e-5, atol=1e-6)


def test_without_the_derivative_a_student_like_its_teacher_stays() -> None:
    """With rho = 0 a student like its teacher has g = 0."""
    y, sigma = noisy(1.3)
    student = Flow(1.3, gain=0.4)
    assert tangent_of(student, y, sigma, student(y, sigma), 0.5, rho=0.0).abs().max() == 0


def test_bounded_tangents_are_shorter_than_one() -> None:
    """From nothing to very much."""
    g = torch.randn(5, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([0.0, 1e-6, 0.1, 1.0, 1e6], dtype=F64)
    norms = bounded_tangent(
        g / g.flatten(1).norm(dim=1)[:, None, None, None] * sizes[:, None, None, None], 0.1
    )
    assert torch.allclose(norms.flatten(1).norm(dim=1), sizes / (sizes + 0.1), atol=1e-12)
    assert (norms.flatten(1).norm(dim=1) < 1).all()


def test_the_tangent_of_the_data_is_that_of_the_teacher_on_average() -> None:
    """The tangent is affine in the target, so its mean over x0 given y is the one at E[x0 | y]."""
    student, (y, sigma) = Flow(1.3, gain=0.3), noisy(1.3)
    mean = posterior_mean(y, sigma, 1.3)
    spread = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    pair = [tangent_of(student, y, sigma, mean + k * spread, 0.5) for k in (1, -1)]
    assert torch.allclose(
        (pair[0] + pair[1]) / 2, tangent_of(student, y, sigma, mean, 0.5), rtol=1e-9, atol=1e-9
    )


# ------------------------------------------------------------------ derivatives of networks


@pytest.mark.parametrize(("config", "shape"), NETS)
def test_forward_mode_agrees_with_central_differences(config: NetConfig, shape: tuple[int, ...]) -> None:
    """Attention included; both ways of ours, and a difference of its own step."""
    student = as_jump(network(config, shape, classes=3))
    for parameter in student.net.parameters():
        nn.init.normal_(parameter, std=(parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
    g = torch.Generator().manual_seed(2)
    sigma, labels = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=F64), torch.tensor([0, -1, 2, 1])
    x = torch.randn(4, *shape, generator=g, dtype=F64) * sigma.reshape(-1, *[1] * len(shape))
    dx, speed = torch.randn(4, *shape, generator=g, dtype=F64), trigflow_speed(sigma, 0.5)
    arguments = (student, x, sigma, dx, speed, labels, sigma / 3)
    value, exact = derivative_along(*arguments)
    middle, difference = derivative_along(*arguments, how="difference")
    scale = exact.abs().max()
    assert torch.allclose(value, student(x, sigma, labels, target_sigma=sigma / 3), rtol=0, atol=1e-12)
    assert (middle - value).abs().max() < 1e-8
    assert (exact - difference).abs().max() < 1e-6 * scale
    h = 3e-6 * (sigma / speed)
    wide = h.reshape(-1, *[1] * len(shape))
    ends = [
        student(x + k * wide * dx, sigma + k * h * speed, labels, target_sigma=sigma / 3) for k in (1, -1)
    ]
    assert (exact - (ends[0] - ends[1]) / (2 * wide)).abs().max() < 1e-6 * scale
    assert not exact.requires_grad


def test_forward_mode_in_bfloat16_training_is_that_of_float32() -> None:
    student = network(*NETS[1]).float()
    x, sigma = (
        torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.1, 1.0, 9.0]),
    )
    wanted = derivative_along(student, x, sigma, x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative_along(student, x, sigma, x, sigma)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_network_without_forward_mode_is_told_of_the_other_way() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    class Net(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return Own.apply(x)

    x, one = torch.ones(2, 3, dtype=F64), torch.ones(2, dtype=F64)
    with pytest.raises(UserError, match="--tangent difference"):
        derivative_along(Net(), x, one, x, one)
    _, slope = derivative_along(Net(), x, one, x, one, how="difference")
    assert torch.allclose(slope, x.cos(), atol=1e-9)


# ------------------------------------------------------------------ MeanFlow


@pytest.mark.parametrize(("sd", "variance"), VARIANCES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_exact_average_velocity_satisfies_the_identity(sd: float, variance: float, share: float) -> None:
    """For data of any variance: u = x_t (1 - std_r / std_t) / (t - r), and v at r = t."""
    y, sigma = noisy(variance)
    to, exact = share * sigma, Flow(variance)
    target, speed = posterior_mean(y, sigma, variance), flow_speed(sigma, sd)
    slope = (speed / sigma)[:, None] * (y - target)
    if share == 1:  # dg/dt is not read there; that of the closed form is 0/0
        value, derivative = exact(y, sigma, target_sigma=sigma), torch.zeros_like(y)
    else:
        value, derivative = derivative_along(exact, y, sigma, slope, speed, to=to)
    assert mean_flow_error(value, target, derivative, sigma, to, sd).abs().max() < 1e-9
    wrong = mean_flow_error(value, target, derivative + 0.1 * value, sigma, to + 0.01 * sigma, sd)
    assert wrong.abs().max() > 1e-3
    t, r = rectified(sigma, sd)[:, None], rectified(to, sd)[:, None]
    x = (1 - t) * y
    if share < 1:
        std_t, std_r = (((1 - a) ** 2 * variance + (a * sd) ** 2).sqrt() for a in (t, r))
        assert torch.allclose((x - value) / t, x * (1 - std_r / std_t) / (t - r), rtol=1e-9)


@pytest.mark.parametrize("sd", [1.0, 0.6])
def test_the_identity_in_the_paper_s_coordinates(sd: float) -> None:
    """u - (v - (t - r) du/dt) with du/dt by central differences of u(x_t, r, t), r fixed."""
    student, (y, sigma) = as_jump(network(*NETS[0])), noisy(1.3)
    nn.init.normal_(student.net.trunk.conditioning.to_level.weight, std=0.2)
    to, target = 0.3 * sigma, posterior_mean(y, sigma, 0.7)
    t, r = rectified(sigma, sd), rectified(to, sd)
    x = (1 - t)[:, None] * y
    v = (x - target) / t[:, None]

    def u(x: Tensor, t: Tensor) -> Tensor:
        level = sd * t / (1 - t)
        return (x - student(x / (1 - t)[:, None], level, target_sigma=to)) / t[:, None]

    h = 1e-5 * torch.minimum(t, 1 - t)
    change = (u(x + h[:, None] * v, t + h) - u(x - h[:, None] * v, t - h)) / (2 * h[:, None])
    wanted = u(x, t) - (v - (t - r)[:, None] * change)
    speed = flow_speed(sigma, sd)
    slope = (speed / sigma)[:, None] * (y - target)
    value, derivative = derivative_along(student, y, sigma, slope, speed, to=to)
    ours = sd * mean_flow_error(value, target, derivative, sigma, to, sd)
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_a_jump_is_a_step_of_the_average_velocity() -> None:
    """x_r = x_t - (t - r) u on the straight path is the jump of the denoisers' frame."""
    student, (y, sigma) = as_jump(network(*NETS[0])), noisy(1.3)
    to = 0.3 * sigma
    t, r = rectified(sigma, 0.5)[:, None], rectified(to, 0.5)[:, None]
    x = (1 - t) * y
    u = (x - student(y, sigma, target_sigma=to)) / t
    assert torch.allclose(x - (t - r) * u, (1 - r) * jump(student, y, sigma, to), rtol=1e-12, atol=1e-13)
