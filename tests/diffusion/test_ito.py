"""The density estimator along trajectories against closed forms. Seeds are fixed; float64 throughout."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.ito import ito_increment, trajectory_log_density
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import karras_grid
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve

PAIR = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [0.8, 0.5]], [0.2, 0.4])


def noised(teacher: GaussianMixture, n: int, sigma: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    clean = teacher.sample(n).double()
    return clean + sigma * torch.randn(clean.shape, generator=g, dtype=torch.float64)


def simulate(
    teacher: GaussianMixture, steps: int, noise_ratio: float, drift: float, n: int = 400
) -> tuple[list[Tensor], Tensor]:
    """A sampler with any drift: it pulls towards a place the teacher does not care about."""
    g = torch.Generator().manual_seed(2)
    levels = torch.logspace(math.log10(4), math.log10(0.3), steps + 1, dtype=torch.float64)
    y = 4 * torch.randn(n, *teacher.shape, generator=g, dtype=torch.float64)
    states = [y]
    for now, after in pairwise(levels):
        h = now**2 - after**2
        wander = drift * h * torch.sin(y) + 0.5 * h * teacher.score(y, now)
        y = y + wander + (noise_ratio * h).sqrt() * torch.randn(y.shape, generator=g, dtype=torch.float64)
        states.append(y)
    return states, levels


@pytest.mark.parametrize(("noise_ratio", "rate", "most"), [(1.0, 0.5, 800), (0.0, 1.0, 200)])
def test_ito_follows_the_density_of_any_trajectory(noise_ratio: float, rate: float, most: int) -> None:
    teacher = PAIR
    errors = []
    for steps in (most // 4, most):
        states, levels = simulate(teacher, steps, noise_ratio, drift=0.3)
        log_q = trajectory_log_density(
            teacher, states, levels, noise_ratio=noise_ratio, prior=lambda y, _: teacher.log_prob(y, 4.0)
        )
        truth = teacher.log_prob(states[-1], 0.3)
        errors.append(float((log_q[-1] - truth).square().mean().sqrt()))
        assert log_q.shape == (steps + 1, len(truth))
    measured = math.log(errors[0] / errors[1]) / math.log(4)
    assert measured == pytest.approx(rate, abs=0.12)  # the rates are asymptotic; 400 paths
    assert errors[1] < 0.15


@pytest.mark.parametrize(("solver", "noise_ratio"), [("heun", 0.0), ("euler-maruyama:0.5", 0.25)])
def test_the_trajectories_of_the_solvers_carry_their_density(solver: str, noise_ratio: float) -> None:
    levels = grid("log", 200, 0.3, 4.0, to_zero=False)
    y = noised(PAIR, 200, 4.0)
    noise = SampleNoise(seed=0, indices=torch.arange(200), shape=(2,)) if noise_ratio else None
    states = solve(PAIR, y, levels, solver, noise=noise, trajectory=True).trajectory
    assert states is not None
    prior = lambda y, _: PAIR.log_prob(y, 4.0)  # noqa: E731
    log_q = trajectory_log_density(PAIR, states, levels, noise_ratio=noise_ratio, prior=prior)
    gap = log_q[-1] - PAIR.log_prob(states[-1], 0.3)
    assert float(gap.square().mean().sqrt()) < 0.2
    other = trajectory_log_density(PAIR, states, levels, noise_ratio=1 - noise_ratio, prior=prior)
    assert float((other[-1] - log_q[-1]).abs().mean()) > 1


def test_a_wrong_noise_ratio_is_seen() -> None:
    teacher = PAIR
    states, levels = simulate(teacher, 400, 0.0, drift=0.3)
    prior = lambda y, _: teacher.log_prob(y, 4.0)  # noqa: E731
    wrong = trajectory_log_density(teacher, states, levels, noise_ratio=1.0, prior=prior)
    assert float((wrong[-1] - teacher.log_prob(states[-1], 0.3)).abs().mean()) > 1


def test_probes_serve_the_deterministic_form() -> None:
    teacher = PAIR
    states, levels = simulate(teacher, 50, 0.0, drift=0.3)
    exact = trajectory_log_density(teacher, states, levels, noise_ratio=0.0)[-1]
    probed = trajectory_log_density(teacher, states, levels, noise_ratio=0.0, trace="rademacher:64")[-1]
    gap = probed - exact
    assert 0 < float(gap.abs().mean()) < 0.2
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))


def test_several_models_and_levels_per_sample_broadcast() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 2, 2, generator=g, dtype=torch.float64)
    before, after = torch.randn(2, 5, 2, 2, generator=g, dtype=torch.float64)
    high, low = torch.linspace(1, 2, 5).double(), torch.linspace(0.1, 0.9, 5).double()
    divergence = torch.randn(3, 5, generator=g, dtype=torch.float64)
    found = ito_increment(scores, before, after, high, low, divergence=divergence, noise_ratio=0.3)
    for m in range(3):
        for b in range(5):
            one = ito_increment(
                scores[m, b : b + 1],
                before[b : b + 1],
                after[b : b + 1],
                float(high[b]),
                float(low[b]),
                divergence=divergence[m, b : b + 1],
                noise_ratio=0.3,
            )
            assert float(found[m, b]) == pytest.approx(float(one[0]), rel=1e-12)


def test_ito_mistakes_are_explained() -> None:
    teacher = PAIR
    y = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(UserError, match="needs the divergence"):
        ito_increment(y, y, y, 2.0, 1.0, noise_ratio=0.0)
    with pytest.raises(UserError, match="decreasing"):
        trajectory_log_density(teacher, [y, y], [1.0, 2.0])
    with pytest.raises(UserError, match="level is 0"):
        trajectory_log_density(teacher, [y, y], [1.0, 0.0])
    with pytest.raises(UserError, match="decreasing"):
        trajectory_log_density(teacher, [y], karras_grid(1, 0.1, 1.0))
