"""Feynman-Kac correctors against closed forms; each has its negative control. Seeds are fixed.

N particles that were resampled along the way estimate a mean about as well as N / 20 independent samples
(measured over seeds for these targets); tolerances are three standard errors of that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.composition.feynman_kac import Particles, feynman_kac
from distmatch.diffusion.composition.resampling import (
    effective_sample_size,
    log_mean_exp,
    systematic_indices,
)
from distmatch.diffusion.composition.targets import Target, annealed, annealed_prior, geometric, product
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve

N = 6000
FIRST = GaussianMixture([1.0], [[-1.0]], [0.5], sigma_max=20.0)
SECOND = GaussianMixture([1.0], [[1.0]], [0.8], sigma_max=20.0)
LEVELS = grid("log", 150, 0.02, 20.0, to_zero=False)


def noise_for(n: int = N, dim: int = 1, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, torch.arange(n), (dim,))


def run(target: Target, n: int = N, **options: object) -> Particles:
    return feynman_kac(target, LEVELS, noise_for(n), dtype=torch.float64, **options)  # type: ignore[arg-type]


def moments(done: Particles) -> tuple[float, float]:
    w, y = done.weights, done.y[:, 0]
    mean = (w * y).sum()
    return float(mean), float((w * (y - mean) ** 2).sum())


def gaussian_target(powers: tuple[float, float], sigma: float = 0.0) -> tuple[float, float, float]:
    """Mean, variance and log normalizer of N(-1, .5)^a N(1, .8)^b, both noised."""
    spread = torch.tensor([0.5, 0.8], dtype=torch.float64) + sigma**2
    b, m = torch.tensor(powers, dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    precision = (b / spread).sum()
    mean = (b * m / spread).sum() / precision
    height = -0.5 * (b * ((m - mean) ** 2 / spread + (2 * math.pi * spread).log())).sum()
    return float(mean), float(1 / precision), float(height + 0.5 * (2 * math.pi / precision).log())


CASES = {  # target, powers of the two Gaussians, whether the unweighted run is off in mean or variance
    "annealed": (annealed(FIRST, 3.0), (3.0, 0.0)),
    "product": (product([FIRST, SECOND]), (1.0, 1.0)),
    "guided": (geometric(SECOND, FIRST, 1.6), (-0.6, 1.6)),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", CASES)
def test_weighted_particles_have_the_target_and_unweighted_ones_do_not(name: str) -> None:
    target, powers = CASES[name]
    mean, variance, _ = gaussian_target(powers, 0.02)

    def passes(done: Particles) -> bool:
        m, v = moments(done)
        return abs(m - mean) < 3 * math.sqrt(variance / (N / 20)) and abs(v / variance - 1) < 3 * math.sqrt(
            40 / N
        )

    assert passes(run(target))
    assert not passes(run(target, resample_below=0.0, clamp=1e-12))  # all weights alike


@pytest.mark.statistical
def test_plain_guidance_is_what_the_unweighted_particles_are() -> None:
    """The drift of the corrector is that of guidance: same noise, same samples."""
    target = geometric(SECOND, FIRST, 1.6)
    y = annealed_prior(target, 20.0, noise_for(500))
    done = feynman_kac(target, LEVELS, noise_for(500), start=y, resample_below=0.0)

    class Plain(GaussianMixture):
        def forward(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return FIRST(x, sigma) + 1.6 * (SECOND(x, sigma) - FIRST(x, sigma))

    plain = Plain([1.0], [[0.0]], [1.0], sigma_max=20.0)
    guided = solve(plain, y, LEVELS, "reverse-diffusion", noise=noise_for(500))
    torch.testing.assert_close(done.y, guided.y, rtol=1e-9, atol=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("zeta", [1.0, 1.5**-0.5, 0.5])
def test_annealing_has_the_same_weights_at_every_noise_scale(zeta: float) -> None:
    """Target score, tempered noise, and less noise still, never resampled: the weights alone do it."""
    beta = 1.5
    done = run(annealed(FIRST, beta), noise_scale=zeta, resample_below=0.0)
    mean, variance, _ = gaussian_target((beta, 0.0), 0.02)
    m, v = moments(done)
    size = float(effective_sample_size(done.log_w))
    assert size > N / 40
    assert abs(m - mean) < 4 * math.sqrt(variance / size) + 0.01
    assert abs(v / variance - 1) < 4 * math.sqrt(2 / size) + 0.05


@pytest.mark.statistical
def test_the_normalizer_is_estimated() -> None:
    """log (Z_end / Z_start) in closed form, from a start that is drawn from the target itself."""
    for target, powers in CASES.values():
        mean, variance, log_z = gaussian_target(powers, 20.0)
        start = mean + math.sqrt(variance) * noise_for(seed=5).normal(0)
        done = run(target, start=start)
        change = gaussian_target(powers, 0.02)[2] - log_z
        # The steps take h |s|^2 at their start, which is off by a share of half a step in log sigma^2.
        assert abs(float(done.log_normalizer) - change) < 0.03 + 0.06 * abs(change), (powers, change)


@pytest.mark.statistical
def test_weights_of_a_start_from_another_law_count() -> None:
    """A start shifted by a third of its width, with its importance weights, ends where the right one does."""
    target, powers = CASES["product"]
    mean, variance, _ = gaussian_target(powers, 20.0)
    centered = math.sqrt(variance) * noise_for(seed=5).normal(0)
    shift = math.sqrt(variance) / 3
    start = centered + mean + shift
    log_w = (-0.5 * ((start - mean) ** 2 - centered**2) / variance)[:, 0]
    done = run(target, start=start, log_w=log_w)
    assert abs(moments(done)[0] - gaussian_target(powers, 0.02)[0]) < 0.1


def test_what_needs_no_weights_gets_none() -> None:
    one = run(product([FIRST, SECOND], [1.0, 0.0]), 50, resample_below=0.0)
    assert float(one.log_w.abs().max()) < 1e-12  # what roundings of float64 leave of 50 steps
    same = run(geometric(FIRST, FIRST, 1.6), 50, resample_below=0.0)
    assert float(same.log_w.abs().max()) < 1e-10
    assert float(one.ess.min()) > 1 - 1e-12


@pytest.mark.statistical
@pytest.mark.parametrize("zeta", [1.0, 0.7])
def test_a_linear_reward_shifts_a_gaussian(zeta: float) -> None:
    """N(-1, .5) exp(1.5 x) is N(-1 + .75, .5); without weights the shift comes out wrong."""
    target = Target([FIRST], [1.0], reward=lambda x: 1.5 * x[:, 0])
    done = run(target, noise_scale=zeta)
    m, v = moments(done)
    assert abs(m + 0.25) < 3 * math.sqrt(0.5 / (N / 20))
    assert abs(v - 0.5) < 3 * 0.5 * math.sqrt(40 / N)


@pytest.mark.statistical
def test_a_reward_that_sets_in_late_needs_its_weights() -> None:
    late = Target([FIRST], [1.0], reward=lambda x: 1.5 * x[:, 0], strength=lambda s: 0.0 if s > 0.3 else 1.0)
    assert abs(moments(run(late))[0] + 0.25) < 0.12
    plain = run(late, resample_below=0.0)
    assert abs(float(plain.y.mean()) + 0.25) > 0.3


@pytest.mark.statistical
def test_a_reward_on_a_product_of_models() -> None:
    target = Target([FIRST, SECOND], [1.0, 1.0], reward=lambda x: -0.5 * (x[:, 0] - 2) ** 2)
    mean, variance, _ = gaussian_target((1.0, 1.0))
    v = 1 / (1 / variance + 1)
    got = moments(run(target))
    assert abs(got[0] - v * (mean / variance + 2)) < 0.05
    assert abs(got[1] - v) < 0.03


def test_a_clamp_is_a_choice_that_biases() -> None:
    target, powers = CASES["guided"]
    done = run(target, clamp=0.001)
    assert abs(moments(done)[0] - gaussian_target(powers)[0]) > 0.3


def test_populations_are_independent() -> None:
    target = CASES["product"][0]
    levels = grid("log", 40, 0.1, 20.0, to_zero=False)
    y = annealed_prior(target, 20.0, noise_for(300))
    alone = feynman_kac(target, levels, noise_for(300), start=y)
    double = SampleNoise(0, torch.arange(300).repeat(2), (1,))
    pair = feynman_kac(target, levels, double, start=y.repeat(2, 1), populations=2)
    assert pair.ess.shape == (40, 2)
    assert pair.log_w.shape == pair.ancestors.shape == (2, 300)
    torch.testing.assert_close(pair.y[:300], alone.y, rtol=1e-9, atol=1e-9)
    assert not torch.equal(pair.ancestors[0], pair.ancestors[1])  # each has its own uniform numbers
    assert len(alone.ancestors.unique()) < 300
    assert alone.calls == 80


def test_resampled_particles_are_equally_weighted_samples() -> None:
    done = run(CASES["annealed"][0], resample_below=0.0)
    samples = done.resampled(3)
    assert samples.shape == done.y.shape
    assert abs(float(samples.mean()) - moments(done)[0]) < 0.01


def test_systematic_resampling_gives_each_its_share() -> None:
    """Floor or ceiling of K w, and K w on average; also where weights vanish or one has all."""
    log_w = torch.log(
        torch.tensor([[0.5, 0.26, 0.0, 0.24, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    )
    total = torch.zeros(2, 5)
    for u in (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000:
        chosen = systematic_indices(log_w + 700, u.expand(2))
        counts = torch.stack([row.bincount(minlength=5) for row in chosen])
        assert bool(((counts - 5 * log_w.exp()).abs() < 1).all())
        total += counts
    torch.testing.assert_close(total / 1000, 5 * log_w.exp().float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(effective_sample_size(log_w)[1], torch.tensor(1.0, dtype=torch.float64))
    even = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close(effective_sample_size(even), torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(log_mean_exp(even + 3), torch.tensor(3.0, dtype=torch.float64))


def test_wrong_targets_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="numbers of models"):
        Target([FIRST], [1.0, 2.0])
    with pytest.raises(UserError, match="positive sum"):
        product([FIRST, SECOND], [1.0, -1.0])
    with pytest.raises(UserError, match="without a reward"):
        Target([FIRST], [1.0], strength=lambda s: 1.0)
    with pytest.raises(UserError, match="above sigma 0"):
        feynman_kac(annealed(FIRST, 2.0), grid("log", 5, 0.02, 20.0), noise_for(4))
    wide = GaussianMixture([1.0], [[0.0]], [900.0], sigma_max=20.0)
    with pytest.raises(UserError, match="no density at this noise level"):
        annealed_prior(geometric(wide, FIRST, 3.0), 20.0, noise_for(4))
    with pytest.raises(UserError, match="one density at all noise levels"):
        feynman_kac(annealed(Guided(FIRST, 2.0, reference=SECOND), 2.0), LEVELS, noise_for(4))
    options: list[tuple[dict[str, object], str]] = [
        ({"populations": 3}, "divide"),
        ({"noise_scale": -1.0}, "noise scale"),
        ({"resample_below": 2.0}, "share"),
        ({"clamp": 0.0}, "clamp"),
        ({"log_w": torch.zeros(3)}, "log weight"),
    ]
    for option, message in options:
        with pytest.raises(UserError, match=message):
            feynman_kac(annealed(FIRST, 2.0), LEVELS, noise_for(4), **option)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="differentiable number"):
        feynman_kac(Target([FIRST], [1.0], reward=lambda x: x), LEVELS, noise_for(4))
