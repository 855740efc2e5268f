"""Weights, noise levels and learned uncertainty of the loss of a teacher."""

from __future__ import annotations

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.paths.kinetic import kinetic_path
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.diffusion.predictions import convert
from distmatch.losses import edm_weight, min_snr_weight, target_weight, uncertainty_loss
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.uncertainty import LearnedUncertainty
from distmatch.training.objective import build_objective, denoiser_loss
from distmatch.training.options import TeacherConfig
from distmatch.training.teacher import TeacherTraining

GAUSSIAN = GaussianMixture([1.0], [[0.4, -0.3]], [[0.49, 0.09]])

SIGMA_DATA = 0.54

NET = MLPConfig(width=32, depth=2)


def training(steps: int = 400, num_classes: int = 0, **settings: object) -> TeacherTraining:
    config = TeacherConfig(lr=3e-3, lr_rampup=20, ema_half_life=20.0, **settings)
    return TeacherTraining(config, NET, (2,), num_classes, SIGMA_DATA, steps, torch.device("cpu"))


def batch(step: int, n: int = 256, classes: int = 0) -> Batch:
    gen = torch.Generator().manual_seed(step)
    labels = torch.randint(classes, (n,), generator=gen) if classes else None
    return Batch(GAUSSIAN.sample(n, generator=gen), labels)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "score", "x0"])
def test_the_target_weight_is_the_plain_loss_of_the_prediction(prediction: str) -> None:
    path = noise_path("vp")
    gen = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2, 1.5, 16, dtype=torch.float64)
    x0, eps, error = torch.randn(3, 16, 4, generator=gen, dtype=torch.float64)
    c = path.coefficients(path.t_of_rho(sigma))
    x = c.over(x0).alpha * (x0 + sigma[:, None] * eps)
    plain = (
        (convert(x0 + error, "x0", prediction, x, c) - convert(x0, "x0", prediction, x, c)).square().mean(1)
    )
    torch.testing.assert_close(
        target_weight(prediction, path, sigma) * error.square().mean(1), plain, rtol=1e-9, atol=0
    )


def test_min_snr_stops_growing_at_gamma() -> None:
    sigma = torch.tensor([0.01, 0.44721, 0.4473, 2.0], dtype=torch.float64)
    expected = [5.0, 5.0, 0.4473**-2, 0.25]
    assert min_snr_weight(sigma, 5.0).tolist() == pytest.approx(expected, rel=1e-12)
    # On the VP path the eps and v losses get min(SNR, 5) / SNR and min(SNR, 5) / (SNR + 1).
    path, snr = noise_path("vp"), sigma**-2
    for prediction, usual in (("eps", snr), ("v", snr + 1)):
        ratio = min_snr_weight(sigma, 5.0) / target_weight(prediction, path, sigma)
        torch.testing.assert_close(ratio, snr.clamp_max(5) / usual, rtol=1e-9, atol=0)
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="gamma"):
            min_snr_weight(sigma, gamma)
    with pytest.raises(UserError, match="min-snr-gamma"):
        TeacherConfig(weighting="min-snr", min_snr_gamma=0)


def test_edm_stays_as_it_was() -> None:
    # Levels, then noise, then EDM's loss: the same numbers, to the bit, as before there was a choice.
    method = training(label_dropout=0.0)
    state = method.init(0)
    gen = torch.Generator()
    gen.set_state(state.generator.get_state())
    data = batch(0)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(256, generator=gen))
    noise, weight = torch.randn(data.x.shape, generator=gen), edm_weight(sigma, state.denoiser.sigma_data)
    expected = denoiser_loss(state.denoiser, data.x, sigma, noise, weight).mean()
    assert torch.equal(method.step(state, data)["loss"], expected.detach())
    assert "uncertainty" not in state.state_dict()


@pytest.mark.parametrize("spacing", ["uniform", "logit-normal"])
@pytest.mark.parametrize("name", ["vp", "condot"])
def test_levels_follow_the_time_of_the_path(name: str, spacing: str) -> None:
    path = noise_path(name)
    levels = PathLevels(path, 0.01, 50.0, spacing, 0.3, 0.8)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(levels.cdf(levels.quantile(u)), u, rtol=0, atol=1e-9)
    sigma = levels.sample(20000, torch.Generator().manual_seed(0)).double()
    assert float(sigma.min()) >= 0.01
    assert float(sigma.max()) <= 50.0
    worst = (levels.cdf(sigma).sort().values - torch.linspace(0, 1, 20000, dtype=torch.float64)).abs().max()
    assert float(worst) < 1.63 / math.sqrt(20000)  # Kolmogorov-Smirnov at 1%, seed 0
    if spacing == "uniform":
        start, end = path.t_of_rho(torch.tensor([0.01, 50.0], dtype=torch.float64))
        torch.testing.assert_close(path.t_of_rho(levels.quantile(u)), start + (end - start) * u)
    else:
        middle = torch.tensor([0.5], dtype=torch.float64)
        share = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
        start, end = path.t_of_rho(torch.tensor([0.01, 50.0], dtype=torch.float64))
        torch.testing.assert_close(path.t_of_rho(levels.quantile(middle))[0], start + (end - start) * share)


def test_learned_uncertainty_finds_the_log_loss_of_each_level() -> None:
    head = LearnedUncertainty()
    sigma = torch.logspace(-2, 1, 256)
    assert torch.equal(uncertainty_loss(torch.full((256,), 0.7), head(sigma)), torch.full((256,), 0.7))
    truth = 0.3 + sigma.log().cos()
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        uncertainty_loss(truth.exp(), head(sigma)).mean().backward()
        optimizer.step()
    assert float((head(sigma) - truth).detach().abs().max()) < 0.05
    # d/du (loss e^-u + u) = 1 - loss e^-u, by finite differences.
    u = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    loss = torch.tensor([2.0], dtype=torch.float64)
    torch.autograd.gradcheck(lambda v: uncertainty_loss(loss, v), (u,))


@pytest.mark.parametrize("name", ["vp", "sub-vp", "cosine", "condot", "trigflow", "kinetic-optimal"])
def test_no_loss_waits_for_the_device(name: str) -> None:
    # Tensors on the meta device have no values: reading one, as .item() or a branch does, raises.
    path = kinetic_path([0.8, 0.1, 0.4], 0.5) if name == "kinetic-optimal" else noise_path(name)
    objective = build_objective(TeacherConfig(path=name, prediction="flow"), 0.5, path)
    denoiser = objective.denoiser(build_net(NET, (2,), 0), (2,), 0).to("meta")
    x0, noise, sigma = (torch.empty(*shape, device="meta") for shape in ((4, 2), (4, 2), (4,)))
    loss = denoiser_loss(denoiser, x0, sigma, noise, objective.weight(sigma), data_noise=sigma)
    assert loss.device.type == "meta"
    loss.mean().backward()
