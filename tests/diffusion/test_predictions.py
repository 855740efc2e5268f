"""The five predictions against their definitions, on every path and at pure noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import NoisePath, betas, discrete_path, noise_path, path_of, trigflow
from distmatch.diffusion.predictions import PREDICTIONS, Coefficients, convert, loss_weight
from distmatch.nets.edm import EDMDenoiser
from tests.helpers.draws import normal

PATHS = [noise_path(name) for name in ("vp", "sub-vp", "ve", "edm", "cosine", "condot", "trigflow")]
PATHS += [path_of(lambda t: 1 - t**2, lambda t: t, 1e-3, 0.999), discrete_path((1 - betas()).cumprod(0))]


def by_path(path: NoisePath) -> str:
    return path.name


def truth(x0: Tensor, eps: Tensor, c: Coefficients) -> dict[str, Tensor]:
    """All five from their definitions."""
    alpha, sigma, d_alpha, d_sigma = (expand(v, x0) for v in (c.alpha, c.sigma, c.d_alpha, c.d_sigma))
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "flow": d_alpha * x0 + d_sigma * eps,
        "score": -eps / sigma,
        "x": alpha * x0 + sigma * eps,
    }


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=by_path)
def test_every_prediction_becomes_every_other_and_comes_back(path: NoisePath, source: str) -> None:
    t = torch.linspace(path.t_min, path.t_max, 20, dtype=torch.float64)
    c = path.coefficients(t)
    all_five = truth(normal(20, 3, 2), normal(20, 3, 2, seed=1), c)
    # The smaller part of x is known to its rounding over the share of it: 1/alpha or 1/sigma roundings.
    share = torch.maximum(c.sigma / c.alpha, c.alpha / c.sigma)
    for target in PREDICTIONS:
        there = convert(all_five[source], source, target, all_five["x"], c)
        scale = expand(all_five[target].abs().amax((1, 2)) * share.clamp_min(1), there)
        torch.testing.assert_close(there / scale, all_five[target] / scale, rtol=0, atol=1e-14)
        back = convert(there, target, source, all_five["x"], c)
        scale = expand(all_five[source].abs().amax((1, 2)) * share.clamp_min(1), back)
        torch.testing.assert_close(back / scale, all_five[source] / scale, rtol=0, atol=1e-14)
        # Where data and noise are of one size, to 1e-12 outright.
        middle = (share < 100) & (share > 0.01)
        torch.testing.assert_close(
            there[middle],
            all_five[target][middle],
            rtol=1e-12,
            atol=float(1e-12 * all_five[target].abs().max()),
        )


@pytest.mark.parametrize("name", ["condot", "trigflow"])
def test_conversions_are_finite_at_pure_noise(name: str) -> None:
    path = noise_path(name)
    t = torch.full((8,), 1.0 if name == "condot" else math.pi / 2, dtype=torch.float64)
    c = path.coefficients(t)
    all_five = truth(normal(8, 2), normal(8, 2, seed=1), c)
    for source in ("x0", "v", "flow"):
        for target in PREDICTIONS:
            there = convert(all_five[source], source, target, all_five["x"], c)
            torch.testing.assert_close(there, all_five[target], rtol=1e-13, atol=1e-13)
    for source, target in (("eps", "score"), ("score", "eps")):
        there = convert(all_five[source], source, target, all_five["x"], c)
        torch.testing.assert_close(there, all_five[target], rtol=1e-13, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=by_path)
def test_a_loss_on_any_prediction_is_the_weighted_loss_on_x0(path: NoisePath, prediction: str) -> None:
    t = torch.linspace(path.t_min, path.t_max, 22, dtype=torch.float64)[1:-1]
    c = path.coefficients(t)
    x0, eps, wrong = normal(20, 3), normal(20, 3, seed=1), normal(20, 3, seed=2)
    all_five = truth(x0, eps, c)
    x = all_five["x"]
    guess = convert(x0 + wrong, "x0", prediction, x, c)
    loss = (guess - all_five[prediction]).square().sum(1)
    torch.testing.assert_close(loss, loss_weight(prediction, c) * wrong.square().sum(1), rtol=1e-9, atol=0)
    if path.name == "condot" and prediction == "flow":  # the x0 loss over t^2
        torch.testing.assert_close(loss_weight("flow", c), 1 / t**2)


def test_the_best_networks_for_normal_data_return_nothing() -> None:
    """For data N(0, sigma_data^2) the best EDM network is 0; TrigFlow is its negative for any data."""
    sd = 0.7
    teacher = GaussianMixture([1.0], [[0.0, 0.0]], [sd**2])
    path = trigflow(sd)
    sigma = torch.logspace(-2, 1.8, 20, dtype=torch.float64)
    x, t = normal(20, 2) * expand((sigma**2 + sd**2).sqrt(), normal(20, 2)), path.t_of_rho(sigma)
    edm = EDMDenoiser(torch.nn.Identity(), shape=(2,), num_classes=0, sigma_data=sd)
    inputs, _, c_skip, c_out = edm._preconditioned(x, sigma)
    network = (teacher(x, sigma) - c_skip * x) / c_out
    torch.testing.assert_close(network, torch.zeros_like(network), rtol=0, atol=1e-12)
    c = path.coefficients(t)
    flow = convert(teacher(x, sigma), "x0", "flow", x * expand(c.alpha, x), c)
    torch.testing.assert_close(flow, torch.zeros_like(flow), rtol=0, atol=1e-12)
    # Any other data: sd F_trig(cos(t) y / sd, t) = flow, and F_trig = -F_edm at the same input.
    other = GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [0.5, 1.0]], [0.1, 0.3])
    f_edm = (other(x, sigma) - c_skip * x) / c_out
    noised = x * expand(c.alpha, x)
    f_trig = convert(other(x, sigma), "x0", "flow", noised, c) / sd
    torch.testing.assert_close(f_trig, -f_edm, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(noised / sd, inputs, rtol=1e-12, atol=0)


def test_edm_weight_gives_the_network_unit_targets() -> None:
    sd, sigma = 0.5, torch.logspace(-2, 1.8, 7, dtype=torch.float64)
    edm = EDMDenoiser(torch.nn.Identity(), shape=(1,), num_classes=0, sigma_data=sd)
    x0, eps = sd * normal(7, 1), normal(7, 1, seed=1)
    _, _, c_skip, c_out = edm._preconditioned(x0 + expand(sigma, x0) * eps, sigma)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    torch.testing.assert_close(weight * c_out[:, 0] ** 2, torch.ones(7, dtype=torch.float64))
    # The target (x0 - c_skip x) / c_out is linear in x0 and eps, so its variance is the sum of squares.
    variance = ((1 - c_skip) * sd / c_out) ** 2 + (c_skip * expand(sigma, x0) / c_out) ** 2
    torch.testing.assert_close(variance, torch.ones_like(variance))


def test_the_dtype_of_the_prediction_is_kept_and_unknown_ones_are_refused() -> None:
    c = noise_path("vp").coefficients(torch.full((4,), 0.5))
    x = torch.randn(4, 2)
    assert convert(x, "eps", "x0", x, c).dtype == torch.float32
    assert convert(x, "v", "v", x, c) is x
    for source, target in (("epsilon", "x0"), ("x0", "epsilon")):
        with pytest.raises(UserError, match="unknown prediction"):
            convert(x, source, target, x, c)
    with pytest.raises(UserError, match="unknown prediction"):
        loss_weight("velocity", c)
