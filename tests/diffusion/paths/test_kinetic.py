"""Kinetic-optimal paths: the closed form against quadrature, bounds, estimates from data and teachers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data import from_arrays
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import NoisePath, condot, path_of
from distmatch.diffusion.paths.kinetic import (
    kinetic_path,
    kinetic_path_of,
    least_energy,
    losses_of_data,
    losses_of_teacher,
)
from distmatch.diffusion.paths.specs import parse_path, path_from_dict, path_to_dict
from distmatch.nets.saved import load_model, save_model
from distmatch.training.options import NetOptions, RunOptions, TeacherConfig, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from tests.helpers.rounding import assert_same_but_for_rounding

MODE = math.sqrt(0.95)
PAIR = GaussianMixture([0.5, 0.5], [[-MODE], [MODE]], [0.05, 0.05], sigma_min=1e-4, sigma_max=1e4)


def _interpolate(values: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Linear between values at angles that are even from 0 to pi/2."""
    place = angle.clamp(0, math.pi / 2) * ((len(values) - 1) / (math.pi / 2))
    left = place.floor().long().clamp(0, len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


def exact_losses(angles: int) -> Tensor:
    """L of the pair, by quadrature over x: (1 - E D^2) (1 + rho^2) / rho^2."""
    rho = torch.linspace(0, math.pi / 2, angles, dtype=torch.float64).tan().abs().clamp(1e-4, 1e4)
    found = []
    for level in rho.tolist():
        x = torch.linspace(-1, 1, 3001, dtype=torch.float64) * (MODE + 9 * math.sqrt(0.05 + level**2))
        density = PAIR.log_prob(x[:, None], level).exp()
        mean = PAIR(x[:, None], torch.full_like(x, level))[:, 0]
        kept = torch.trapezoid(density * mean**2, x)
        found.append((1 - kept) * (1 + level**2) / level**2)
    return torch.stack(found)


LOSSES = exact_losses(513)


def trig() -> NoisePath:
    return path_of(lambda t: (math.pi / 2 * t).cos(), lambda t: (math.pi / 2 * t).sin(), 1e-3, 0.999)


def energy_of_the_flow(path: NoisePath) -> float:
    """E = integral of E|u|^2 dt with the exact velocity, by quadrature over x and t: no angle, no L."""
    total = []
    for t in (torch.arange(200, dtype=torch.float64) + 0.5) / 200:
        c = path.coefficients(t)
        spread = float((c.alpha**2 * 0.05 + c.sigma**2).sqrt())
        x = torch.linspace(-1, 1, 2001, dtype=torch.float64) * (float(c.alpha) * MODE + 9 * spread)
        level = torch.full_like(x, float(c.sigma / c.alpha))
        density = PAIR.log_prob(x[:, None] / c.alpha, level).exp() / c.alpha
        clean = PAIR(x[:, None] / c.alpha, level)[:, 0]
        velocity = c.d_alpha * clean + c.d_sigma * (x - c.alpha * clean) / c.sigma
        total.append(torch.trapezoid(density * velocity**2, x))
    return float(torch.stack(total).mean())


def kinetic_energy(path: NoisePath, losses: Tensor, sigma_data: float, points: int = 4001) -> float:
    """The kinetic energy of any path on [0, 1] from these losses, a dimension, in units of sigma_data^2.

    With W = alpha sigma' - alpha' sigma: the integral of ``alpha'^2 + (sigma' / sigma_data)^2
    - L (W / sigma_data)^2 / (alpha^2 + (sigma / sigma_data)^2)``, by the midpoint rule.
    """
    c = path.coefficients((torch.arange(points, dtype=torch.float64) + 0.5) / points)
    share = _interpolate(losses, torch.atan2(c.sigma / sigma_data, c.alpha))
    straight = c.d_alpha**2 + (c.d_sigma / sigma_data) ** 2
    saved = share * (c.wronskian / sigma_data) ** 2 / (c.alpha**2 + (c.sigma / sigma_data) ** 2)
    return float((straight - saved).mean())


def test_two_narrow_modes() -> None:
    # Phi, E*, and the energies of the best, the straight and the trigonometric path.
    assert math.acos(1 - least_energy(LOSSES) / 2) == pytest.approx(0.4658, abs=1e-4)
    assert least_energy(LOSSES) == pytest.approx(0.2130, abs=2e-4)
    best = kinetic_path(LOSSES, 1.0, rho_min=0.0, rho_max=math.inf)
    energies = [kinetic_energy(path, LOSSES, 1.0) for path in (best, condot(), trig())]
    assert energies == pytest.approx([0.2130, 0.6773, 0.3898], abs=3e-4)
    for path, energy in zip((best, condot(), trig()), energies, strict=True):
        assert energy_of_the_flow(path) == pytest.approx(energy, abs=2e-3)


def test_energy_lies_between_transport_and_all_other_paths() -> None:
    # W2^2 of N(0, 1) and the pair, from their quantiles; no path of this kind moves less.
    u = (np.arange(20000) + 0.5) / 20000
    x = torch.linspace(-4, 4, 40001, dtype=torch.float64)
    pair = torch.special.ndtr((x[:, None] - torch.tensor([-MODE, MODE])) / math.sqrt(0.05)).mean(1)
    normal = torch.special.ndtri(torch.from_numpy(u)).numpy()
    transport = float(np.mean((np.interp(u, pair.numpy(), x.numpy()) - normal) ** 2))
    least = least_energy(LOSSES)
    assert transport <= least
    gen = torch.Generator().manual_seed(0)
    for _ in range(20):  # the best angle, disturbed
        a, b = (0.3 * torch.rand(2, generator=gen) - 0.15).tolist()
        bent = path_of(
            lambda t, a=a: (1 - t) * (1 + a * t), lambda t, b=b: t * (1 + b * (1 - t)), 1e-3, 0.999
        )
        assert kinetic_energy(bent, LOSSES, 1.0) > least


def test_the_data_separation_rises_and_no_linear_estimate_is_better() -> None:
    # For data of mean 0 and mean square 1, lam(s) rises with s = alpha / sigma from 0 to 1, and as D is at
    # least as good as the best linear estimate, lam >= s^2 / (1 + s^2). L = (1 - lam) (1 + rho^2) / rho^2.
    rho = torch.linspace(0, math.pi / 2, 513, dtype=torch.float64).tan().abs().clamp(1e-4, 1e4)
    lam = 1 - LOSSES * rho**2 / (1 + rho**2)
    assert bool((lam.diff() <= 1e-12).all())  # rho rises, so s falls
    assert bool(((lam >= 0) & (lam <= 1)).all())
    assert bool((lam >= 1 / (1 + rho**2) - 1e-12).all())


def test_the_two_limits() -> None:
    # Scattered points: the straight path with energy 2. A Gaussian: energy 0, every level still passed.
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    straight = kinetic_path([0.0] * 65, 1.0, rho_min=0, rho_max=math.inf)
    assert least_energy([0.0] * 65) == pytest.approx(2)
    torch.testing.assert_close(straight.alpha(t), 1 - t, rtol=0, atol=1e-12)
    torch.testing.assert_close(straight.sigma(t), t, rtol=0, atol=1e-12)
    still = kinetic_path([1.0] * 65, 0.5, rho_min=0, rho_max=math.inf)
    assert least_energy([1.0] * 65) < 1e-5
    power = still.alpha(t) ** 2 + 4 * still.sigma(t) ** 2
    torch.testing.assert_close(power, torch.ones_like(t), rtol=0, atol=1e-5)
    assert bool((still.rho(t).diff() > 0).all())


def test_it_is_a_path_like_any_other() -> None:
    path = kinetic_path(LOSSES[::4], 0.7)
    assert (path.rho_min, path.rho_max) == pytest.approx((0.002, 80.0), rel=1e-9)
    t = torch.linspace(path.t_min, path.t_max, 501, dtype=torch.float64)
    torch.testing.assert_close(path.t_of_rho(path.rho(t)), t, rtol=0, atol=1e-12)
    # Derivatives by finite differences, away from the ends, where they grow without bound, and from the
    # corners of the table.
    inner, h = torch.linspace(0.1, 0.9, 41, dtype=torch.float64), 1e-6
    c = path.coefficients(inner)
    for curve, slope in ((path.alpha, c.d_alpha), (path.sigma, c.d_sigma)):
        numeric = (curve(inner + h) - curve(inner - h)) / (2 * h)
        torch.testing.assert_close(numeric, slope, rtol=1e-4, atol=1e-4)
    assert path_from_dict(json.loads(json.dumps(path_to_dict(path)))) == path


def test_losses_from_a_teacher_and_from_data() -> None:
    x = PAIR.sample(4096, seed=1).double()
    teacher = losses_of_teacher(PAIR, x, 1.0, angles=33)
    exact = LOSSES[::16]
    # 4096 samples: G = 1 - L is known to a few per cent of itself.
    torch.testing.assert_close(teacher, exact, rtol=0, atol=0.03)
    assert least_energy(teacher) == pytest.approx(least_energy(exact), rel=0.03)
    data = losses_of_data(x[:2048], float(x[:2048].square().mean().sqrt()), angles=33, samples=512)
    torch.testing.assert_close(data[4:], exact[4:], rtol=0, atol=0.06)
    # Points are known by heart: no error where they are far apart, never more than that of a Gaussian.
    points = losses_of_data(torch.tensor([[-1.0], [1.0]]), 1.0, angles=65, samples=2048)
    assert abs(float(points[0])) < 0.05
    halved = losses_of_data(torch.tensor([[-0.5], [0.5]]), 0.5, angles=65, samples=2048)
    torch.testing.assert_close(halved, points, rtol=0, atol=1e-9)  # units do not matter
    assert float(points.max()) < 1.01
    kept = 1 - points / (1 + torch.linspace(0, math.pi / 2, 65, dtype=torch.float64).tan() ** -2)
    assert bool((kept.diff() < 0.01).all())  # lambda falls with the noise


def test_training_on_the_path_of_the_data(tmp_path) -> None:
    data = from_arrays(PAIR.sample(600, seed=2).expand(-1, 2).numpy())
    options = TrainOptions(
        run=RunOptions(steps=2, batch=32, device="cpu"),
        net=NetOptions(width=16, depth=1),
        teacher=TeacherConfig(path="kinetic-optimal"),
    )
    job = prepare_training(options, data)
    assert (job.notes["path"], job.notes["prediction"]) == ("kinetic-optimal", "flow")
    job.step(job.state, job.batches(0))
    save_model(tmp_path / "model", job.state.denoiser)
    loaded, _ = load_model(tmp_path / "model")
    x, sigma = torch.randn(8, 2), torch.logspace(-2, 1.8, 8)
    assert_same_but_for_rounding(loaded(x, sigma), job.state.denoiser.eval()(x, sigma))
    assert prepare_training(options, data).state.denoiser.path == loaded.path
    assert kinetic_path_of(data.raw).name == "kinetic-optimal"


def test_refusals() -> None:
    with pytest.raises(UserError, match="3 or more losses"):
        kinetic_path([0.5, 0.5], 1.0)
    with pytest.raises(UserError, match="finite"):
        kinetic_path([0.5, math.nan, 0.5], 1.0)
    with pytest.raises(UserError, match="sigma_data"):
        kinetic_path([0.5] * 5, 0.0)
    with pytest.raises(UserError, match="computed from data"):
        parse_path("kinetic-optimal", sigma_data=1.0, sigma_min=0.01, sigma_max=80.0)
