"""The Fisher family's gradients are those of the divergences they are named after: SiD and SIM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import divergence
from distmatch.losses import sid_loss, sim_loss, uni_instruct_loss
from distmatch.losses.fisher import distance_slope
from tests.reference.exact_students import (
    GAUSSIAN,
    MIXTURE,
    PLANE,
    THETA_1D,
    THETA_2D,
    differences,
    expanded,
    grid,
    mean_and_gradient,
    scores,
    student,
)

# ------------------------------------------------------------------ SiD

# By m and s, for p = N(0, 1.3), q = N(0.4, s^2) at s = 0.9, sigma = 0.5, of |Delta|^2 of the denoisers.
SID = {
    0.0: (0.0100549, 0.005596, -0.021646),
    0.5: (0.0050274, 0.010406, -0.026649),
    1.0: (0.0, 0.015216, -0.031652),
    1.2: (-0.0020110, 0.017140, -0.033654),
}


@pytest.mark.parametrize("alpha", SID)
def test_golden_values_of_sid(alpha: float) -> None:
    mean, gradient = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=alpha, scaling="score"),
        GAUSSIAN,
        THETA_1D,
        0.5,
        40,
    )
    # Denoisers differ by sigma^2 times what scores do.
    values = torch.cat([mean[None], gradient]) * 0.5**4
    torch.testing.assert_close(values, torch.tensor(SID[alpha]).double(), rtol=0, atol=6e-7)


@pytest.mark.parametrize("sigma", [0.5, 1.4])
@pytest.mark.parametrize(("teacher", "theta"), [(MIXTURE, THETA_1D), (PLANE, THETA_2D)], ids=["1d", "2d"])
def test_sid_at_one_half_is_half_the_fisher_divergence(
    teacher: GaussianMixture, theta: Tensor, sigma: float
) -> None:
    _, mine = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=0.5, scaling="score"),
        teacher,
        theta,
        sigma,
        80 if len(theta) == 2 else 22,
    )
    true = 0.5 * differences(expanded(divergence("reverse_kl"), teacher, sigma), theta)
    assert (mine - true).norm() < 1e-5 * true.norm()
    assert true.norm() > 1e-3


def test_the_mean_of_sid_changes_sign_at_one() -> None:
    def mean(alpha: float) -> Tensor:
        return mean_and_gradient(
            lambda e: sid_loss(e.teacher, e.fake, e.x0, e.sigma, alpha=alpha, scaling="score"),
            MIXTURE,
            THETA_1D,
            0.5,
            80,
        )[0]

    fisher = expanded(divergence("reverse_kl"), MIXTURE, 0.5)(THETA_1D)
    for alpha in (0.0, 0.7, 1.0, 1.2):
        torch.testing.assert_close(
            mean(alpha), (1 - alpha) * fisher, rtol=2e-5, atol=1e-9
        )  # quadrature: 5e-6


# ------------------------------------------------------------------ SIM


def distance(y: Tensor, name: str, c: float) -> Tensor:
    """The distances as they are written in the docstring."""
    if name == "huber":
        return y.shape[1] * (y.square().mean(1) + c * c).sqrt()
    return y.square().sum(1) if name == "squared" else (y.square() + c * c).sqrt().sum(1)


@pytest.mark.parametrize("name", ["huber", "squared", "absolute"])
@pytest.mark.parametrize(("teacher", "theta"), [(MIXTURE, THETA_1D), (PLANE, THETA_2D)], ids=["1d", "2d"])
def test_sim_differentiates_the_student_s_score_alone(
    teacher: GaussianMixture, theta: Tensor, name: str
) -> None:
    sigma, c = 0.5, 0.3
    _, mine = mean_and_gradient(
        lambda e: sim_loss(e.teacher, e.fake, e.x0, e.sigma, distance=name, c=c, scaling="score"),  # type: ignore[arg-type]
        teacher,
        theta,
        sigma,
        80 if len(theta) == 2 else 22,
    )
    x, cell = grid(teacher.shape[0])
    held = student(theta).log_prob(x, sigma).exp()
    true = differences(
        lambda t: cell * (held * distance(scores(teacher, t, x, sigma)[2], name, c)).sum(), theta
    )
    # The square roots have poles at distance c from the real axis, where quadratures lose digits.
    assert (mine - true).norm() < (1e-5 if name == "squared" else 1e-3) * true.norm()
    assert true.norm() > 1e-2


def test_distances_have_the_slopes_that_are_written_down() -> None:
    y = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for name in ("huber", "squared", "absolute"):
        (slope,) = torch.autograd.grad(distance(y, name, 0.3).sum(), y)
        torch.testing.assert_close(distance_slope(y.detach(), name, 0.3), slope)  # type: ignore[arg-type]
    repeated = distance_slope(y.detach().repeat(1, 4), "huber", 0.3)  # c does not know the dimension
    torch.testing.assert_close(repeated[:, :5], distance_slope(y.detach(), "huber", 0.3))


def test_sim_with_the_squared_distance_is_twice_sid_at_one() -> None:
    teacher, fake, x0 = torch.randn(3, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 3, 6)
    for scaling in ("dmd2", "score"):
        sim = sim_loss(teacher, fake, x0, sigma, distance="squared", scaling=scaling)  # type: ignore[arg-type]
        sid = sid_loss(teacher, fake, x0, sigma, alpha=1.0, scaling=scaling)  # type: ignore[arg-type]
        torch.testing.assert_close(sim, 2 * sid)


# ------------------------------------------------------------------ common to all


@pytest.mark.parametrize("scaling", ["dmd2", "score"])
def test_a_fake_score_equal_to_the_teacher_leaves_no_gradient(scaling: str) -> None:
    _, first = mean_and_gradient(
        lambda e: sid_loss(e.teacher, e.teacher, e.x0, e.sigma, scaling=scaling),  # type: ignore[arg-type]
        MIXTURE,
        THETA_1D,
        0.5,
        20,
    )
    assert not first.any()
    for name in ("huber", "squared", "absolute"):
        _, zero = mean_and_gradient(
            lambda e, name=name: sim_loss(  # type: ignore[misc]
                e.teacher, e.teacher, e.x0, e.sigma, distance=name, scaling=scaling
            ),
            MIXTURE,
            THETA_1D,
            0.5,
            20,
        )
        # d'(y) is 0 to the bit; the two ways to D - D may round differently in the backward pass.
        assert zero.abs().max() < 1e-12
    for measure in (divergence(n) for n in ("kl", "reverse_kl", "js", "hellinger", "pearson", "neyman")):
        _, zero = mean_and_gradient(
            lambda e, f=measure: uni_instruct_loss(  # type: ignore[misc]
                e.teacher, e.teacher, e.x0, e.x, e.sigma, e.log_r, f, scaling=scaling
            ),
            MIXTURE,
            THETA_1D,
            0.5,
            20,
        )
        assert zero.abs().max() < 1e-12


def test_losses_of_half_precision_are_float32_and_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, fake, x0, x = torch.randn(4, 6, 2, generator=g).bfloat16()
    sigma, log_r = torch.linspace(0.1, 3, 6), torch.randn(6, generator=g)
    losses = (
        sid_loss(teacher, fake, x0, sigma),
        sim_loss(teacher, fake, x0, sigma),
        uni_instruct_loss(teacher, fake, x0, x, sigma, log_r, divergence("js")),
        sid_loss(teacher, fake, teacher, sigma),  # x0 where the teacher wants it: no division by 0
    )
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
