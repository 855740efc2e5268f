"""Uni-Instruct's three terms have the exact gradient of E_q[h(r) |s_p - s_q|^2], for every divergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import NAMES, Divergence, custom, divergence, divergence_1d
from distmatch.losses import sid_loss, sim_loss, uni_instruct_loss, weight_derivatives
from tests.reference.exact_students import (
    GAUSSIAN,
    MIXTURE,
    PLANE,
    THETA_1D,
    THETA_2D,
    Exact,
    differences,
    expanded,
    hermite,
    mean_and_gradient,
    scores,
    student,
)

OWN = custom(lambda r: (r - 1) ** 2 / (r + 3) + 0.2 * r * r.log(), "own")
ALL: list[Divergence] = [divergence(n) for n in (*NAMES, "alpha:0.5", "alpha:1.3") if n != "tv"] + [OWN]

# What the weights of the three terms are in closed form: h, h - r h', -r^2 h'', in our scale of each.
WEIGHTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "reverse_kl": lambda r: (r**0, r**0, 0 * r),
    "kl": lambda r: (r, 0 * r, 0 * r),
    "jeffreys": lambda r: (r + 1, r**0, 0 * r),
    "js": lambda r: (r / (r + 1) / 2, r**2 / (r + 1) ** 2 / 2, r**2 / (r + 1) ** 3),
    "softened_reverse_kl": lambda r: (
        1 / (r + 1),
        (2 * r + 1) / (r + 1) ** 2,
        -2 * r**2 / (r + 1) ** 3,
    ),
    "hellinger": lambda r: (r.sqrt() / 2, r.sqrt() / 4, r.sqrt() / 8),
    "pearson": lambda r: (2 * r**2, -2 * r**2, -4 * r**2),
    "neyman": lambda r: (2 / r, 4 / r, -4 / r),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_weights_are_those_of_the_table(name: str, dtype: torch.dtype) -> None:
    log_r = torch.linspace(-3, 3, 61, dtype=dtype)
    h, first, second = weight_derivatives(divergence(name), log_r)
    for mine, true in zip((h, h - first, -second), WEIGHTS[name](log_r.exp()), strict=True):
        torch.testing.assert_close(mine, true)
        assert mine.dtype == dtype
        assert not mine.requires_grad


def test_a_custom_divergence_has_the_weights_of_the_built_in_one() -> None:
    log_r = torch.linspace(-3, 3, 61, dtype=torch.float64)
    own = custom(lambda r: 0.5 * (r * r.log() - (r + 1) * ((r + 1) / 2).log()), "my js")
    for mine, true in zip(
        weight_derivatives(own, log_r), weight_derivatives(divergence("js"), log_r), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-9)


def uni(measure: Divergence, detached: bool = False) -> Callable[[Exact], Tensor]:
    def loss(e: Exact) -> Tensor:
        log_r = e.log_r.detach() if detached else e.log_r
        return uni_instruct_loss(e.teacher, e.fake, e.x0, e.x, e.sigma, log_r, measure, scaling="score")

    return loss


@pytest.mark.parametrize("measure", ALL, ids=str)
@pytest.mark.parametrize("sigma", [0.5, 1.4])
@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_uni_instruct_is_the_exact_gradient_in_1d(
    teacher: GaussianMixture, sigma: float, measure: Divergence
) -> None:
    _, mine = mean_and_gradient(uni(measure), teacher, THETA_1D, sigma, 110)
    true = differences(expanded(measure, teacher, sigma), THETA_1D)
    assert (mine - true).norm() < 1e-5 * true.norm()
    assert true.norm() > 1e-3


@pytest.mark.parametrize("name", ["kl", "js", "softened_reverse_kl", "own"])
def test_uni_instruct_is_the_exact_gradient_in_2d(name: str) -> None:
    measure = OWN if name == "own" else divergence(name)
    _, mine = mean_and_gradient(uni(measure), PLANE, THETA_2D, 0.5, 22)
    true = differences(expanded(measure, PLANE, 0.5), THETA_2D)
    assert (mine - true).norm() < 1e-5 * true.norm()


def test_a_detached_ratio_biases_the_spread_alone() -> None:
    exact, biased = (
        mean_and_gradient(uni(divergence("kl"), detached), GAUSSIAN, THETA_1D, 0.5, 80)[1]
        for detached in (False, True)
    )
    torch.testing.assert_close(exact[0], biased[0])
    assert float(exact[1]) == pytest.approx(-1.965, abs=5e-4)
    assert float(biased[1]) == pytest.approx(-1.489, abs=5e-4)


def test_reverse_kl_is_twice_sid_at_one_half_and_forward_kl_weighted_sim() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, fake, x0, x = torch.randn(4, 6, 1, 4, 4, generator=g)
    sigma, log_r = torch.linspace(0.1, 3, 6), torch.randn(6, generator=g)
    for scaling in ("dmd2", "score"):
        reverse, forward = (
            uni_instruct_loss(
                teacher,
                fake,
                x0,
                x,
                sigma,
                log_r,
                divergence(name),
                scaling=scaling,  # type: ignore[arg-type]
            )
            for name in ("reverse_kl", "kl")
        )
        half = sid_loss(teacher, fake, x0, sigma, alpha=0.5, scaling=scaling)  # type: ignore[arg-type]
        sim = sim_loss(teacher, fake, x0, sigma, distance="squared", scaling=scaling)  # type: ignore[arg-type]
        torch.testing.assert_close(reverse, 2 * half)
        torch.testing.assert_close(forward, log_r.exp() * sim)


# D_f(p_0||q_0) of the same two Gaussians. js and hellinger are given for other multiples than ours.
EXPANSION = {
    "reverse_kl": (1.0, 0.109620),
    "softened_reverse_kl": (1.0, 0.047962),
    "js": (2.0, 0.061657),
    "hellinger": (0.5, 0.032284),
    "kl": (1.0, 0.164692),
    "jeffreys": (1.0, 0.274311),
    "pearson": (1.0, 1.07055),
    "neyman": (1.0, 0.180576),
}


@pytest.mark.parametrize("name", EXPANSION)
def test_the_expansion_over_all_noise_levels_is_the_divergence(name: str) -> None:
    scale, golden = EXPANSION[name]
    measure = divergence(name)
    nodes, weights = np.polynomial.legendre.leggauss(48)
    total = torch.zeros((), dtype=torch.float64)
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        variance = 2.0 * u / (1 - u)  # all of (0, infinity); beyond every spread the integrand falls as v^-2
        level = math.sqrt(variance)
        x, mass = hermite(90, 1)
        spread = math.sqrt(0.81 + variance)
        _, log_r, delta = scores(GAUSSIAN, THETA_1D, 0.4 + spread * x, level)
        h = measure.weight(log_r)
        total = total + w * 2.0 / (1 - u) ** 2 * 0.5 * (mass * h * delta[:, 0].square()).sum()
    own = student(THETA_1D)
    value = divergence_1d(
        measure, lambda x: GAUSSIAN.log_prob(x[:, None]), lambda x: own.log_prob(x[:, None]), -25.0, 25.0, 64
    )
    assert scale * float(total) == pytest.approx(golden, rel=1e-4 if name == "pearson" else 2e-5)
    assert float(total) == pytest.approx(float(value), rel=1e-4 if name == "pearson" else 2e-5)
