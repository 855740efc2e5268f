"""Data on a line: the slope of the ladder is the codimension, and noise makes maximum likelihood right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.instance_noise import blurred_log_prob, noise_ladder
from distmatch.diffusion.likelihood import log_likelihood
from distmatch.diffusion.mixture import GaussianMixture
from tests.helpers.draws import normal


@pytest.mark.statistical
@pytest.mark.parametrize(("plane", "whole"), [(1, 3), (2, 5)])
def test_the_slope_is_the_codimension(plane: int, whole: int) -> None:
    basis = torch.linalg.qr(normal(whole, plane))[0]
    teacher = GaussianMixture([1.0], torch.zeros(1, whole), (basis @ basis.T)[None])
    x = normal(2000, plane, seed=1) @ basis.T
    ladder = noise_ladder(lambda y, s: teacher.log_prob(y, s), x, [1e-3, 1e-2, 0.1])
    assert ladder.levels == (0.1, 1e-2, 1e-3)
    assert ladder.codimension.value == pytest.approx(whole - plane, abs=1e-3)
    # -E log p_s = d/2 log(2 pi e (1 + s^2)) + (D - d)/2 log(2 pi e s^2)
    for level, nll in zip(ladder.levels, ladder.nll, strict=True):
        unit = math.log(2 * math.pi * math.e)
        expected = plane / 2 * (unit + math.log(1 + level**2)) + (whole - plane) / 2 * (
            unit + 2 * math.log(level)
        )
        assert abs(nll.value - expected) < 4 * nll.stderr


def test_the_ladder_of_a_teacher_is_that_of_its_flow() -> None:
    teacher = GaussianMixture([1.0], [[0.0, 0.0]], [[0.5, 0.0]], sigma_max=40.0)
    x = torch.cat([0.7 * normal(40, 1), torch.zeros(40, 1)], 1)
    flow = noise_ladder(
        lambda y, s: log_likelihood(teacher, y, sigma=s, prior="moments", solver="rk5:96").log_prob,
        x,
        [0.05, 0.02],
    )
    exact = noise_ladder(lambda y, s: teacher.log_prob(y, s), x, [0.05, 0.02])
    for ours, truth in zip(flow.nll, exact.nll, strict=True):
        assert ours.value == pytest.approx(truth.value, abs=1e-3)
    assert flow.codimension.value == pytest.approx(1, abs=0.03)


def test_blurred_samples_are_the_blurred_law() -> None:
    law = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [0.5, 0.4]], [0.1, 0.2])
    samples, y = law.sample(100000, seed=1).double(), 0.7 * normal(64, 2)
    found = blurred_log_prob(samples, y, 0.5)
    torch.testing.assert_close(
        found, law.log_prob(y, 0.5), rtol=0, atol=0.05
    )  # 100000 samples: 1% near the tails
    # As if no chunk were cut, and with a gradient.
    few = samples[:50].requires_grad_()
    whole = torch.distributions.Normal(few[None], 0.5).log_prob(y[:, None]).sum(-1).logsumexp(1) - math.log(
        50
    )
    torch.testing.assert_close(blurred_log_prob(few, y, 0.5), whole)
    torch.testing.assert_close(blurred_log_prob(few.detach(), y, 0.5), whole.detach())
    torch.autograd.gradcheck(lambda v: blurred_log_prob(v, y[:3], 0.5), (few[:4].detach().requires_grad_(),))


def test_noise_on_the_data_makes_the_generator_right() -> None:
    # G(z) = width z along a line, fitted as G(z) * N(0, s^2): on blurred data it finds the width 0.5; on
    # clean data it finds sqrt(0.25 - s^2), so its distance W1 to the data is that much too large.
    s, z = 0.3, torch.special.ndtri((torch.arange(401, dtype=torch.float64) + 0.5) / 401)
    x = 0.5 * torch.special.ndtri((torch.arange(1500, dtype=torch.float64) + 0.5) / 1500)
    x = torch.stack([x, torch.zeros_like(x)], 1)[
        torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    ]
    w1 = {}
    for name, data in (("clean", x), ("blurred", x + s * normal(1500, 2, seed=1))):
        width = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([width], max_iter=20, line_search_fn="strong_wolfe")

        def loss(
            data: Tensor = data, width: Tensor = width, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            samples = torch.stack([width * z, torch.zeros_like(z)], 1)
            value = -blurred_log_prob(samples, data, s).mean()
            value.backward()
            return value

        optimizer.step(loss)
        w1[name] = abs(float(width.detach()) - 0.5) * math.sqrt(2 / math.pi)
    assert w1["clean"] == pytest.approx((0.5 - math.sqrt(0.25 - s**2)) * math.sqrt(2 / math.pi), abs=0.005)
    assert w1["blurred"] < 0.02 < w1["clean"] / 3


def test_refusals() -> None:
    x = normal(4, 2)
    for levels in ([0.1], [0.1, 0.0], [0.1, 0.1], [0.1, math.nan]):
        with pytest.raises(UserError, match="two or more different noise levels"):
            noise_ladder(lambda y, s: y.sum(1), x, levels)
    with pytest.raises(UserError, match="positive"):
        blurred_log_prob(x, x, 0.0)
    with pytest.raises(UserError, match="shape"):
        blurred_log_prob(x, normal(4, 3), 0.1)
