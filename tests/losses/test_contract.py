"""What a loop of one's own relies on: losses by sample, their precision, gradients only where due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distmatch import losses
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.divergences import divergence

B, SD = 5, 0.7
SIGMA = torch.tensor([0.05, 0.3, 1.0, 4.0, 20.0], dtype=torch.float64)
JS = divergence("js")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Of each loss: what it is of tensors (a, b, c, d) of samples (B, 3), and those that learn from it.
CASES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], str]] = {
    "denoising": (lambda a, b, c, d: losses.denoising_loss(a, b.detach(), losses.edm_weight(SIGMA, SD)), "a"),
    "moment matching": (
        lambda a, b, c, d: losses.moment_matching_loss(a, b.detach(), c.detach(), SIGMA**-2),
        "a",
    ),
    "pairs": (lambda a, b, c, d: losses.pair_regression_loss(a, b.detach(), kind="huber"), "a"),
    "generator": (lambda a, b, c, d: losses.adversarial_generator_loss(a.sum(1)), "a"),
    "sid": (lambda a, b, c, d: losses.sid_loss(a, b, c, SIGMA), "abc"),
    "sim": (lambda a, b, c, d: losses.sim_loss(a, b, c, SIGMA), "abc"),
    "uni-instruct": (
        lambda a, b, c, d: losses.uni_instruct_loss(a, b, c, d, SIGMA, d.sum(1), JS),
        "abcd",
    ),
    "slope of log r": (lambda a, b, c, d: losses.log_ratio_slope(a, b, c, SIGMA), "c"),
    "consistency": (lambda a, b, c, d: losses.consistency_loss(a, b.detach(), SIGMA, SIGMA / 2, 0.1), "a"),
    "scm": (lambda a, b, c, d: losses.scm_loss(a, b.detach(), SIGMA, SD), "a"),
    "mean-flow": (lambda a, b, c, d: losses.mean_flow_loss(a, b.detach(), SIGMA, SD), "a"),
    "imm": (
        lambda a, b, c, d: losses.imm_loss(a[:, None], b[:, None].detach(), SIGMA, SIGMA / 3, SD),
        "a",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_one_of_each_sample_in_the_precision_of_its_input(name: str) -> None:
    loss, learners = CASES[name]
    inputs = [normal(B, 3, seed=seed).requires_grad_() for seed in range(4)]
    value = loss(*inputs)
    assert value.shape == (B,)
    assert value.dtype == torch.float64
    found = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    learned = {
        letter for letter, slope in zip("abcd", found, strict=True) if slope is not None and slope.any()
    }
    assert learned == set(learners)
    # Samples do not see each other.
    moved = [torch.cat([v[:1], 2 * v[1:]]) for v in inputs]
    torch.testing.assert_close(loss(*moved)[0], value[0])


@pytest.mark.parametrize("scaling", ["dmd2", "score"])
def test_the_score_difference_and_its_weight_carry_no_gradient(scaling: losses.matching.Scaling) -> None:
    p, q, x0 = (normal(B, 3, seed=seed).requires_grad_() for seed in range(3))
    weight = normal(B).square().requires_grad_()
    found = losses.score_difference(p, q, x0, SIGMA, weight, scaling=scaling)
    assert found.shape == (B, 3)
    assert not found.requires_grad
    assert not losses.difference_weight(p, x0, SIGMA, scaling).requires_grad


def test_gradients_that_are_no_loss_come_from_the_losses_that_the_page_names() -> None:
    x0 = normal(B, 3).requires_grad_()
    gradient = losses.score_difference(normal(B, 3, seed=1), normal(B, 3, seed=2), x0, SIGMA)
    (found,) = torch.autograd.grad((gradient * x0).mean(), x0)
    torch.testing.assert_close(found, gradient / gradient.numel())


def test_the_slope_of_the_log_ratio_is_that_of_the_densities() -> None:
    p = GaussianMixture([0.4, 0.6], [[-0.7, 0.1], [0.9, 0.0]], [0.5, 0.8])
    q = GaussianMixture([1.0], [[0.2, -0.3]], [1.3])
    x = normal(B, 2).requires_grad_()
    slope = losses.log_ratio_slope(p(x, SIGMA), q(x, SIGMA), x, SIGMA)
    assert not slope.any()
    (found,) = torch.autograd.grad(slope.sum(), x)
    (exact,) = torch.autograd.grad((p.log_prob(x, SIGMA) - q.log_prob(x, SIGMA)).sum(), x)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_scm_moves_the_network_s_output_along_the_bounded_tangent() -> None:
    f, tangent, x = normal(B, 3, seed=1).requires_grad_(), normal(B, 3, seed=2), normal(B, 3, seed=3)
    t = torch.atan(SIGMA / SD)[:, None]
    denoised = t.cos() * (t.cos() * x) - t.sin() * SD * f
    (found,) = torch.autograd.grad(losses.scm_loss(denoised, tangent, SIGMA, SD, c=0.2).sum(), f)
    wanted = -2 / 3 * tangent / (tangent.norm(dim=1, keepdim=True) + 0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_mean_flow_moves_the_average_velocity_against_its_error(power: float) -> None:
    u, error, x = normal(B, 3, seed=1).requires_grad_(), normal(B, 3, seed=2), normal(B, 3, seed=3)
    t = (SIGMA / (SIGMA + SD))[:, None]
    jump = x * (1 - t) - t * SD * u  # u = (x_t - g) / t in units of sigma_data, x_t = (1 - t) x
    loss = losses.mean_flow_loss(jump, error, SIGMA, SD, power=power)
    (found,) = torch.autograd.grad(loss.sum(), u)
    weight = (error.square().sum(1, keepdim=True) + 4e-3) ** -power
    torch.testing.assert_close(found, 2 * weight * error, rtol=1e-9, atol=1e-12)


def test_the_two_ends_of_the_identity_of_mean_flow() -> None:
    g, target, derivative = (normal(B, 3, seed=seed) for seed in range(3))
    t = (SIGMA / (SIGMA + SD))[:, None]
    at_home = losses.mean_flow_error(g, target, derivative, SIGMA, SIGMA, SD)
    torch.testing.assert_close(at_home, (target - g) / (t * SD))  # u - v
    at_data = losses.mean_flow_error(g, target, derivative, SIGMA, 0 * SIGMA, SD)
    torch.testing.assert_close(at_data, -derivative / (t * SD))


def test_the_adaptive_weight_makes_gradients_alike_and_stays_finite() -> None:
    main, other = normal(4, 6), 1e-2 * normal(4, 6, seed=1)
    scaled = losses.adaptive_weight(main, other) * other
    assert float(scaled.norm()) == pytest.approx(float(main.norm()), rel=1e-2)
    assert float(losses.adaptive_weight(main, 0 * other)) == 1e4


def test_the_levels_of_ctm_are_in_order() -> None:
    to, via = losses.ctm_levels(SIGMA, Karras(0.002, 80.0), 3 * losses.CTM_CELL, normal(B).abs().clamp_max(1))
    assert ((to >= 0) & (to <= via) & (via <= SIGMA)).all()


def test_every_function_is_documented_and_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/losses.md").read_text()
    for name in losses.__all__:
        if callable(getattr(losses, name)):
            assert f"`{name}`" in page, f"docs/losses.md does not name {name}"
            assert "(" in (getattr(losses, name).__doc__ or "")
